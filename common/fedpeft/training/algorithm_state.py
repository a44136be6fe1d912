"""Arrays of a client's state and sections as the tensors that a local algorithm computes with, and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import nn

from fedpeft.adapters.payload import Tensors
from fedpeft.algorithms import TensorGroups
from fedpeft.errors import TrainingFailed
from fedpeft.rounds.local_job import Groups


def to_tensors(
    names: Iterable[str], groups: Groups, parameters: Mapping[str, nn.Parameter]
) -> dict[str, dict[str, torch.Tensor]]:
    """Returns the groups of these names, a tensor for each parameter on its device; zeros where none is held."""
    return {name: {key: _beside(p, groups.get(name, {}), key) for key, p in parameters.items()} for name in names}


def _beside(parameter: nn.Parameter, held: Tensors, name: str) -> torch.Tensor:
    if name not in held:
        return torch.zeros_like(parameter, requires_grad=False)
    return torch.from_numpy(np.array(held[name], np.float32)).to(parameter.device)


def to_arrays(groups: TensorGroups) -> dict[str, dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]]]:
    """Returns groups of tensors as arrays, float32.

    Raises:
        TrainingFailed: If a value is not finite.
    """
    found = {}
    for group, tensors in groups.items():
        found[group] = {name: t.detach().to("cpu", torch.float32).numpy() for name, t in tensors.items()}
        for name, values in found[group].items():
            if not np.isfinite(values).all():
                raise TrainingFailed(f"{group} of tensor {name} is not finite; lower the learning rate")
    return found
