"""Partial fine-tuning: the last blocks and the norm behind them."""

import pytest
import torch

from fedpeft.config import ModelConfig
from fedpeft.errors import ConfigInvalid
from fedpeft.models import backbones
from fedpeft.peft import count, spec_of, timm_spec, tune

from .plain_vit import BASE, CONFIG, HEAD

BLOCK = {
    "norm1": (768,),
    "attn.qkv": (2304, 768),
    "attn.proj": (768, 768),
    "norm2": (768,),
    "mlp.fc1": (3072, 768),
    "mlp.fc2": (768, 3072),
}
ONE = 12 * 768**2 + 13 * 768  # weights 3D^2 + D^2 + 8D^2; biases 3D + D + 4D + D, norms 4D


@pytest.mark.parametrize("blocks", [1, 2, 12])
def test_counts_and_shapes_of_vit_b(blocks: int) -> None:
    assert count(BASE, "partial", {"blocks": blocks}, 100) == blocks * ONE + 1_536 + 76_900
    expected = HEAD | {"norm.weight": (768,), "norm.bias": (768,)}
    for number in range(12 - blocks, 12):
        expected |= {f"blocks.{number}.{layer}.weight": shape for layer, shape in BLOCK.items()}
        expected |= {f"blocks.{number}.{layer}.bias": shape[:1] for layer, shape in BLOCK.items()}
    assert {t.name: t.shape for t in timm_spec(BASE, "partial", {"blocks": blocks}, 100).tensors} == expected


def test_only_norms_behind_the_last_block_are_tuned() -> None:
    model = ModelConfig(name="vit_base_patch16_clip_224", weights="none", pooling="avg", classes=("a", "b"))
    names = {tensor.name for tensor in spec_of(model, "partial", {}).tensors}
    assert "norm.weight" in names and not any(name.startswith(("norm_pre", "blocks.10.")) for name in names)


def test_more_blocks_than_there_are_is_a_fault_of_the_option() -> None:
    with pytest.raises(ConfigInvalid, match=r"peft\.blocks: is 13; the model has 12 blocks") as caught:
        count(BASE, "partial", {"blocks": 13}, 100)
    assert [field for field, _ in caught.value.fields] == ["peft.blocks"]


def test_frozen_blocks_have_no_gradient_and_stay_in_evaluation_mode() -> None:
    model = tune(backbones.build(CONFIG, seed=3), "partial", {}, 3)
    model.train()
    model.module(torch.randn(1, 3, 32, 32)).sum().backward()
    found = {name.rsplit(".", 2)[0] for name, p in model.module.named_parameters() if p.grad is not None}
    assert found and all(name.startswith(("blocks.1", "norm", "head")) for name in found)
    assert [model.module.get_submodule(f"blocks.{i}").training for i in range(2)] == [False, True]
