"""Adapter tuning (Houlsby et al., arXiv 1902.00751; Pfeiffer's placement): a bottleneck behind the MLP.

In each block, x + MLP(norm(x)) becomes x + A(MLP(norm(x))) with A(h) = h + up(GELU(down(h))). As in the FedPEFT paper
one bottleneck serves all blocks unless `shared` is false.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType
from typing import Annotated

import torch
from pydantic import Field
from torch import nn

from fedpeft.models.structure import ModelStructure
from fedpeft.peft.method import Method, MethodOptions, methods

REDUCTION = 8
"""Token width over bottleneck width where none is given: 96 of 768 in the paper."""


class AdapterOptions(MethodOptions):
    """Options of adapter tuning."""

    shared: bool = True
    """Shares one bottleneck among all blocks; else each has its own."""
    width: Annotated[int, Field(ge=1, le=65_536)] | None = None
    """Width of the bottleneck; an eighth of the token's width if absent."""


class Bottleneck(nn.Module):
    """down, GELU, up, and the way around them.

    Only `up` starts at zero, so that the model starts as the backbone: with both at zero GELU(0) = 0 would let no
    gradient reach either weight, ever.
    """

    def __init__(self, tokens: int, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.down = nn.Linear(tokens, width)
        self.up = nn.Linear(width, tokens)
        with torch.no_grad():
            nn.init.kaiming_uniform_(self.down.weight, a=5**0.5, generator=generator)
            for start in (self.down.bias, self.up.weight, self.up.bias):
                start.zero_()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Maps float [..., tokens] to the same shape."""
        changed: torch.Tensor = self.up(nn.functional.gelu(self.down(hidden)))
        return hidden + changed

    def after(self, mlp: nn.Module, args: tuple[object, ...], output: torch.Tensor) -> torch.Tensor:
        """Forward hook of an MLP: sends its output through the bottleneck."""
        passed: torch.Tensor = self(output)
        return passed


@methods.register("adapter")
class Adapter(Method[AdapterOptions]):
    """Tunes one bottleneck for all blocks, or one for each."""

    Options = AdapterOptions
    needs = ("mlps",)
    variants = MappingProxyType({"adapter-per-block": {"shared": False}})

    def inject(self, module: nn.Module, structure: ModelStructure, generator: torch.Generator) -> Sequence[nn.Module]:
        """See `Method.inject`; `adapter`, or `adapter` in each block."""
        width = self.options.width or max(1, structure.width // REDUCTION)
        if self.options.shared:
            bottlenecks = [Bottleneck(structure.width, width, generator)] * len(structure.mlps)
            module.add_module("adapter", bottlenecks[0])
        else:
            bottlenecks = [Bottleneck(structure.width, width, generator) for _ in structure.mlps]
            for block, bottleneck in zip(structure.blocks.values(), bottlenecks, strict=True):
                block.add_module("adapter", bottleneck)
        for mlp, bottleneck in zip(structure.mlps, bottlenecks, strict=True):
            mlp.register_forward_hook(bottleneck.after)
        return bottlenecks

    def tunes(self, name: str) -> bool:
        """See `Method.tunes`."""
        return "adapter" in name.split(".")
