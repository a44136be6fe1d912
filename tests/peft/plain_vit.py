"""A ViT written out by hand, from a state dict: what methods are held against, none of whose code it has."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional

from fedpeft.config import ModelConfig
from fedpeft.models import backbones
from fedpeft.peft import TunedModel, tune

CONFIG = ModelConfig(name="vit_tiny_patch16_224", weights="none", image_size=32, depth=2, classes=("a", "b", "c"))
WIDTH, HIDDEN, HEADS, DEPTH = 192, 768, 3, 2
BASE, HEAD = "vit_base_patch16_224", {"head.weight": (100, 768), "head.bias": (100,)}
State = dict[str, torch.Tensor]


class PlainVit:
    """Maps images to logits with the tensors of a state dict; a test overrides the layer that a method changes."""

    def __init__(self, state: State) -> None:
        self.state = state

    def layer(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """A linear layer, the patch embedding or a norm."""
        weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        if weight.dim() == 4:
            return functional.conv2d(x, weight, bias, stride=16)
        if weight.dim() == 2:
            return x @ weight.T + bias
        return functional.layer_norm(x, (WIDTH,), weight, bias, 1e-6)

    def attention(self, name: str, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.layer(f"{name}.qkv", x).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (q, k, v))
        weights = (q @ k.transpose(-2, -1) / (WIDTH / HEADS) ** 0.5).softmax(-1)
        return self.layer(f"{name}.proj", (weights @ v).transpose(1, 2).flatten(2))

    def mlp(self, block: str, x: torch.Tensor) -> torch.Tensor:
        """The second half of a block without its residual, from what enters norm2."""
        hidden = functional.gelu(self.layer(f"{block}.mlp.fc1", self.layer(f"{block}.norm2", x)))
        return self.layer(f"{block}.mlp.fc2", hidden)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        patches = self.layer("patch_embed.proj", images).flatten(2).transpose(1, 2)
        x = torch.cat((self.state["cls_token"].expand(len(images), -1, -1), patches), 1) + self.state["pos_embed"]
        for block in (f"blocks.{number}" for number in range(DEPTH)):
            x = x + self.attention(f"{block}.attn", self.layer(f"{block}.norm1", x))
            x = x + self.mlp(block, x)
        return self.layer("head", self.layer("norm", x)[:, 0])


def moved(method: str, **options: object) -> tuple[TunedModel, State]:
    """Returns a tuned model whose tensors are all away from their start, and its state by canonical names."""
    model = tune(backbones.build(CONFIG, seed=3), method, options, 3)
    rng = np.random.default_rng(5)
    model.load({n: v + rng.normal(0, 0.1, v.shape).astype(np.float32) for n, v in model.state().items()})
    state = {model.method.canonical(name): tensor for name, tensor in model.module.state_dict().items()}
    return model, state


def images() -> torch.Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def close(model: TunedModel, plain: PlainVit, tolerance: float = 1e-5) -> bool:
    """Returns True if a tuned model and the plain one agree; checks that both differ from the backbone."""
    with torch.no_grad():
        found, expected = model.module(images()), plain(images())
        assert not torch.allclose(found, model.backbone.module(images()), 0, 1e-2)
        return torch.allclose(found, expected, 0, tolerance)
