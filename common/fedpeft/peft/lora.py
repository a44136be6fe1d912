"""LoRA (Hu et al., arXiv 2106.09685) through the `peft` library: W x + (alpha / rank) B A x.

A starts Kaiming-uniform and B at zero, so the model starts as the backbone. On timm's fused qkv one A of [rank, width]
serves query, key and value, with one B of [3 width, rank].

The library takes seconds to import, so only those who use LoRA wait for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field
from torch import nn

from fedpeft.errors import ConfigInvalid
from fedpeft.models.families import Anatomy
from fedpeft.peft.method import Method, MethodOptions, methods

if TYPE_CHECKING:
    from peft import LoraConfig

ADAPTER = "default"
"""The library's name for an only adapter; it stands in its parameter names and not in canonical ones."""

Pattern = Annotated[str, Field(min_length=1, max_length=128)]


class LoraOptions(MethodOptions):
    """Options of LoRA."""

    rank: Annotated[int, Field(ge=1, le=4096)] = 8
    """Rank of every product B A."""
    alpha: Annotated[float, Field(gt=0, le=65_536)] = 16.0
    """The product is scaled by alpha / rank."""
    targets: Pattern | Annotated[tuple[Pattern, ...], Field(strict=False)] = "qkv"
    """Linear layers of the blocks, as shell patterns for the end of a layer's name, such as qkv, attn.*, mlp.fc?."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of a layer's input dropped on its way to A while training."""


def target_layers(module: nn.Module, anatomy: Anatomy, targets: str | tuple[str, ...]) -> list[str]:
    """Returns the names of the linear layers in the blocks that a pattern fits, in the model's order.

    Raises:
        ConfigInvalid: If a pattern fits none.
    """
    layers = [
        f"{block}.{name}"
        for block, part in anatomy.blocks.items()
        for name, layer in part.named_modules()
        if isinstance(layer, nn.Linear)
    ]
    chosen = set()
    for pattern in [targets] if isinstance(targets, str) else targets:
        fits = {n for n in layers if fnmatchcase(n, pattern) or fnmatchcase(n, f"*.{pattern}")}
        if not fits:
            ends = sorted({n.partition(".")[2].partition(".")[2] for n in layers})
            fault = f"{pattern!r} fits no linear layer of a block; there are: {', '.join(ends)}"
            raise ConfigInvalid(f"peft.targets: {fault}", (("peft.targets", fault),))
        chosen |= fits
    return [name for name in layers if name in chosen]


@methods.register("lora")
class Lora(Method[LoraOptions]):
    """Tunes A and B beside every target layer."""

    Options = LoraOptions
    needs = ("blocks",)

    def config(self, layers: Sequence[str]) -> LoraConfig:
        """Returns the library's configuration for target layers of these names."""
        from peft import LoraConfig

        options = self.options
        return LoraConfig(
            r=options.rank,
            lora_alpha=options.alpha,  # type: ignore[arg-type]  # only ever divided by the rank
            lora_dropout=options.dropout,
            target_modules=list(layers),
            bias="none",
        )

    def inject(self, module: nn.Module, anatomy: Anatomy, generator: torch.Generator) -> Sequence[nn.Module]:
        """See `Method.inject`; target layers are wrapped."""
        from peft import inject_adapter_in_model
        from peft.tuners.lora import Linear as LoraLinear

        names = target_layers(module, anatomy, self.options.targets)
        inject_adapter_in_model(self.config(names), module, adapter_name=ADAPTER)
        layers = [module.get_submodule(name) for name in names]
        with torch.no_grad():
            for layer in layers:
                assert isinstance(layer, LoraLinear)
                down, up = (factors[ADAPTER].get_parameter("weight") for factors in (layer.lora_A, layer.lora_B))
                start = torch.empty(down.shape)
                nn.init.kaiming_uniform_(start, a=5**0.5, generator=generator)
                down.copy_(start)
                up.zero_()
        return layers

    def tunes(self, name: str) -> bool:
        """See `Method.tunes`."""
        return not {"lora_A", "lora_B"}.isdisjoint(name.split("."))

    def canonical(self, name: str) -> str:
        """See `Method.canonical`; the library renames wrapped weights and puts its adapter's name into its own."""
        parts = name.split(".")
        if self.tunes(name):
            parts.remove(ADAPTER)
        return ".".join(part for part in parts if part != "base_layer")

    def plain(self, module: nn.Module) -> dict[str, torch.Tensor]:
        """See `Method.plain`; B A is added to the weights it stands beside."""
        from peft.tuners.lora import Linear as LoraLinear

        state = {self.canonical(name): tensor for name, tensor in module.state_dict().items() if not self.tunes(name)}
        for name, layer in module.named_modules():
            if isinstance(layer, LoraLinear):
                state[f"{name}.weight"] = state[f"{name}.weight"] + layer.get_delta_weight(ADAPTER)
        return state
