"""(IA)^3 (Liu et al., arXiv 2205.05638): learned factors of keys, of values and of the MLP's hidden values.

    softmax(Q (l_k * K)^T) (l_v * V)    and    W2 (l_ff * act(W1 x))

The `peft` library has it for whole layers, where a fused qkv would have its queries scaled too; here they stay as they
are. All factors start at 1 and merge: l_k and l_v into rows of the projections, l_ff into columns of W2. The export to
that library gives queries the factor 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from fedpeft.adapters.payload import Tensors
from fedpeft.errors import ConfigInvalid
from fedpeft.models.structure import ModelStructure
from fedpeft.peft.method import Method, MethodOptions, PeftForm, methods, unfit
from fedpeft.peft.places import FUSED, KEYS, VALUES, fused, linear_layers

if TYPE_CHECKING:
    from peft import IA3Config

NAME = "ia3"
LIBRARY = "ia3_l"
"""The library's name of a layer's factors."""


@dataclass(frozen=True)
class Place:
    """A linear layer with learned factors.

    Attributes:
        layer: Its name.
        module: The layer.
        parts: Name and size of each part of its channels, in order; without a name it has no factors.
        before: True if the layer's input is scaled, else its output.
    """

    layer: str
    module: nn.Linear
    parts: tuple[tuple[str, int], ...]
    before: bool = False


class Rescale(nn.Module):
    """Learned factors, float32, of the parts of a layer's input or output that have a name."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.parts, self.before = place.parts, place.before
        for name, size in place.parts:
            if name:
                self.register_parameter(name, nn.Parameter(torch.ones(size)))

    def factors(self) -> torch.Tensor:
        """Returns a factor for each channel, 1 where none is learned."""
        device = next(self.parameters()).device
        parts = [getattr(self, n) if n else torch.ones(size, device=device) for n, size in self.parts]
        return torch.cat(parts)

    def enter(self, layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Forward pre-hook of a layer: scales its input."""
        return (args[0] * self.factors().to(args[0].dtype), *args[1:])

    def after(self, layer: nn.Module, args: tuple[object, ...], output: torch.Tensor) -> torch.Tensor:
        """Forward hook of a layer: scales its output."""
        return output * self.factors().to(output.dtype)


@methods.register(NAME)
class Ia3(Method[MethodOptions]):
    """Tunes the factors of keys, values and hidden values of each block."""

    needs = ("blocks", "mlps")
    peft_form = PeftForm("IA3", "an (IA)^3 adapter", "factors of keys, values and hidden values", "ia3")
    _places: tuple[Place, ...] = ()

    def inject(self, module: nn.Module, structure: ModelStructure, generator: torch.Generator) -> Sequence[nn.Module]:
        """See `Method.inject`; `ia3` in each layer."""
        self._places = tuple(places(structure))
        added = []
        for place in self._places:
            part = Rescale(place)
            place.module.add_module(NAME, part)
            if place.before:
                place.module.register_forward_pre_hook(part.enter)
            else:
                place.module.register_forward_hook(part.after)
            added.append(part)
        return added

    def tunes(self, name: str) -> bool:
        """See `Method.tunes`."""
        return NAME in name.split(".")

    def plain(self, module: nn.Module) -> dict[str, torch.Tensor]:
        """See `Method.plain`."""
        state = {name: tensor for name, tensor in module.state_dict().items() if not self.tunes(name)}
        for name, part in module.named_modules():
            if isinstance(part, Rescale):
                layer, factors = name.rpartition(".")[0], part.factors().detach()
                state[f"{layer}.weight"] = state[f"{layer}.weight"] * (factors if part.before else factors[:, None])
                if not part.before and f"{layer}.bias" in state:
                    state[f"{layer}.bias"] = state[f"{layer}.bias"] * factors
        return state

    def peft_config(self, module: nn.Module, structure: ModelStructure) -> IA3Config:
        """See `Method.peft_config`."""
        from peft import IA3Config

        found = list(places(structure))
        return IA3Config(
            target_modules=[place.layer for place in found],
            feedforward_modules=[place.layer for place in found if place.before],
        )

    def peft_state(self, state: Tensors) -> Tensors:
        """See `Method.peft_state`."""
        found = {name: values for name, values in state.items() if not self.tunes(name)}
        for place in self._places:
            factors = [state[f"{place.layer}.{NAME}.{n}"] if n else np.ones(s, np.float32) for n, s in place.parts]
            found[f"{place.layer}.{LIBRARY}"] = np.concatenate(factors).reshape((1, -1) if place.before else (-1, 1))
        return found

    @classmethod
    def from_peft_config(cls, config: Mapping[str, Any], targets: tuple[str, ...]) -> dict[str, object]:
        """See `Method.from_peft_config`; which layers it wraps, `from_peft_state` sees."""
        return {}

    def from_peft_state(self, state: Tensors) -> Tensors:
        """See `Method.from_peft_state`."""
        found = dict(state)
        for place in self._places:
            name = f"{place.layer}.{LIBRARY}"
            values, size = found.pop(name, None), sum(size for _, size in place.parts)
            shape = (1, size) if place.before else (size, 1)
            if values is None or values.shape != shape:
                has = "is missing" if values is None else f"is {values.shape}"
                raise ConfigInvalid(f"does not fit method {NAME}: {name} {has}; it needs {shape}")
            flat, start = values.ravel(), 0
            for part, size in place.parts:
                own, start = flat[start : start + size], start + size
                if part:
                    found[f"{place.layer}.{NAME}.{part}"] = own
                elif (own != 1).any():
                    raise ConfigInvalid(f"scales the queries of {place.layer}, which method {NAME} does not")
        return found


def places(structure: ModelStructure) -> Iterator[Place]:
    """Yields the layers that are scaled, in the order of the blocks.

    Raises:
        ConfigInvalid: If a block has no keys and values, or its MLP no linear layer, under a known name.
    """
    for (block, part), mlp in zip(structure.blocks.items(), structure.mlps, strict=True):
        names = {layer: f"{block}.{name}" for name, layer in linear_layers(part).items()}
        hidden = list(linear_layers(mlp).values())
        found = [place for layer, name in names.items() if layer not in hidden for place in _attention(name, layer)]
        if not hidden or sorted(n for place in found for n, _ in place.parts if n) != ["k", "v"]:
            known = f"named {FUSED}, or {', '.join(KEYS)} and {', '.join(VALUES)}"
            raise unfit(f"ia3 scales keys, values and an MLP's hidden values; {block} has no linear layers {known}")
        yield from found
        yield Place(names[hidden[-1]], hidden[-1], (("hidden", hidden[-1].in_features),), before=True)


def _attention(name: str, layer: nn.Linear) -> list[Place]:
    """Returns the place of a layer that makes keys or values, or both; none for any other."""
    end, size = name.rpartition(".")[2], layer.out_features
    if fused(name, layer):
        return [Place(name, layer, (("", size // 3), ("k", size // 3), ("v", size // 3)))]
    part = "k" if end in KEYS else "v" if end in VALUES else ""
    return [Place(name, layer, ((part, size),))] if part else []
