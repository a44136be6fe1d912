"""Adapters as others load them, by loading them."""

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fedpeft.config import ModelConfig
from fedpeft.errors import BackboneMismatch, ConfigInvalid, ModelInvalid
from fedpeft.export import formats
from fedpeft.export.model_card import Provenance
from fedpeft.models.backbones import Backbone, build, fingerprint
from fedpeft.models.families import timm_arguments
from fedpeft.peft import TunedModel, tune

CONFIG = ModelConfig(
    name="vit_tiny_patch16_224", weights="none", image_size=32, depth=2, pooling="avg", classes=("a", "b", "c")
)

PLAIN = ("full", "head", "bias", "layernorm", "partial")
"""Methods that add nothing to the model."""


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return build(CONFIG, seed=1)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def trained(backbone: Backbone, method: str, **options: Any) -> TunedModel:
    """A tuned model whose tensors are all somewhere else than at the start."""
    model = tune(backbone, method, options, 0)
    rng = np.random.default_rng(2)
    model.load({n: v + rng.normal(0, 0.1, v.shape).astype(np.float32) for n, v in model.state().items()})
    return model


def logits(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(images)
    return found


@pytest.mark.parametrize("method", [*PLAIN, "lora", "ffa_lora", "dora", "vera", "ssf", "ia3"])
def test_timm_loads_the_whole_model_strictly(
    tmp_path: Path, backbone: Backbone, images: torch.Tensor, method: str
) -> None:
    model = trained(backbone, method)
    path = tmp_path / "model.safetensors"
    formats.as_timm(model, path)
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["timm"])
    assert about["classes"] == ["a", "b", "c"]
    plain = timm.create_model(about["name"], **about["arguments"])
    plain.load_state_dict(load_file(path), strict=True)
    tolerance = 0 if method in PLAIN else 1e-5  # merged weights round once more
    assert torch.allclose(logits(plain, images), logits(model.module, images), 0, tolerance)
    assert not torch.allclose(logits(plain, images), logits(backbone.module, images), 0, 1e-2)


@pytest.mark.parametrize("method", PLAIN)
def test_timm_and_back(tmp_path: Path, backbone: Backbone, method: str) -> None:
    model = trained(backbone, method)
    formats.as_timm(model, tmp_path / "model.safetensors")
    tensors = formats.from_timm(tmp_path / "model.safetensors", tune(backbone, method, {}, 9))
    expected = model.state()
    assert list(tensors) == list(expected)
    assert all(np.array_equal(tensors[n], expected[n]) for n in expected)


@pytest.mark.parametrize("method", ["adapter", "prompt"])
def test_injected_modules_have_no_plain_form(tmp_path: Path, backbone: Backbone, method: str) -> None:
    model = trained(backbone, method)
    with pytest.raises(ConfigInvalid, match=f"method {method} has no plain timm form.*keep the adapter file"):
        formats.as_timm(model, tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())
    formats.as_timm(trained(backbone, "head"), tmp_path / "head.safetensors")
    with pytest.raises(ConfigInvalid, match="cannot be read from a timm state dict"):
        formats.from_timm(tmp_path / "head.safetensors", model)


def test_from_timm_refuses_another_backbone(tmp_path: Path, backbone: Backbone) -> None:
    path = tmp_path / "model.safetensors"
    formats.as_timm(trained(backbone, "bias"), path)
    with pytest.raises(BackboneMismatch, match="method head leaves it frozen"):
        formats.from_timm(path, tune(backbone, "head", {}, 0))
    state = load_file(path)
    del state["head.bias"]
    save_file(state, path)
    with pytest.raises(ModelInvalid, match=r"head\.bias is missing; the model has \(3,\)"):
        formats.from_timm(path, tune(backbone, "bias", {}, 0))


TARGETS: list[str | list[str]] = ["qkv", ["qkv", "proj", "fc1"], ["blocks.1.attn.qkv"], "mlp.*"]


@pytest.mark.parametrize("targets", TARGETS)
def test_the_peft_library_loads_a_lora(
    tmp_path: Path, backbone: Backbone, images: torch.Tensor, targets: str | list[str]
) -> None:
    model = trained(backbone, "lora", rank=4, alpha=6, targets=targets)
    formats.as_peft(model, tmp_path / "lora")
    plain = timm.create_model(CONFIG.name, **timm_arguments(backbone.config))
    plain.load_state_dict(backbone.module.state_dict())
    loaded = PeftModel.from_pretrained(plain, str(tmp_path / "lora"))
    assert torch.allclose(logits(loaded, images), logits(model.module, images), 0, 1e-6)

    method, options, tensors = formats.from_peft(tmp_path / "lora", backbone)
    again = tune(backbone, method, options, 5)
    again.load(tensors)
    assert again.spec.sha256 == model.spec.sha256
    assert torch.equal(logits(again.module, images), logits(model.module, images))


