"""DoRA (Liu et al., arXiv 2402.09353) through the `peft` library: LoRA for a weight's direction, its magnitude apart.

    W' = m (W + s B A) / |W + s B A|    with the norm of each row, [out, in] by [out]

The norm is no part of the gradient, as in the paper's section 4.3. m starts as |W| and B at zero, so the model starts
as the backbone. The server averages m, A and B each for itself: the mean of the weights that clients trained is neither
the product's nor the quotient's, so the aggregate is further from it than LoRA's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fedpeft.adapters.payload import Tensors
from fedpeft.peft.method import PeftForm, methods
from fedpeft.peft.tuners.lora import A, B, LoraOptions, draw, lora_config, options_of
from fedpeft.peft.tuners.tuner import ADAPTER, Targets, Tuner

if TYPE_CHECKING:
    from peft import LoraConfig

NAME = "dora"
MAGNITUDE = "lora_magnitude_vector"
"""The library's name of m."""


class DoraOptions(LoraOptions):
    """Options of DoRA."""

    targets: Targets = "qkv"
    """Linear layers of the blocks, as shell patterns for the end of a layer's name, such as qkv, attn.*, mlp.fc?."""


@methods.register(NAME)
class Dora(Tuner[DoraOptions]):
    """Tunes A, B and the magnitude of every target layer."""

    Options = DoraOptions
    parameters = frozenset({A, B, MAGNITUDE})
    peft_form = PeftForm("LORA", "a DoRA", "a low-rank change with magnitudes", "dora", flag="use_dora")

    @property
    def targets(self) -> Targets:
        """See `Tuner.targets`."""
        return self.options.targets

    def config(self, layers: Sequence[str]) -> LoraConfig:
        """See `Tuner.config`."""
        return lora_config(self.options, layers, use_dora=True)

    @classmethod
    def from_peft_config(cls, config: Mapping[str, Any], targets: tuple[str, ...]) -> dict[str, object]:
        """See `Method.from_peft_config`."""
        return options_of(NAME, config, targets)

    def from_peft_state(self, state: Tensors) -> Tensors:
        """See `Method.from_peft_state`; the library's files name a magnitude without `weight`."""
        return {f"{name}.weight" if name.endswith(MAGNITUDE) else name: values for name, values in state.items()}

    def start(self, layer: nn.Module, generator: torch.Generator) -> None:
        """See `Tuner.start`; the library has set m, from B at zero."""
        draw(layer, generator)

    def merged(self, layer: Any, weight: torch.Tensor) -> torch.Tensor:
        """See `Tuner.merged`."""
        directed: torch.Tensor = weight + layer.get_delta_weight(ADAPTER)
        magnitude: torch.Tensor = layer.get_parameter(f"{MAGNITUDE}.{ADAPTER}.weight")
        factors: torch.Tensor = magnitude / torch.linalg.vector_norm(directed, dim=1)
        return directed * factors.unsqueeze(1)
