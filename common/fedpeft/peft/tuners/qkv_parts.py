"""LoRA on the queries, the keys or the values of a fused qkv layer, each with its own A and B.

The `peft` library takes such a layer as a whole, with one A for all three.

One part W_p of the layer's rows becomes W_p + (alpha / rank) B_p A_p with B_p of [width, rank] and A_p of [rank,
width]; the other parts keep their outputs, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedpeft.adapters.payload import Tensors
from fedpeft.models.structure import ModelStructure
from fedpeft.peft.method import unfit
from fedpeft.peft.places import fused
from fedpeft.peft.tuners.tuner import Targets, fitting, linear_layers_of, target_layers

PARTS = ("q", "k", "v")
"""Queries, keys and values, in the order of the layer's rows."""
NAME = "parts"
"""Name of what is added to a fused layer; a part's A is `blocks.0.attn.qkv.parts.q.lora_A.weight`."""

Parts = Mapping[str, tuple[str, ...]]
"""Parts by the name of their fused layer, in the model's order."""


def split(structure: ModelStructure, targets: Targets) -> tuple[tuple[str, ...], Parts]:
    """Splits targets into those of whole layers and those of parts: a pattern that fits no layer may fit parts.

    Returns:
        The patterns of whole layers, and the parts.

    Raises:
        ConfigInvalid: If a layer is a target as a whole and in part, or a pattern fits nothing.
    """
    layers = linear_layers_of(structure)
    known = [f"{name}.{part}" for name, layer in layers.items() if fused(name, layer) for part in PARTS]
    patterns = (targets,) if isinstance(targets, str) else targets
    in_part = {p: fits for p in patterns if not fitting(p, layers) and (fits := fitting(p, known))}
    whole = tuple(pattern for pattern in patterns if pattern not in in_part)
    parts: dict[str, tuple[str, ...]] = {}
    for name in known:
        if any(name in fits for fits in in_part.values()):
            layer, _, part = name.rpartition(".")
            parts[layer] = (*parts.get(layer, ()), part)
    if twice := parts.keys() & set(target_layers(structure, whole) if whole else ()):
        raise unfit(f"name {min(twice)} as a whole and in part", "targets")
    return whole, parts


class LowRank(nn.Module):
    """(alpha / rank) B A x of one part."""

    def __init__(self, width: int, rank: int, scale: float, dropout: float, generator: torch.Generator) -> None:
        super().__init__()
        self.lora_A = nn.Linear(width, rank, bias=False)
        self.lora_B = nn.Linear(rank, width, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.scale = scale
        with torch.no_grad():
            nn.init.kaiming_uniform_(self.lora_A.weight, a=5**0.5, generator=generator)
            self.lora_B.weight.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps float [..., width] to the same shape."""
        changed: torch.Tensor = self.lora_B(self.lora_A(self.dropout(x))) * self.scale
        return changed


class QkvParts(nn.Module):
    """LoRA of the chosen parts of one fused layer, each a module named q, k or v."""

    def __init__(self, parts: Mapping[str, LowRank]) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)

    def after(self, layer: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        """Forward hook of the fused layer: float [..., 3 width], of which the chosen thirds are changed."""
        chosen, thirds = dict(self.named_children()), zip(PARTS, output.chunk(3, -1), strict=True)
        return torch.cat([t + chosen[n](args[0]).to(t.dtype) if n in chosen else t for n, t in thirds], -1)

    def merged(self, weight: torch.Tensor) -> torch.Tensor:
        """Returns the fused layer's weight, float [3 width, width], with the changes added."""
        thirds = dict(zip(PARTS, weight.chunk(3), strict=True))
        for name, part in self.named_children():
            assert isinstance(part, LowRank)
            thirds[name] = thirds[name] + part.scale * part.lora_B.weight @ part.lora_A.weight
        return torch.cat([thirds[name] for name in PARTS])


def whole_factors(state: Tensors, layer: str, parts: Sequence[str]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Returns A and B of the whole layer that do the same: those of its parts stacked, and diagonal in blocks.

    Args:
        state: Holds A and B of each part.
        layer: The fused layer's name.
        parts: Its parts, in the order of the rows.

    Returns:
        A of [parts x rank, width] and B of [3 width, parts x rank].
    """
    downs = [state[f"{layer}.{NAME}.{part}.lora_A.weight"] for part in parts]
    ups = [state[f"{layer}.{NAME}.{part}.lora_B.weight"] for part in parts]
    width, rank = ups[0].shape
    up = np.zeros((len(PARTS) * width, len(parts) * rank), np.float32)
    for column, (part, values) in enumerate(zip(parts, ups, strict=True)):
        row = PARTS.index(part)
        up[row * width : (row + 1) * width, column * rank : (column + 1) * rank] = values
    return np.concatenate(downs), up
