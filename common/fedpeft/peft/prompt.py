"""Visual prompt tuning (VPT, Jia et al., arXiv 2203.12119): learned tokens beside the image's.

Deep: each block gets its own tokens, appended after the sequence and removed behind the block. Shallow: one set is
appended before the first block and removed behind the last. Prompts carry no position embedding, so their place in the
sequence is free.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import MappingProxyType
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import nn

from fedpeft.models.structure import ModelStructure
from fedpeft.peft.method import Method, MethodOptions, methods


class PromptOptions(MethodOptions):
    """Options of prompt tuning."""

    tokens: Annotated[int, Field(ge=1, le=4096)] = 10
    """Prompts a block."""
    deep: bool = True
    """Gives every block prompts of its own; else one set passes through all."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of prompt values dropped while training."""


class Prompt(nn.Module):
    """Learned tokens, float32 [tokens, width], uniform(-v, v) with v = sqrt(6 / (patch values + width)) (Xavier)."""

    def __init__(self, count: int, structure: ModelStructure, dropout: float, generator: torch.Generator) -> None:
        super().__init__()
        bound = math.sqrt(6 / (structure.patch_values + structure.width))
        start = torch.empty(count, structure.width).uniform_(-bound, bound, generator=generator)
        self.tokens = nn.Parameter(start)
        self.dropout = nn.Dropout(dropout)

    def append(self, block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Forward pre-hook of a block: float [batch, n, width] becomes [batch, n + tokens, width]."""
        x: torch.Tensor = args[0]
        tokens = self.dropout(self.tokens.to(x.dtype).expand(x.shape[0], -1, -1))
        return (torch.cat((x, tokens), dim=1), *args[1:])

    def remove(self, block: nn.Module, args: tuple[object, ...], output: torch.Tensor) -> torch.Tensor:
        """Forward hook of a block: takes the prompts off again."""
        return output[:, : output.shape[1] - self.tokens.shape[0]]


@methods.register("prompt")
class PromptTuning(Method[PromptOptions]):
    """Tunes prompts in every block, or before the first."""

    Options = PromptOptions
    needs = ("blocks",)
    variants = MappingProxyType({"prompt-shallow": {"deep": False}})

    def inject(self, module: nn.Module, structure: ModelStructure, generator: torch.Generator) -> Sequence[nn.Module]:
        """See `Method.inject`; `prompt` in each block, or in the first."""
        options = self.options
        blocks = list(structure.blocks.values())
        spans = [(b, b) for b in blocks] if options.deep else [(blocks[0], blocks[-1])]
        prompts = []
        for first, last in spans:
            prompt = Prompt(options.tokens, structure, options.dropout, generator)
            first.add_module("prompt", prompt)
            first.register_forward_pre_hook(prompt.append)
            last.register_forward_hook(prompt.remove)
            prompts.append(prompt)
        return prompts

    def tunes(self, name: str) -> bool:
        """See `Method.tunes`."""
        return "prompt" in name.split(".")
