"""LoRA (Hu et al., arXiv 2106.09685) through the `peft` library: W x + (alpha / rank) B A x.

A starts Kaiming-uniform and B at zero, so the model starts as the backbone. On timm's fused qkv one A of [rank, width]
serves query, key and value, with one B of [3 width, rank].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field
from torch import nn

from fedpeft.peft.method import MethodOptions, methods
from fedpeft.peft.tuner import ADAPTER, Targets, Tuner

if TYPE_CHECKING:
    from peft import LoraConfig

NAME = "lora"
A, B = "lora_A", "lora_B"
"""The library's names of the two factors."""


class LoraOptions(MethodOptions):
    """Options of LoRA."""

    rank: Annotated[int, Field(ge=1, le=4096)] = 8
    """Rank of every product B A."""
    alpha: Annotated[float, Field(gt=0, le=65_536)] = 16.0
    """The product is scaled by alpha / rank."""
    targets: Targets = "qkv"
    """Linear layers of the blocks, as shell patterns for the end of a layer's name, such as qkv, attn.*, mlp.fc?."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of a layer's input dropped on its way to A while training."""


@methods.register(NAME)
class Lora(Tuner[LoraOptions]):
    """Tunes A and B beside every target layer."""

    Options = LoraOptions
    parameters = frozenset({A, B})

    @property
    def targets(self) -> Targets:
        """See `Tuner.targets`."""
        return self.options.targets

    def config(self, layers: Sequence[str]) -> LoraConfig:
        """See `Tuner.config`."""
        from peft import LoraConfig

        options = self.options
        return LoraConfig(
            r=options.rank,
            lora_alpha=options.alpha,  # type: ignore[arg-type]  # only ever divided by the rank
            lora_dropout=options.dropout,
            target_modules=list(layers),
            bias="none",
        )

    def start(self, layer: nn.Module, generator: torch.Generator) -> None:
        """See `Tuner.start`."""
        down, up = (layer.get_parameter(f"{factor}.{ADAPTER}.weight") for factor in (A, B))
        start = torch.empty(down.shape)
        nn.init.kaiming_uniform_(start, a=5**0.5, generator=generator)
        down.copy_(start)
        up.zero_()


def is_factor(name: str, factor: str) -> bool:
    """Returns whether a canonical name is that of a factor, A or B, of some layer."""
    return factor in name.split(".")
