"""SSF: a scale and a shift behind every layer, which merge."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fedpeft.config import ModelConfig
from fedpeft.errors import ConfigInvalid
from fedpeft.export import formats
from fedpeft.models import backbones
from fedpeft.peft import count, timm_spec, tune

from .plain_vit import BASE, CONFIG, HEAD, PlainVit, close, images, moved

BLOCK = {"norm1": 768, "attn.qkv": 2304, "attn.proj": 768, "norm2": 768, "mlp.fc1": 3072, "mlp.fc2": 768}


class Scaled(PlainVit):
    def layer(self, name: str, x: torch.Tensor) -> torch.Tensor:
        y = super().layer(name, x)
        if name == "head":
            return y
        scale, shift = self.state[f"{name}.ssf.scale"], self.state[f"{name}.ssf.shift"]
        if name == "patch_embed.proj":
            return torch.einsum("bchw,c->bchw", y, scale) + shift[:, None, None]
        return y * scale + shift


def test_counts_and_shapes_of_vit_b() -> None:
    assert count(BASE, "ssf", {}, 100) == 205_824 + 76_900
    sizes = {"patch_embed.proj": 768, "norm": 768}
    sizes |= {f"blocks.{i}.{layer}": size for i in range(12) for layer, size in BLOCK.items()}
    expected = HEAD | {f"{name}.ssf.{part}": (n,) for name, n in sizes.items() for part in ("scale", "shift")}
    assert {t.name: t.shape for t in timm_spec(BASE, "ssf", {}, 100).tensors} == expected


def test_equals_the_formula_written_out() -> None:
    model, state = moved("ssf")
    assert close(model, Scaled(state))


def test_starts_at_one_and_zero_whatever_the_seed() -> None:
    for name, values in tune(backbones.build(CONFIG, 3), "ssf", {}, 8).state().items():
        assert name.startswith("head.") or (values == name.endswith("scale")).all()


def test_merges_into_the_plain_model(tmp_path: Path) -> None:
    model, _ = moved("ssf")
    formats.as_timm(model, tmp_path / "model.safetensors")
    assert close(model, PlainVit(load_file(tmp_path / "model.safetensors")))
    assert load_file(tmp_path / "model.safetensors").keys() == model.backbone.module.state_dict().keys()


def test_a_shift_behind_a_layer_without_a_bias_does_not_merge() -> None:
    config = CONFIG.model_copy(update={"name": "vit_base_patch16_clip_224", "depth": 1})
    model = tune(backbones.build(ModelConfig.model_validate(config.model_dump()), 3), "ssf", {}, 3)
    assert torch.equal(formats.timm_model(model)(images()), model.module(images()))
    model.load({name: values + 1 for name, values in model.state().items()})
    with pytest.raises(ConfigInvalid, match="ssf has no plain timm form"):
        formats.timm_model(model)
