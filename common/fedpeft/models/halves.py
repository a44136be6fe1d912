"""A model in two, one after the other: a front that training does not change, and a back with all that is tuned."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from timm.models import checkpoint_seq
from timm.models.vision_transformer import VisionTransformer
from torch import nn


@dataclass(frozen=True)
class Halves:
    """Two modules that share the parameters of a model: `back(front(values))` computes what `model(values)` does.

    Attributes:
        front: From the model's values to features, a tensor [n, ...].
        back: From features to what the model returns.
    """

    front: nn.Module
    back: nn.Module


def vit_halves(model: VisionTransformer, parts: int) -> Halves | None:
    """Returns timm's `VisionTransformer` in two; None if the model is of a class that computes otherwise.

    Args:
        model: The model.
        parts: Blocks in the front; one more than the model has: all but the head.
    """
    steps = ("forward", "forward_features", "pool", "forward_head")
    if any(getattr(type(model), each) is not getattr(VisionTransformer, each) for each in steps):
        return None
    return Halves(_VitFront(model, parts), _VitBack(model, parts))


class _VitHalf(nn.Module):
    def __init__(self, model: VisionTransformer, parts: int) -> None:
        super().__init__()
        self.model = model
        self.parts = parts

    @property
    def only_head_behind(self) -> bool:
        return self.parts > len(self.model.blocks)


class _VitFront(_VitHalf):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Returns tokens, float[n, tokens, width]; pooled, float[n, width], if only the head is behind."""
        model = self.model
        tokens = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
        tokens = model.blocks[: self.parts](tokens)
        features: torch.Tensor = tokens
        if self.only_head_behind:
            features = model.forward_head(model.norm(tokens), pre_logits=True)
        return features


class _VitBack(_VitHalf):
    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Returns logits, float[n, classes]."""
        model, blocks = self.model, self.model.blocks[self.parts :]
        if self.only_head_behind:
            logits: torch.Tensor = model.head(features)
            return logits
        tokens = checkpoint_seq(blocks, features) if model.grad_checkpointing and len(blocks) else blocks(features)
        return model.forward_head(model.norm(tokens))
