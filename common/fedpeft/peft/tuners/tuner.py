"""Tuners of the Hugging Face `peft` library as methods: linear layers of the blocks are wrapped by the library.

The library takes seconds to import, so only those who use such a method wait for it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import nn

from fedpeft.models.structure import ModelStructure
from fedpeft.peft.method import Method, OptionsT, unfit
from fedpeft.peft.places import linear_layers

if TYPE_CHECKING:
    from peft import PeftConfig

ADAPTER = "default"
"""The library's name for an only adapter; it stands in its parameter names and not in canonical ones."""
BESIDE = "base_model."
"""Prefix, in the library's files, of a tensor that stands beside the model and not in one of its layers."""

Pattern = Annotated[str, Field(min_length=1, max_length=128)]
Targets = Pattern | Annotated[tuple[Pattern, ...], Field(strict=False)]
"""Linear layers of the blocks, as shell patterns for the end of a layer's name, such as qkv, attn.*, mlp.fc?."""


def linear_layers_of(structure: ModelStructure) -> dict[str, nn.Linear]:
    """Returns the linear layers in the blocks by name, in the model's order."""
    blocks = structure.blocks.items()
    return {f"{block}.{name}": layer for block, part in blocks for name, layer in linear_layers(part).items()}


def fitting(pattern: str, names: Iterable[str]) -> set[str]:
    """Returns the names that a shell pattern fits, whole or from a dot to the end."""
    return {name for name in names if fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")}


def target_layers(structure: ModelStructure, targets: str | tuple[str, ...]) -> list[str]:
    """Returns the names of the linear layers in the blocks that a pattern fits, in the model's order.

    Raises:
        ConfigInvalid: If a pattern fits none, or there is no pattern.
    """
    layers = list(linear_layers_of(structure))
    known = ", ".join(sorted({name for part in structure.blocks.values() for name in linear_layers(part)}))
    patterns = [targets] if isinstance(targets, str) else targets
    if not patterns:
        raise unfit(f"names no layer; there are: {known}", "targets")
    chosen = set()
    for pattern in patterns:
        fits = fitting(pattern, layers)
        if not fits:
            raise unfit(f"{pattern!r} fits no linear layer of a block; there are: {known}", "targets")
        chosen |= fits
    return [name for name in layers if name in chosen]


class Tuner(Method[OptionsT]):
    """A tuner of the library: a subclass gives its `peft_form`, its configuration and back, and its initial values."""

    needs = ("blocks",)
    parameters: ClassVar[frozenset[str]]
    """The library's names of the modules that it adds to a wrapped layer; their parameters are tuned."""

    @property
    @abstractmethod
    def targets(self) -> Targets:
        """The layers that are wrapped."""

    def layers(self, structure: ModelStructure) -> list[str]:
        """Returns the names of the layers that the library wraps."""
        return target_layers(structure, self.targets)

    @abstractmethod
    def config(self, layers: Sequence[str]) -> PeftConfig:
        """Returns the library's configuration for target layers of these names."""

    @abstractmethod
    def start(self, layer: nn.Module, generator: torch.Generator) -> None:
        """Sets the initial values of a wrapped layer, drawn on the CPU; called without gradients."""

    def peft_config(self, module: nn.Module, structure: ModelStructure) -> PeftConfig:
        """See `Method.peft_config`."""
        return self.config(self.layers(structure))

    def inject(self, module: nn.Module, structure: ModelStructure, generator: torch.Generator) -> Sequence[nn.Module]:
        """See `Method.inject`; target layers are wrapped."""
        names = self.layers(structure)
        if not names:
            return ()
        self.wrap(module, names)
        layers = [module.get_submodule(name) for name in names]
        with torch.no_grad():
            for layer in layers:
                self.start(layer, generator)
        return layers

    def wrap(self, module: nn.Module, layers: Sequence[str]) -> None:
        """Has the library wrap layers of these names."""
        from peft import inject_adapter_in_model

        inject_adapter_in_model(self.config(layers), module, adapter_name=ADAPTER)

    def tunes(self, name: str) -> bool:
        """See `Method.tunes`."""
        return not self.parameters.isdisjoint(name.split("."))

    def canonical(self, name: str) -> str:
        """See `Method.canonical`; the library renames wrapped weights and puts its adapter's name into its own."""
        parts = name.split(".")
        if self.tunes(name) and ADAPTER in parts:
            parts.remove(ADAPTER)
        return ".".join(part for part in parts if part != "base_layer")

    def plain(self, module: nn.Module) -> dict[str, torch.Tensor]:
        """See `Method.plain`; what a layer adds to its weight is merged into it."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        state = {self.canonical(name): tensor for name, tensor in module.state_dict().items() if not self.tunes(name)}
        for name, layer in module.named_modules():
            if isinstance(layer, BaseTunerLayer):
                state[f"{name}.weight"] = self.merged(layer, state[f"{name}.weight"]).detach()
        return state

    def merged(self, layer: Any, weight: torch.Tensor) -> torch.Tensor:
        """Returns the weight of a wrapped layer with what was tuned merged into it.

        Args:
            layer: The library's, which has get_delta_weight if it merges.
            weight: The plain layer's.
        """
        whole: torch.Tensor = weight + layer.get_delta_weight(ADAPTER)
        return whole
