"""Sections: what travels beside the adapter, such as SCAFFOLD's control variate, up and down alike.

The tensors of a section stand in the adapter spec, under names of their own, so that payloads, versions, downloads and
checks need no second way. What differs is the encoding, and how the server folds them:

    s <- s + (change_1 + change_2 + ...) / divisor

With the number of all clients as the divisor, s stays the mean of what the clients hold, if they send the changes of
their own values and all began at zero: the c of SCAFFOLD (arXiv 1910.06378), c + |S| / N times the mean change.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from fedpeft.adapters.spec import ADAPTER, AdapterSpec, Section, TensorRole, TensorSpec

Arrays = dict[str, NDArray[np.float32]]
Groups = Mapping[str, Mapping[str, NDArray[np.float32]]]
"""Tensors by section, and in it by member: the name of the adapter's tensor that each belongs to; float32."""


def with_sections(spec: AdapterSpec, sections: Iterable[Section]) -> AdapterSpec:
    """Returns a spec with further sections, each with one tensor for each of the adapter that some round sends.

    Raises:
        SpecInvalid: If a section breaks a rule.
    """
    sent = [t for t in spec.tensors if TensorRole.SENT in t.roles and t.section == ADAPTER]
    added = [TensorSpec(f"{s.name}/{t.name}", t.shape, t.roles, s) for s in sections for t in sent]
    return AdapterSpec.of(spec.method, (*spec.tensors, *added)) if added else spec


def initial(spec: AdapterSpec) -> Arrays:
    """Returns the values with which the tensors of a run's other sections begin: zeros, by wire name."""
    return {t.name: np.zeros(t.shape, np.float32) for t in spec.tensors if t.section != ADAPTER}


def split(spec: AdapterSpec, tensors: Mapping[str, NDArray[np.float32]]) -> tuple[Arrays, dict[str, Arrays]]:
    """Returns the adapter's tensors, by name, and those of the other sections, by section and member."""
    adapter, others = dict(tensors), dict[str, Arrays]()
    for tensor in spec.tensors:
        if tensor.section != ADAPTER and tensor.name in adapter:
            others.setdefault(tensor.section.name, {})[tensor.member] = adapter.pop(tensor.name)
    return adapter, others


def join(adapter: Mapping[str, NDArray[np.float32]], others: Groups) -> Arrays:
    """Returns the tensors of all sections by wire name; the inverse of `split`."""
    beside = {f"{section}/{member}": values for section, group in others.items() for member, values in group.items()}
    return {**adapter, **beside}
