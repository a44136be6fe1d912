"""AdaptFormer (Chen et al., arXiv 2205.13535): a bottleneck beside each MLP, where `adapter` has one behind it.

    x + MLP(norm2(x))  becomes  x + MLP(norm2(x)) + scale * up(ReLU(down(x)))

The branch reads x before norm2, as the authors' code does by default for images; `norm = "in"` gives it a layer norm
of its own. Only `up` starts at zero, so that the model starts as the backbone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from timm.models.vision_transformer import ResPostBlock
from torch import nn

from fedpeft.models.structure import ModelStructure
from fedpeft.peft.method import Method, MethodOptions, methods, unfit

NAME = "adaptformer"
NORMS = ("norm2", "post_attention_layernorm", "layernorm_after", "ffn_norm", "ln_2")
"""Usual names of the norm that stands before a block's MLP."""
ENDS = ("drop_path2", "ls2")
"""Names of what timm's blocks send the MLP's output through: the branch is added behind it."""


class AdaptFormerOptions(MethodOptions):
    """Options of AdaptFormer."""

    width: Annotated[int, Field(ge=1, le=65_536)] = 64
    """Width of the bottleneck."""
    scale: Annotated[float, Field(gt=0, le=1000)] = 0.1
    """Factor of what the branch adds."""
    norm: Literal["none", "in"] = "none"
    """Layer norm of the branch's own before its bottleneck: none, or in."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the bottleneck's values dropped while training."""


class Branch(nn.Module):
    """down, ReLU, up and a scale, of what enters the norm before an MLP."""

    def __init__(self, tokens: int, options: AdaptFormerOptions, generator: torch.Generator) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(tokens) if options.norm == "in" else None
        self.down = nn.Linear(tokens, options.width)
        self.up = nn.Linear(options.width, tokens)
        self.dropout = nn.Dropout(options.dropout)
        self.scale = options.scale
        self._entered: torch.Tensor | None = None
        with torch.no_grad():
            nn.init.kaiming_uniform_(self.down.weight, a=5**0.5, generator=generator)
            for start in (self.down.bias, self.up.weight, self.up.bias):
                start.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps float [..., tokens] to the same shape."""
        normed = x if self.norm is None else self.norm(x)
        hidden = self.dropout(nn.functional.relu(self.down(normed)))
        added: torch.Tensor = self.up(hidden) * self.scale
        return added

    def enter(self, norm: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook of the norm before an MLP: keeps what enters it."""
        self._entered = args[0]

    def add(self, part: nn.Module, args: tuple[object, ...], output: torch.Tensor) -> torch.Tensor:
        """Forward hook of the MLP, or of what its output passes: adds the branch to it."""
        x, self._entered = self._entered, None
        assert x is not None, "the MLP ran before its norm"
        branch: torch.Tensor = self(x)
        return output + branch


@methods.register(NAME)
class AdaptFormer(Method[AdaptFormerOptions]):
    """Tunes one branch in each block."""

    Options = AdaptFormerOptions
    needs = ("mlps",)

    def inject(self, module: nn.Module, structure: ModelStructure, generator: torch.Generator) -> Sequence[nn.Module]:
        """See `Method.inject`; `adaptformer` in each block."""
        branches = []
        for (name, block), mlp in zip(structure.blocks.items(), structure.mlps, strict=True):
            parts = dict(block.named_children())
            norm = next((parts[each] for each in NORMS if each in parts), None)
            if norm is None or isinstance(block, ResPostBlock):
                raise unfit(
                    f"adaptformer reads what enters the norm before a block's MLP, and {name} has none there; "
                    f"known names of it are {', '.join(NORMS)}"
                )
            branch = Branch(structure.width, self.options, generator)
            block.add_module(NAME, branch)
            norm.register_forward_pre_hook(branch.enter)
            next((parts[each] for each in ENDS if each in parts), mlp).register_forward_hook(branch.add)
            branches.append(branch)
        return branches

    def tunes(self, name: str) -> bool:
        """See `Method.tunes`."""
        return NAME in name.split(".")
