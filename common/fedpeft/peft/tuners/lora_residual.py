"""LoRA with a residual that the server derives: W x + (alpha / rank) (B A + U V) x, of which clients train A and B.

U V, of rank `residual_rank` at most, takes up what a product of A and B cannot hold: the part of the clients' mean that
is not the product of their mean factors (strategy `fedex_lora`), or all that they learned in earlier rounds (`flora`).
It begins at zero, comes with each version, and is in no update. A version has it whole, so that a client that comes
late needs nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import nn

from fedpeft.adapters.payload import Tensors
from fedpeft.adapters.spec import TensorRole
from fedpeft.models.structure import ModelStructure
from fedpeft.peft.method import methods, unfit
from fedpeft.peft.tuners.lora import A, B, Lora, LoraOptions, is_factor, lora_config
from fedpeft.peft.tuners.qkv_parts import split

if TYPE_CHECKING:
    from peft import LoraConfig

NAME = "residual"
"""Name of what is added to a layer; its factors are `blocks.0.attn.qkv.residual.down` and `.up`."""


class LoraResidualOptions(LoraOptions):
    """Options of LoRA with a residual."""

    residual_rank: Annotated[int, Field(ge=1, le=4096)] = 64
    """Largest rank of the residual; with the smaller side of a layer nothing is ever left out."""


class Residual(nn.Module):
    """scale U V x, beside a layer."""

    def __init__(self, layer: nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        rank = min(rank, layer.in_features, layer.out_features)
        self.down = nn.Parameter(torch.zeros(rank, layer.in_features))
        self.up = nn.Parameter(torch.zeros(layer.out_features, rank))
        self.scale = scale

    def after(self, layer: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        """Forward hook of the layer."""
        changed = nn.functional.linear(nn.functional.linear(args[0], self.down), self.up) * self.scale
        return output + changed.to(output.dtype)


@methods.register("lora_residual")
class LoraResidual(Lora):
    """Tunes A and B of every target layer, beside a residual."""

    Options = LoraResidualOptions
    options: LoraResidualOptions
    parameters = frozenset({A, B, NAME})

    def roles(self, name: str) -> tuple[TensorRole, ...]:
        """See `Method.roles`."""
        return (TensorRole.DERIVED,) if is_factor(name, NAME) else (TensorRole.SENT,)

    def inject(self, module: nn.Module, structure: ModelStructure, generator: torch.Generator) -> Sequence[nn.Module]:
        """See `Tuner.inject`."""
        if split(structure, self.targets)[1]:
            raise unfit("names parts of a layer; the residual is that of whole layers", "targets")
        added = list(super().inject(module, structure, generator))
        scale = self.options.alpha / self.options.rank
        for layer in added:
            residual = Residual(layer.get_submodule("base_layer"), self.options.residual_rank, scale)  # type: ignore[arg-type]
            layer.add_module(NAME, residual)
            layer.register_forward_hook(residual.after)
        return added

    def merged(self, layer: Any, weight: torch.Tensor) -> torch.Tensor:
        """See `Tuner.merged`."""
        part: Residual = layer.residual
        return super().merged(layer, weight) + part.scale * part.up @ part.down

    def peft_config(self, module: nn.Module, structure: ModelStructure) -> LoraConfig:
        """See `Method.peft_config`; one LoRA of both ranks, at the same scale."""
        whole = self.options.rank + self.options.residual_rank
        alpha = self.options.alpha / self.options.rank * whole
        return lora_config(self.options.model_copy(update={"rank": whole, "alpha": alpha}), self.layers(structure))

    def peft_state(self, state: Tensors) -> Tensors:
        """See `Method.peft_state`; the residual's factors below A and beside B, and zeros where it has no such rank."""
        found = {name: values for name, values in state.items() if not is_factor(name, NAME)}
        for name in [name for name in found if is_factor(name, A)]:
            layer = name.removesuffix(f".{A}.weight")
            down, up = state[f"{layer}.{NAME}.down"], state[f"{layer}.{NAME}.up"]
            more = self.options.residual_rank - len(down)
            found[name] = np.concatenate([found[name], np.pad(down, ((0, more), (0, 0)))])
            b = f"{layer}.{B}.weight"
            found[b] = np.concatenate([found[b], np.pad(up, ((0, 0), (0, more)))], axis=1)
        return found

    def from_peft_state(self, state: Tensors) -> Tensors:
        """See `Method.from_peft_state`; a LoRA without a residual."""
        found = dict(state)
        for name in [name for name in state if is_factor(name, A)]:
            layer = name.removesuffix(f".{A}.weight")
            inputs, out = state[name].shape[1], state[f"{layer}.{B}.weight"].shape[0]
            rank = min(self.options.residual_rank, inputs, out)
            found[f"{layer}.{NAME}.down"] = np.zeros((rank, inputs), np.float32)
            found[f"{layer}.{NAME}.up"] = np.zeros((out, rank), np.float32)
        return found
