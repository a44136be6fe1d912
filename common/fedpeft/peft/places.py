"""Places of a model that its structure does not name, found by the kinds and the usual names of its layers."""

from __future__ import annotations

from torch import nn

from fedpeft.models.structure import ModelStructure

FUSED = "qkv"
"""Name of a linear layer whose rows are queries, keys and values, a third each, as timm's attention has it."""
KEYS, VALUES = ("k_proj", "key", "k"), ("v_proj", "value", "v")
"""Usual names of a linear layer that makes keys, or values, alone."""


def norms(module: nn.Module) -> list[str]:
    """Returns the names of the layer norms with parameters, RMS norms among them, in the model's order."""
    return [name for name, part in module.named_modules() if is_norm(part)]


def is_norm(part: nn.Module) -> bool:
    """Returns whether a module is a layer norm or an RMS norm with parameters, torch's or a library's own."""
    named = type(part).__name__.lower().endswith(("layernorm", "rmsnorm"))
    return (named or isinstance(part, (nn.LayerNorm, nn.RMSNorm))) and any(True for _ in part.parameters(recurse=False))


def linear_layers(part: nn.Module) -> dict[str, nn.Linear]:
    """Returns the linear layers inside a module by name, in the model's order."""
    return {name: layer for name, layer in part.named_modules() if isinstance(layer, nn.Linear)}


def fused(name: str, layer: nn.Linear) -> bool:
    """Returns whether a linear layer's rows are queries, keys and values of one size."""
    return name.rpartition(".")[2] == FUSED and layer.out_features == 3 * layer.in_features


def last_norms(module: nn.Module, structure: ModelStructure) -> list[str]:
    """Returns the names of the norms that stand behind the last block in the model's order."""
    last = list(structure.blocks)[-1]
    order = [name for name, _ in module.named_modules()]
    behind = {name for name in order[order.index(last) + 1 :] if not name.startswith(f"{last}.")}
    return [name for name in norms(module) if name in behind]
