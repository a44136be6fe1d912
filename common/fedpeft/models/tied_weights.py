"""Tied weights: one parameter of a model that stands there under several names, as an embedding and an output layer do.

Such a parameter has one tensor in the adapter spec, on the wire and in the fingerprint, under the first of its names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from fedpeft.errors import ModelInvalid


def names_of(module: nn.Module) -> dict[str, list[str]]:
    """Returns all names of every parameter, in the model's order, by the first of them."""
    first: dict[int, str] = {}
    names: dict[str, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(first.setdefault(id(parameter), name), []).append(name)
    return names


def aliases_of(module: nn.Module) -> set[str]:
    """Returns the names of tied parameters beyond the first."""
    return {alias for names in names_of(module).values() for alias in names[1:]}


def tied_beyond(module: nn.Module, part: str) -> set[str]:
    """Returns the names of parameters inside the submodule `part` that stand outside of it too."""
    prefix = f"{part}."
    groups = [{name: name.startswith(prefix) for name in names} for names in names_of(module).values()]
    return {name for group in groups if len(set(group.values())) == 2 for name, within in group.items() if within}


def put(module: nn.Module, names: Iterable[str], parameter: nn.Parameter) -> None:
    """Sets a parameter under all of its names."""
    for name in names:
        place, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(place), leaf, parameter)


def spread(state: Mapping[str, torch.Tensor], module: nn.Module) -> dict[str, torch.Tensor]:
    """Returns a state dict with the value of a tied parameter under all of its names: files may hold it under one.

    Raises:
        ModelInvalid: If two names of one parameter have different values.
    """
    whole = dict(state)
    for names in names_of(module).values():
        held = [name for name in names if name in state]
        for other in held[1:]:
            if state[other].shape != state[held[0]].shape or not torch.equal(state[other], state[held[0]]):
                raise ModelInvalid(f"{held[0]} and {other} are one tensor of the model, and differ in the weights")
        if held:
            whole |= {name: state[held[0]] for name in names}
    return whole
