"""LoRA (Hu et al., arXiv 2106.09685) through the `peft` library: W x + (alpha / rank) B A x.

A starts Kaiming-uniform and B at zero, so the model starts as the backbone. On timm's fused qkv one A of [rank, width]
serves query, key and value, with one B of [3 width, rank].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field
from torch import nn

from fedpeft.errors import ConfigInvalid
from fedpeft.peft.method import MethodOptions, PeftForm, methods
from fedpeft.peft.tuner import ADAPTER, Targets, Tuner

if TYPE_CHECKING:
    from peft import LoraConfig

NAME = "lora"
A, B = "lora_A", "lora_B"
"""The library's names of the two factors."""
_VARIANTS = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern")
"""Keys of the library's configuration that make something else of a LoRA."""


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
    peft_form = PeftForm("LORA", "a LoRA", "a low-rank change", "lora")

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

    @classmethod
    def from_peft_config(cls, config: Mapping[str, Any], targets: tuple[str, ...]) -> dict[str, object]:
        """See `Method.from_peft_config`."""
        if missing := sorted({"r", "lora_alpha"} - config.keys()):
            raise ConfigInvalid(f"has no {missing[0]}, which every LoRA has")
        other = [key for key in _VARIANTS if config.get(key)]
        if config.get("bias", "none") != "none":
            other.append("bias")
        if other:
            raise ConfigInvalid(f"uses {', '.join(other)}, which method {NAME} does not have")
        dropout = config.get("lora_dropout", 0.0)
        return {"rank": config["r"], "alpha": config["lora_alpha"], "dropout": dropout, "targets": targets}

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
