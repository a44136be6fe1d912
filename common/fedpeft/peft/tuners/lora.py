"""LoRA (Hu et al., arXiv 2106.09685) through the `peft` library: W x + (alpha / rank) B A x.

A starts Kaiming-uniform and B at zero, so the model starts as the backbone. On timm's fused qkv one A of [rank, width]
serves query, key and value, with one B of [3 width, rank]. The targets qkv.q, qkv.k and qkv.v are its parts, each with
an A and a B of its own (`qkv_parts`); in a folder of the library they are one LoRA of the whole layer, whose rank is
that of its parts together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field
from torch import nn

from fedpeft.adapters.payload import Tensors
from fedpeft.errors import ConfigInvalid
from fedpeft.models.structure import ModelStructure
from fedpeft.peft.method import MethodOptions, PeftForm, methods
from fedpeft.peft.tuners.qkv_parts import NAME as PARTS_NAME
from fedpeft.peft.tuners.qkv_parts import LowRank, Parts, QkvParts, split, whole_factors
from fedpeft.peft.tuners.tuner import ADAPTER, Targets, Tuner, target_layers

if TYPE_CHECKING:
    from peft import LoraConfig, PeftConfig

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
    """Linear layers of the blocks, as shell patterns for the end of a layer's name, such as qkv, attn.*, mlp.fc?, or
    parts of a fused one: qkv.q, qkv.k, qkv.v."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of a layer's input dropped on its way to A while training."""


def lora_config(options: LoraOptions, layers: Sequence[str], times: int = 1, **more: Any) -> LoraConfig:
    """Returns the library's configuration for target layers of these names, of `times` the rank at the same scale."""
    from peft import LoraConfig

    return LoraConfig(
        r=times * options.rank,
        lora_alpha=times * options.alpha,  # type: ignore[arg-type]  # only ever divided by the rank
        lora_dropout=options.dropout,
        target_modules=list(layers),
        bias="none",
        **more,
    )


def options_of(method: str, config: Mapping[str, Any], targets: tuple[str, ...]) -> dict[str, object]:
    """Returns the options of a method, LoRA or one with its options, of a configuration of the library.

    Raises:
        ConfigInvalid: If it is of something else.
    """
    if missing := sorted({"r", "lora_alpha"} - config.keys()):
        raise ConfigInvalid(f"has no {missing[0]}, which every LoRA has")
    form = methods.get(method).peft_form
    other = [key for key in _VARIANTS if config.get(key) and form and key != form.flag]
    if config.get("bias", "none") != "none":
        other.append("bias")
    if other:
        raise ConfigInvalid(f"uses {', '.join(other)}, which method {method} does not have")
    dropout = config.get("lora_dropout", 0.0)
    return {"rank": config["r"], "alpha": config["lora_alpha"], "dropout": dropout, "targets": targets}


def draw(layer: nn.Module, generator: torch.Generator) -> None:
    """Sets the initial factors of a layer that the library wrapped: A Kaiming-uniform, B zero."""
    down, up = (layer.get_parameter(f"{factor}.{ADAPTER}.weight") for factor in (A, B))
    start = torch.empty(down.shape)
    nn.init.kaiming_uniform_(start, a=5**0.5, generator=generator)
    down.copy_(start)
    up.zero_()


@methods.register(NAME)
class Lora(Tuner[LoraOptions]):
    """Tunes A and B beside every target layer."""

    Options = LoraOptions
    parameters = frozenset({A, B})
    peft_form = PeftForm("LORA", "a LoRA", "a low-rank change", "lora")
    _parts: Parts = MappingProxyType({})

    @property
    def targets(self) -> Targets:
        """See `Tuner.targets`."""
        return self.options.targets

    def layers(self, structure: ModelStructure) -> list[str]:
        """See `Tuner.layers`; those that are targets as a whole."""
        whole, parts = split(structure, self.targets)
        return [] if parts and not whole else target_layers(structure, whole)

    def config(self, layers: Sequence[str]) -> LoraConfig:
        """See `Tuner.config`."""
        return lora_config(self.options, layers)

    def inject(self, module: nn.Module, structure: ModelStructure, generator: torch.Generator) -> Sequence[nn.Module]:
        """See `Tuner.inject`; `parts` in each fused layer that is a target in part."""
        _, self._parts = split(structure, self.targets)
        options, added = self.options, list(super().inject(module, structure, generator))
        for name, parts in self._parts.items():
            layer = module.get_submodule(name)
            width, scale = layer.get_parameter("weight").shape[1], options.alpha / options.rank
            part = QkvParts({p: LowRank(width, options.rank, scale, options.dropout, generator) for p in parts})
            layer.add_module(PARTS_NAME, part)
            layer.register_forward_hook(part.after)
            added.append(part)
        return added

    def plain(self, module: nn.Module) -> dict[str, torch.Tensor]:
        """See `Method.plain`."""
        state = super().plain(module)
        for name, part in module.named_modules():
            if isinstance(part, QkvParts):
                weight = f"{name.rpartition('.')[0]}.weight"
                state[weight] = part.merged(state[weight]).detach()
        return state

    def peft_config(self, module: nn.Module, structure: ModelStructure) -> PeftConfig:
        """See `Method.peft_config`."""
        whole, parts = split(structure, self.targets)
        sizes = {len(each) for each in parts.values()}
        if not parts:
            return super().peft_config(module, structure)
        if whole or len(sizes) > 1:
            raise ConfigInvalid(
                "parts of qkv beside whole layers, or more of them in one block than in another, have no peft form; "
                "keep the adapter file (safetensors) itself"
            )
        return lora_config(self.options, list(parts), sizes.pop())

    def peft_state(self, state: Tensors) -> Tensors:
        """See `Method.peft_state`."""
        found = {name: values for name, values in state.items() if PARTS_NAME not in name.split(".")}
        for layer, parts in self._parts.items():
            found[f"{layer}.{A}.weight"], found[f"{layer}.{B}.weight"] = whole_factors(state, layer, parts)
        return found

    @classmethod
    def from_peft_config(cls, config: Mapping[str, Any], targets: tuple[str, ...]) -> dict[str, object]:
        """See `Method.from_peft_config`."""
        return options_of(NAME, config, targets)

    def start(self, layer: nn.Module, generator: torch.Generator) -> None:
        """See `Tuner.start`."""
        draw(layer, generator)


def is_factor(name: str, factor: str) -> bool:
    """Returns whether a canonical name is that of a factor, A or B, of some layer."""
    return factor in name.split(".")
