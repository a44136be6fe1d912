"""SSF (Lian et al., arXiv 2210.08823): a scale and a shift of each channel behind every layer.

    y becomes scale * y + shift, behind every linear layer, convolution and layer norm of the backbone.

In a ViT these are the patch embedding, norm1, qkv, proj, norm2, fc1, fc2 of each block, and the last norm. Scales start
at 1 and shifts at 0, so that the model starts as the backbone; the authors' code draws them from N(1, 0.02) and
N(0, 0.02), and does not. Both merge into the weight and the bias of the layer before them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from fedpeft.models.checkpoints import inside
from fedpeft.models.structure import ModelStructure
from fedpeft.peft.method import Method, MethodOptions, methods, unfit
from fedpeft.peft.places import is_norm

NAME = "ssf"
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class ScaleShift(nn.Module):
    """A scale and a shift, float32 [channels] each, of a layer's output.

    Attributes:
        extents: Dimensions of the output behind that of its channels: 0, or those of a convolution's positions.
    """

    def __init__(self, channels: int, extents: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels))
        self.shift = nn.Parameter(torch.zeros(channels))
        self.extents = extents

    def after(self, layer: nn.Module, args: tuple[object, ...], output: torch.Tensor) -> torch.Tensor:
        """Forward hook of a layer: scales and shifts its output."""
        shape = (-1, *[1] * self.extents)
        scale, shift = (values.to(output.dtype).view(shape) for values in (self.scale, self.shift))
        return output * scale + shift


@methods.register(NAME)
class Ssf(Method[MethodOptions]):
    """Tunes a scale and a shift behind every layer, the head aside."""

    def inject(self, module: nn.Module, structure: ModelStructure, generator: torch.Generator) -> Sequence[nn.Module]:
        """See `Method.inject`; `ssf` in each layer."""
        layers = [
            (name, layer)
            for name, layer in module.named_modules()
            if (isinstance(layer, LAYERS) or is_norm(layer)) and not inside(f"{name}.weight", structure.head)
        ]
        if not layers:
            raise unfit("ssf scales what linear layers, convolutions and norms return, and this model has none")
        added = []
        for _, layer in layers:
            weight = layer.get_parameter("weight")
            part = ScaleShift(weight.shape[0], max(0, weight.dim() - 2))
            layer.add_module(NAME, part)
            layer.register_forward_hook(part.after)
            added.append(part)
        return added

    def tunes(self, name: str) -> bool:
        """See `Method.tunes`."""
        return NAME in name.split(".")

    def plain(self, module: nn.Module) -> dict[str, torch.Tensor]:
        """See `Method.plain`; a shift behind a layer without a bias becomes one, which the plain model lacks."""
        whole = dict(module.state_dict())
        state = {name: tensor for name, tensor in whole.items() if not self.tunes(name)}
        for name, part in module.named_modules():
            if isinstance(part, ScaleShift):
                layer = name.rpartition(".")[0]
                scale, shift = whole[f"{name}.scale"], whole[f"{name}.shift"]
                weight, bias = state[f"{layer}.weight"], state.get(f"{layer}.bias")
                state[f"{layer}.weight"] = weight * scale.view(-1, *[1] * (weight.dim() - 1))
                if bias is not None or shift.any():
                    state[f"{layer}.bias"] = shift if bias is None else bias * scale + shift
        return state
