"""Ranks of clients below the run's: the factors that such a client holds, and the shapes of its update.

A client of rank r holds the first r rows of A and columns of B; beyond these both are zero, so that no gradient reaches
them, and the rest of the model is as for everyone. Its update has A of [r, in] and B of [out, r]. At the server its
factors are the same, with zeros: B_i A_i is exact, and strategies that take products need nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fedpeft.adapters.payload import Manifest
from fedpeft.adapters.spec import ADAPTER, TensorSpec
from fedpeft.aggregation import Strategy
from fedpeft.aggregation.low_rank.factor_pairs import DOWN, UP

Arrays = Mapping[str, NDArray[np.float32]]


def of_rank(specs: Sequence[TensorSpec], rank: int | None) -> tuple[TensorSpec, ...]:
    """Returns tensors as a client of a rank has them; None: the run's, as is every rank above it."""
    if rank is None:
        return tuple(specs)
    return tuple(replace(spec, shape=_shape(spec, rank)) for spec in specs)


def rank_in(specs: Iterable[TensorSpec]) -> int | None:
    """Returns the largest rank of LoRA factors among some tensors; None if none is one."""
    return max((spec.shape[0] for spec in specs if _is_factor(spec, DOWN)), default=None)


def as_claimed(strategy: Strategy, specs: Sequence[TensorSpec], manifest: Manifest) -> tuple[TensorSpec, ...]:
    """Returns the tensors that an update must have: those of the rank that its first A has, if the strategy takes it.

    Args:
        strategy: The run's.
        specs: The tensors that a round sends.
        manifest: Description of the update, from outside. A rank that cannot be is left for the check of the shapes.
    """
    named = {entry.name: entry.shape for entry in manifest.entries}
    first = next((spec.name for spec in specs if _is_factor(spec, DOWN)), "")
    claimed = named.get(first, ())
    takes = strategy.takes_ranks and len(claimed) == 2 and claimed[0] >= 1
    return of_rank(specs, claimed[0] if takes else None)


def limited(tensors: Arrays, specs: Sequence[TensorSpec], rank: int | None) -> dict[str, NDArray[np.float32]]:
    """Returns a version as a client of a rank holds it: its shapes, with zeros beyond the rank."""
    found = dict(tensors)
    for spec, own in zip(specs, of_rank(specs, rank), strict=True):
        if own.shape != spec.shape:
            found |= padded(cut({spec.name: tensors[spec.name]}, [own]), [spec])
    return found


def cut(tensors: Arrays, specs: Sequence[TensorSpec]) -> dict[str, NDArray[np.float32]]:
    """Returns the parts of tensors that `specs`, of a lower rank, have; tensors that they do not name stay whole."""
    found = dict(tensors)
    for spec in specs:
        if spec.name in found and found[spec.name].shape != spec.shape:
            found[spec.name] = np.ascontiguousarray(found[spec.name][tuple(slice(size) for size in spec.shape)])
    return found


def padded(tensors: Arrays, specs: Sequence[TensorSpec]) -> dict[str, NDArray[np.float32]]:
    """Returns tensors in the shapes that `specs`, of a higher rank, have, with zeros; the inverse of `cut`."""
    found = dict(tensors)
    for spec in specs:
        if spec.name in found and found[spec.name].shape != spec.shape:
            found[spec.name] = np.zeros(spec.shape, np.float32)
            found[spec.name][tuple(slice(size) for size in tensors[spec.name].shape)] = tensors[spec.name]
    return found


def _is_factor(spec: TensorSpec, end: str) -> bool:
    return spec.section == ADAPTER and len(spec.shape) == 2 and spec.name.endswith(end)


def _shape(spec: TensorSpec, rank: int) -> tuple[int, ...]:
    if _is_factor(spec, DOWN):
        return min(rank, spec.shape[0]), spec.shape[1]
    if _is_factor(spec, UP):
        return spec.shape[0], min(rank, spec.shape[1])
    return spec.shape
