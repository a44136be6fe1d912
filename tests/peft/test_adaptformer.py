"""AdaptFormer: a branch beside each MLP, from what enters the norm before it."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from fedpeft.config import ModelConfig
from fedpeft.errors import ConfigInvalid
from fedpeft.export import formats
from fedpeft.models import backbones
from fedpeft.peft import count, spec_of, timm_spec, tune

from .plain_vit import BASE, CONFIG, HEAD, WIDTH, PlainVit, close, images, moved

BOTTLENECK = {"down.weight": (64, 768), "down.bias": (64,), "up.weight": (768, 64), "up.bias": (768,)}
NORM = {"norm.weight": (768,), "norm.bias": (768,)}


class Beside(PlainVit):
    def mlp(self, block: str, x: torch.Tensor) -> torch.Tensor:
        down, up, norm = ({p: self.state.get(f"{block}.adaptformer.{n}.{p}") for p in ("weight", "bias")} for n in
                          ("down", "up", "norm"))  # fmt: skip
        read = x if norm["weight"] is None else functional.layer_norm(x, (WIDTH,), norm["weight"], norm["bias"])
        hidden = (read @ down["weight"].T + down["bias"]).clamp(min=0)
        return super().mlp(block, x) + self.scale * (hidden @ up["weight"].T + up["bias"])

    scale = 0.1


@pytest.mark.parametrize(("norm", "more"), [("none", 0), ("in", 2 * 768 * 12)])
def test_counts_and_shapes_of_vit_b(norm: str, more: int) -> None:
    assert count(BASE, "adaptformer", {"norm": norm}, 100) == 1_189_632 + more + 76_900
    parts = BOTTLENECK | (NORM if norm == "in" else {})
    expected = HEAD | {f"blocks.{i}.adaptformer.{n}": shape for i in range(12) for n, shape in parts.items()}
    assert {t.name: t.shape for t in timm_spec(BASE, "adaptformer", {"norm": norm}, 100).tensors} == expected


@pytest.mark.parametrize("options", [{}, {"norm": "in", "scale": 0.7, "width": 5}])
def test_equals_the_formula_written_out(options: dict[str, object]) -> None:
    model, state = moved("adaptformer", **options)
    plain = Beside(state)
    plain.scale = float(str(options.get("scale", 0.1)))
    assert close(model, plain)


def test_down_starts_kaiming_and_up_at_zero() -> None:
    state = tune(backbones.build(CONFIG, 3), "adaptformer", {}, 8).state()
    down = state["blocks.1.adaptformer.down.weight"]
    bound = 1 / WIDTH**0.5  # uniform: sqrt(6 / ((1 + 5) fan_in))
    assert 0.99 * bound < np.abs(down).max() <= bound
    assert not any(state[f"blocks.1.adaptformer.{n}"].any() for n in ("down.bias", "up.weight", "up.bias"))


def test_the_branch_is_added_behind_a_layer_scale() -> None:
    """As in the authors' code, whose models have none: its gamma, often near zero, would silence the branch."""
    config = CONFIG.model_copy(update={"name": "vit_small_patch14_dinov2", "image_size": 28, "depth": 1})
    model = tune(backbones.build(ModelConfig.model_validate(config.model_dump()), 3), "adaptformer", {}, 3)
    block, x = model.module.get_submodule("blocks.0"), torch.randn(2, 5, 384)
    with torch.no_grad():
        before = block(x)
        block.get_parameter("adaptformer.up.bias").fill_(2.0)
        assert torch.allclose(block(x) - before, torch.tensor(0.2), 0, 1e-5)


def test_dropout_is_on_in_training_only() -> None:
    model, _ = moved("adaptformer")
    with torch.no_grad():
        assert torch.equal(model.module(images()), model.module(images()))
        model.train()
        assert not torch.equal(model.module(images()), model.module(images()))


def test_a_model_whose_mlp_has_no_norm_before_it_is_refused() -> None:
    model = ModelConfig(name="vit_base_patch16_rpn_224", weights="none", classes=("a", "b"))
    with pytest.raises(ConfigInvalid, match=r"peft\.method: adaptformer .* blocks\.0 has none there") as caught:
        spec_of(model, "adaptformer", {})
    assert [field for field, _ in caught.value.fields] == ["peft.method"]


def test_it_has_no_plain_form() -> None:
    with pytest.raises(ConfigInvalid, match=r"adaptformer has no plain timm form.*keep the adapter file"):
        formats.timm_model(moved("adaptformer")[0])
