"""Updates: what a client sends for a ticket, and what it keeps for the next one.

With a sparse codec, the largest changes by magnitude over the whole update go up (top-k); with error feedback
(1809.07599) what did not go up, by sparsity or by rounding, is added to the client's next change:

    target = delta + residual,  sent = decode(encode(top-k(target))),  residual = target - sent

Whether an update counted is known only later, so both residuals are made: if it did not, all of the target is left.

The transforms of a run (`fedpeft.privacy.transforms`) stand between target and encoding, and both residuals are made of
what passed them. What clipping took away is in neither: kept, it would go up in later rounds, so that the bound would
hold a client's part back and not hold it down, and the residual of a client that is always clipped would grow for ever.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fedpeft.adapters import payload
from fedpeft.adapters.payload import Manifest, Tensors
from fedpeft.adapters.spec import ADAPTER, TensorSpec
from fedpeft.codecs import BLOCK_ELEMENTS, Values, codecs
from fedpeft.config import CodecConfig
from fedpeft.errors import PayloadInvalid, StateInvalid, TrainingFailed
from fedpeft.privacy.transforms import Transform

Arrays = dict[str, NDArray[np.float32]]

_MAGNITUDE = np.uint32(0x7FFF_FFFF)
_HALF_BITS = 16

_SLACKS = (0.0, 2.0**-20, 2.0**-10, 2.0**-6, 2.0**-4, 0.25, 0.5, 0.75)
"""Parts of a bound that are tried, one after the other, to stay below it although the encoding rounds."""


@dataclass(frozen=True, slots=True)
class PreparedUpdate:
    """An update ready to be sent.

    Attributes:
        manifest: Description of the payload.
        payload: The encoded tensors.
        residual_if_counted: Remainder if the server counts the update, float32 in the specs' shapes. A
            tensor of which nothing is left is absent. Tensors of the earlier residual that this
            round does not send stay as they were.
        residual_if_not: The same if the server does not count it: all that passed the transforms.
        figures: Figures of the transforms, for the update's metrics.
    """

    manifest: Manifest
    payload: bytes
    residual_if_counted: Arrays
    residual_if_not: Arrays
    figures: Mapping[str, float] = field(default_factory=dict)


def prepare(
    delta: Tensors,
    residual: Tensors | None,
    specs: Sequence[TensorSpec],
    codec: CodecConfig,
    transforms: Sequence[Transform] = (),
    seed: int = 0,
) -> PreparedUpdate:
    """Takes a client's change through the run's transforms, encodes it, and works out both residuals.

    Args:
        delta: Trained minus received, by name, float32; of other sections than the adapter what the server shall add.
            Those go whole: sparsity and error feedback are the adapter's.
        residual: Remainder of earlier updates, by name; None or an absent tensor is zero. Ignored
            without error feedback.
        specs: The tensors of this round's update, in order.
        codec: The run's codec settings.
        transforms: The steps before the encoding, see `fedpeft.privacy.transforms`.
        seed: Seed of the training, from which an encoding that draws derives its own for each tensor.

    Raises:
        TrainingFailed: If a change is missing, has a wrong shape, or is not finite, or its encoding cannot keep a
            bound.
        StateInvalid: If the residual has a wrong shape.
    """
    kept = residual if residual is not None and codec.error_feedback else {}
    target = {spec.name: _target(spec, delta, kept if spec.section == ADAPTER else {}) for spec in specs}
    passed, figures, manifest, data = _encoded(target, specs, codec, transforms, seed)
    if not codec.error_feedback:
        return PreparedUpdate(manifest, data, {}, {}, figures)
    own = {spec.name: passed[spec.name] for spec in specs if spec.section == ADAPTER}
    idle = {name: np.array(a, np.float32) for name, a in kept.items() if name not in own}
    decoded = payload.decode(manifest, memoryview(data))
    left = {name: values - decoded[name] for name, values in own.items()}
    return PreparedUpdate(manifest, data, _nonzero(idle | left), _nonzero(idle | own), figures)


def _encoded(
    target: Arrays, specs: Sequence[TensorSpec], codec: CodecConfig, transforms: Sequence[Transform], seed: int
) -> tuple[Arrays, dict[str, float], Manifest, bytes]:
    """Returns what passed the transforms, their figures, and the payload of it, which keeps their bounds."""
    for slack in _SLACKS:
        passed, figures = target, dict[str, float]()
        for transform in transforms:
            passed, found = transform.apply(passed, slack)
            figures |= found
        manifest, data = payload.encode(_sparse(passed, specs, codec), specs, codec.encoding, seed)
        try:
            if transforms:
                norm = math.sqrt(payload.squared_norm(manifest, memoryview(data)))
                for transform in transforms:
                    transform.check(norm)
            return passed, figures, manifest, data
        except PayloadInvalid as error:
            fault = error.message
    raise TrainingFailed(f"encoded as {codec.encoding}, {fault}")


def _sparse(tensors: Arrays, specs: Sequence[TensorSpec], codec: CodecConfig) -> Arrays:
    """Returns the tensors as they are encoded: by a sparse codec the largest changes only; other sections whole."""
    if not codecs.get(codec.encoding).is_sparse:
        return tensors
    tuned = [spec for spec in specs if spec.section == ADAPTER]
    k = max(1, round(codec.density * sum(spec.size for spec in tuned)))
    return tensors | top_k(tensors, tuned, k)


def _target(spec: TensorSpec, delta: Tensors, residual: Tensors) -> NDArray[np.float32]:
    if spec.name not in delta or delta[spec.name].shape != spec.shape:
        found = delta[spec.name].shape if spec.name in delta else "nothing"
        raise TrainingFailed(f"training left {found} for tensor {spec.name}, not {spec.shape}")
    target = np.array(delta[spec.name], np.float32, order="C")
    if spec.name in residual:
        if residual[spec.name].shape != spec.shape:
            raise StateInvalid(
                f"the residual of tensor {spec.name} has shape {residual[spec.name].shape}, "
                f"not {spec.shape}: it is of another run"
            )
        with np.errstate(over="ignore", invalid="ignore"):
            target += residual[spec.name]
    if not np.isfinite(target).all():
        raise TrainingFailed(
            f"the change of tensor {spec.name} is not finite: training diverged; a smaller learning rate would help"
        )
    return target


def _nonzero(arrays: Arrays) -> Arrays:
    return {name: values for name, values in arrays.items() if values.any()}


def top_k(tensors: Mapping[str, NDArray[np.float32]], specs: Sequence[TensorSpec], k: int) -> Arrays:
    """Returns the tensors with all but the k largest magnitudes over all of them set to zero.

    Of equal magnitudes the first in the order of specs and elements are kept. NaN must not occur.

    Args:
        tensors: By name, float32.
        specs: The tensors to look at, in order.
        k: Number of values kept, at least 1; all, if there are no more.
    """
    flat = [np.ascontiguousarray(tensors[spec.name]).reshape(-1) for spec in specs]
    threshold, ties = _threshold(flat, min(k, sum(values.size for values in flat)))
    chosen = {}
    for spec, values in zip(specs, flat, strict=True):
        bits = _bits(values)
        keep = bits > threshold
        equal = np.flatnonzero(bits == threshold)[:ties]
        keep[equal] = True
        ties -= equal.size
        chosen[spec.name] = np.where(keep, values, np.float32(0)).reshape(spec.shape)
    return chosen


def _bits(values: Values) -> NDArray[np.uint32]:
    """Returns the bits of the magnitudes: as integers they are ordered as the magnitudes are."""
    return values.view(np.uint32) & _MAGNITUDE


def _threshold(flat: Sequence[Values], k: int) -> tuple[np.uint32, int]:
    """Returns the bits of the k-th largest magnitude, and how many equal to it are among the k.

    Found by counting the upper and then the lower halves of the bits, so that nothing is sorted and
    nothing of the update's size is copied.
    """
    upper = np.zeros(1 << _HALF_BITS, np.int64)
    for bits in _blocks_of_bits(flat):
        upper += np.bincount(bits >> _HALF_BITS, minlength=upper.size)
    high, k = _bucket(upper, k)
    lower = np.zeros_like(upper)
    for bits in _blocks_of_bits(flat):
        those = bits[bits >> _HALF_BITS == high] & 0xFFFF
        if those.size:
            lower += np.bincount(those, minlength=lower.size)
    low, k = _bucket(lower, k)
    return np.uint32(high << _HALF_BITS | low), k


def _blocks_of_bits(flat: Sequence[Values]) -> Iterator[NDArray[np.uint32]]:
    for values in flat:
        for start in range(0, values.size, 16 * BLOCK_ELEMENTS):
            yield _bits(values[start : start + 16 * BLOCK_ELEMENTS])


def _bucket(counts: NDArray[np.int64], k: int) -> tuple[int, int]:
    """Returns the bucket that holds the k-th from above, and which from above it is in there."""
    from_above = np.cumsum(counts[::-1])
    place = int(np.searchsorted(from_above, k))
    bucket = counts.size - 1 - place
    return bucket, k - int(from_above[place] - counts[bucket])
