"""The places of a model that PEFT methods and the head's initial values look for."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

State = dict[str, torch.Tensor]
"""Tensors of a model or a checkpoint by name."""


@dataclass(frozen=True)
class ModelStructure:
    """Places where PEFT methods attach. A model without blocks can be tuned by full, head and bias.

    Attributes:
        head: Name of the module that is always tuned and begins with fresh values, a linear layer; empty for none.
        blocks: The transformer blocks by name, in order; each maps float [batch, tokens, width] to the same shape.
        mlps: The MLP of each block; the same shapes.
        width: Size of a token.
        patch_values: Input values under one patch: channels x height x width. Prompts start smaller where it is larger.
        behind: Names of the modules between the last block and the head.
    """

    head: str = ""
    blocks: dict[str, nn.Module] = field(default_factory=dict)
    mlps: tuple[nn.Module, ...] = ()
    width: int = 0
    patch_values: int = 0
    behind: tuple[str, ...] = ()

    def parts_before(self, name: str) -> int:
        """Returns how many parts of the model are computed before a parameter is used, as far as is known.

        The parts are each block in order, all that is behind the last one, and the head. A parameter of none of them
        may be used at the beginning: 0.
        """
        parts = [(block,) for block in self.blocks] + [self.behind, (self.head,)]
        within = (at for at, names in enumerate(parts) if name.startswith(tuple(f"{each}." for each in names if each)))
        return next(within, 0)
