"""LoRA with a residual: its roles, what it adds, and its forms in other libraries."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fedpeft.errors import ConfigInvalid
from fedpeft.export.formats import as_peft, from_peft
from fedpeft.models import backbones
from fedpeft.models.backbones import Backbone
from fedpeft.peft import TunedModel, count, timm_spec, tune

from .test_lora_variants import CONFIG, HEAD, VIT

OPTIONS = {"rank": 2, "alpha": 6.0, "targets": ["attn.proj", "fc1"], "residual_rank": 5}


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return backbones.build(CONFIG, seed=3)


def filled(backbone: Backbone, **options: object) -> TunedModel:
    model = tune(backbone, "lora_residual", {**OPTIONS, **options}, 0)
    draw = np.random.default_rng(1)
    model.load({n: 0.1 * draw.standard_normal(x.shape).astype(np.float32) for n, x in model.state().items()})
    return model


def test_clients_train_and_send_what_they_do_in_lora() -> None:
    spec, lora = (timm_spec(VIT, method, {}, 100) for method in ("lora_residual", "lora"))
    assert spec.sent(1) == lora.sent(1) and spec.largest_update == lora.largest_update
    assert count(VIT, "lora_residual", {}, 100) == lora.parameters == 12 * 8 * (768 + 2304) + HEAD
    assert sum(t.size for t in spec.derived) == 12 * 64 * (768 + 2304)
    assert set(spec.changed(3, 4)) == set(spec.shared) == set(spec.tensors), "versions differ in the residual too"


def test_it_starts_as_lora_and_the_residual_is_not_trained(backbone: Backbone) -> None:
    plain = {key: value for key, value in OPTIONS.items() if key != "residual_rank"}
    model, lora = tune(backbone, "lora_residual", OPTIONS, 7), tune(backbone, "lora", plain, 7)
    state = model.state()
    assert all(np.array_equal(values, state[name]) for name, values in lora.state().items())
    assert not any(state[t.name].any() for t in model.spec.derived) and model.spec.derived
    assert model.trainable(1).keys() == lora.trainable(1).keys()


@pytest.mark.parametrize("rank", [5, 4096])
def test_the_plain_model_has_the_residual_merged(backbone: Backbone, rank: int) -> None:
    model, images = filled(backbone, residual_rank=rank), torch.randn(2, 3, 32, 32)
    plain = backbones.build(CONFIG, seed=3).module
    plain.load_state_dict(model.method.plain(model.module))
    with torch.no_grad():
        found, wanted = plain(images), model.module(images)
        assert torch.allclose(found, wanted, atol=1e-4)
        assert not torch.allclose(wanted, backbone.module(images), atol=1e-2)


def test_the_peft_library_gets_one_lora_of_both_ranks(backbone: Backbone, tmp_path: Path) -> None:
    model = filled(backbone)
    as_peft(model, tmp_path)
    read = from_peft(tmp_path, backbone, "lora")
    assert read.options["rank"] == 7 and read.options["alpha"] == pytest.approx(21.0)
    whole, images = tune(backbone, read.method, read.options, 0), torch.randn(2, 3, 32, 32)
    whole.load(read.tensors)
    with torch.no_grad():
        assert torch.allclose(whole.module(images), model.module(images), atol=1e-4)
    again = from_peft(tmp_path, backbone, "lora_residual")
    begun = tune(backbone, again.method, again.options, 0)
    begun.load(again.tensors)
    with torch.no_grad():
        assert torch.allclose(begun.module(images), model.module(images), atol=1e-4)


def test_parts_of_a_layer_have_no_residual(backbone: Backbone) -> None:
    with pytest.raises(ConfigInvalid, match="parts of a layer"):
        tune(backbone, "lora_residual", {"targets": ["qkv.q"]}, 0)
