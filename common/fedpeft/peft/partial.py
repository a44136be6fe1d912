"""Partial fine-tuning (Yosinski et al., arXiv 1411.1792; "Partial-k" in VPT, arXiv 2203.12119): the last k blocks.

The norm behind the last block is tuned with them. Nothing is added to the model, so its result is a plain model too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import nn

from fedpeft.models.structure import ModelStructure
from fedpeft.peft.method import Method, MethodOptions, methods, unfit
from fedpeft.peft.places import last_norms


class PartialOptions(MethodOptions):
    """Options of partial fine-tuning."""

    blocks: Annotated[int, Field(ge=1, le=256)] = 1
    """Blocks that are tuned, counted from the last."""


@methods.register("partial")
class Partial(Method[PartialOptions]):
    """Tunes every parameter of the last blocks and of the norms behind them."""

    Options = PartialOptions
    needs = ("blocks",)
    _prefixes: tuple[str, ...] = ()

    def inject(self, module: nn.Module, structure: ModelStructure, generator: torch.Generator) -> Sequence[nn.Module]:
        """See `Method.inject`; adds nothing, and returns the tuned blocks: their dropout is on while they train."""
        wanted = self.options.blocks
        if wanted > len(structure.blocks):
            raise unfit(f"is {wanted}; the model has {len(structure.blocks)} blocks", "blocks")
        names = list(structure.blocks)[-wanted:]
        self._prefixes = tuple(f"{name}." for name in [*names, *last_norms(module, structure)])
        return [structure.blocks[name] for name in names]

    def tunes(self, name: str) -> bool:
        """See `Method.tunes`."""
        return name.startswith(self._prefixes)