@pytest.mark.parametrize("method", ["ffa_lora", "rolora"])
def test_the_peft_library_loads_variants_of_lora(
    tmp_path: Path, backbone: Backbone, images: torch.Tensor, method: str
) -> None:
    model = trained(backbone, method, rank=4)
    formats.as_peft(model, tmp_path / "lora")
    plain = timm.create_model(CONFIG.name, **timm_arguments(backbone.config))
    plain.load_state_dict(backbone.module.state_dict())
    loaded = PeftModel.from_pretrained(plain, str(tmp_path / "lora"))
    assert torch.allclose(logits(loaded, images), logits(model.module, images), 0, 1e-6)

    assert formats.from_peft(tmp_path / "lora", backbone).method == "lora"
    read = formats.from_peft(tmp_path / "lora", backbone, method)
    again = tune(backbone, read.method, read.options, 5)
    again.load(read.tensors)
    assert again.spec.sha256 == model.spec.sha256 and read.method == method
    with pytest.raises(ModelInvalid, match="holds a LORA adapter, which method bias cannot read"):
        formats.from_peft(tmp_path / "lora", backbone, "bias")


def test_the_card_says_how_the_adapter_came_about_and_how_to_load_it(
    tmp_path: Path, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = timm.create_model(CONFIG.name)
    save_file(whole.state_dict(), tmp_path / "whole.safetensors")
    backbone = build(CONFIG.model_copy(update={"weights": str(tmp_path / "whole.safetensors")}), 1)
    model = trained(backbone, "lora", rank=4)
    figures, guarantee = {"accuracy": 0.5581, "loss": 1.31, "examples": 900}, "epsilon 2 spent at delta 1e-05"
    made = Provenance("run-1", 3, 10, 5, 14, 3 * 2**20, 2**19, figures, guarantee)
    formats.as_peft(model, tmp_path / "lora", made)
    text = (tmp_path / "lora" / "README.md").read_text(encoding="utf-8")
    for line in (
        "base_model: timm/vit_tiny_patch16_224",
        "# license: yours to say",
        "- lora",
        "# A LoRA for image classification, tuned by federated learning",
        "The data of the clients never left them: they trained a low-rank change and the head of one frozen model,",
        '| method | lora, rank 4, alpha 16.0, targets "qkv", dropout 0.0 |',
        '| classes | 3: `["a", "b", "c"]` |',
        "| run | `run-1`, version 3 of 10 rounds |",
        "| clients | 5, of whom 14 updates were counted |",
        "| sent | 3.00 MiB up, 0.50 MiB down, whole messages of all clients |",
        "| held-out data | accuracy 55.8 %, loss 1.310 on 900 images |",
        "| differential privacy | epsilon 2 spent at delta 1e-05 |",
        f"| backbone | SHA-256 of the frozen tensors `{fingerprint(backbone, model.spec)}` |",
    ):
        assert line in text
    (code,) = re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)
    monkeypatch.chdir(tmp_path / "lora")
    space: dict[str, Any] = {}
    exec(code.replace("BACKBONE", str(tmp_path / "whole.safetensors")), space)
    assert torch.allclose(logits(space["model"], images), logits(model.module, images), 0, 1e-5)


def test_the_card_of_an_adapter_from_nowhere_says_less(tmp_path: Path, backbone: Backbone) -> None:
    formats.as_peft(trained(backbone, "lora"), tmp_path)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "| run |" not in text and "random weights" in text


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_files_have_the_mode_that_the_umask_leaves(tmp_path: Path, backbone: Backbone, mask: int, mode: int) -> None:
    model = trained(backbone, "lora")
    before = os.umask(mask)
    try:
        formats.as_timm(model, tmp_path / "model.safetensors")
        formats.as_peft(model, tmp_path / "lora")
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in files} == {mode}
    assert len(files) == 4


def test_many_layers_survive_the_library_shortening_their_names(tmp_path: Path) -> None:
    backbone = build(CONFIG.model_copy(update={"depth": 12, "pooling": None}), 0)
    model = trained(backbone, "lora", targets=["qkv", "proj"])
    formats.as_peft(model, tmp_path)
    _, options, tensors = formats.from_peft(tmp_path, backbone)
    assert options["targets"] == ("attn.proj", "attn.qkv")
    assert tensors.keys() == model.state().keys()


def test_only_lora_has_a_peft_form(tmp_path: Path, backbone: Backbone) -> None:
    with pytest.raises(ConfigInvalid, match="method bias has no peft form"):
        formats.as_peft(trained(backbone, "bias"), tmp_path)


def test_from_peft_refuses_what_it_cannot_be(tmp_path: Path, backbone: Backbone) -> None:
    with pytest.raises(ModelInvalid, match="is not a directory of the peft library"):
        formats.from_peft(tmp_path, backbone)
    formats.as_peft(trained(backbone, "lora"), tmp_path)
    config, weights = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    data, state = json.loads(config.read_text()), load_file(weights)
    config.write_text("[]")
    with pytest.raises(ModelInvalid, match="its configuration is not a JSON object"):
        formats.from_peft(tmp_path, backbone)
    for change, says in (
        ({"peft_type": "OFT"}, "holds a OFT adapter; only .*LORA.* can be read"),
        ({"r": None}, "does not fit vit_tiny"),
        ({"use_rslora": True}, "uses use_rslora"),
        ({"use_dora": True}, r"lora_magnitude_vector\.weight is missing there"),
        ({"bias": "all"}, "uses bias"),
        ({"r": 5}, r"is \(8, 192\) there, \(5, 192\) in the model"),
    ):
        config.write_text(json.dumps(data | change))
        with pytest.raises(ModelInvalid, match=says):
            formats.from_peft(tmp_path, backbone)
    config.write_text(json.dumps(data))
    save_file({n: t for n, t in state.items() if "head" not in n}, weights)
    with pytest.raises(ModelInvalid, match=r"head\.bias is missing there"):
        formats.from_peft(tmp_path, backbone)
