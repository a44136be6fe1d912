"""Models in two: their halves one after the other compute what the whole does, to its bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer

from fedpeft.models.families import VisionTransformers
from fedpeft.models.halves import vit_halves

BLOCKS = 3
KINDS: dict[str, dict[str, Any]] = {
    "class token": {},
    "average, norm behind": {"global_pool": "avg"},
    "registers": {"reg_tokens": 2, "no_embed_class": True, "init_values": 1e-5},
    "norm before": {"pre_norm": True},
    "attention pooling": {"global_pool": "map", "class_token": False},
}


def vit(**options: Any) -> VisionTransformer:
    torch.manual_seed(0)
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": BLOCKS, "num_heads": 2, "num_classes": 4}
    return VisionTransformer(**size, **options).eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parts", range(1, BLOCKS + 2))
def test_the_halves_compute_what_the_model_does(kind: str, parts: int) -> None:
    model, images = vit(**KINDS[kind]), torch.randn(5, 3, 32, 32)
    halves = vit_halves(model, parts)
    assert halves is not None
    features = halves.front(images)
    assert torch.equal(halves.back(features), model(images))
    model.set_grad_checkpointing(True)
    checkpointed = halves.back(features)
    assert torch.equal(checkpointed, model(images))
    gradient = {}
    for name, logits in (("halves", checkpointed), ("model", model(images))):
        model.zero_grad()
        logits.square().sum().backward()  # type: ignore[no-untyped-call]
        gradient[name] = model.head.weight.grad.clone()
    assert torch.equal(gradient["halves"], gradient["model"])


def test_parts_are_blocks_in_order_then_what_is_behind_them_then_the_head() -> None:
    structure = VisionTransformers().structure(vit())
    names = ["pos_embed", "patch_embed.proj.weight", "blocks.0.norm1.weight", "blocks.2.mlp.fc1.bias", "norm.weight"]
    assert [structure.parts_before(name) for name in [*names, "head.weight"]] == [0, 0, 0, 2, 3, 4]
    assert structure.parts_before("headstrong.weight") == 0, "of no part"


def test_a_model_that_computes_otherwise_is_not_divided() -> None:
    model = VisionTransformerDistilled(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=4)
    assert vit_halves(model, 1) is None
