"""DoRA: a direction of low rank and a magnitude of each row."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from fedpeft.errors import ConfigInvalid, ModelInvalid
from fedpeft.export import formats
from fedpeft.models import backbones
from fedpeft.peft import count, timm_spec, tune

from .plain_vit import BASE, CONFIG, HEAD, PlainVit, State, close, images, moved

OPTIONS = {"rank": 4, "alpha": 6, "targets": ["qkv", "fc1"]}


def weights(state: State) -> State:
    """The state with each target's weight written out, in NumPy and float64."""
    whole = dict(state)
    for name in state:
        if name.endswith("lora_A.weight"):
            layer = name.removesuffix(".lora_A.weight")
            down, up, magnitude, weight = (
                state[f"{layer}.{part}"].numpy().astype(float)
                for part in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector.weight", "weight")
            )
            directed = weight + 6 / 4 * up @ down
            rows = np.sqrt((directed**2).sum(1, keepdims=True))
            whole[f"{layer}.weight"] = torch.from_numpy(magnitude[:, None] * directed / rows).float()
    return whole


@pytest.mark.parametrize(("rank", "expected"), [(4, 175_104), (8, 322_560)])
def test_counts_and_shapes_of_vit_b(rank: int, expected: int) -> None:
    assert count(BASE, "dora", {"rank": rank}, 100) == expected + 76_900
    parts = {"lora_A.weight": (rank, 768), "lora_B.weight": (2304, rank), "lora_magnitude_vector.weight": (2304,)}
    names = {f"blocks.{i}.attn.qkv.{n}": s for i in range(12) for n, s in parts.items()}
    assert {t.name: t.shape for t in timm_spec(BASE, "dora", {"rank": rank}, 100).tensors} == HEAD | names


def test_equals_the_formula_written_out() -> None:
    model, state = moved("dora", **OPTIONS)
    assert close(model, PlainVit(weights(state)), 1e-4)


def test_magnitudes_start_at_the_norms_of_the_rows() -> None:
    model = tune(backbones.build(CONFIG, 3), "dora", {}, 8)
    weight = model.backbone.module.get_parameter("blocks.1.attn.qkv.weight").numpy()
    found = model.state()["blocks.1.attn.qkv.lora_magnitude_vector.weight"]
    np.testing.assert_allclose(found, np.sqrt((weight.astype(float) ** 2).sum(1)), 1e-6)


def test_scaling_a_direction_changes_nothing() -> None:
    """The rows of W + s B A may be as long as they will; m alone says how long those of W' are."""
    model, state = moved("dora", **OPTIONS)
    layer = model.module.get_submodule("blocks.0.attn.qkv")
    merged = model.method.plain(model.module)["blocks.0.attn.qkv.weight"]
    magnitude = state["blocks.0.attn.qkv.lora_magnitude_vector.weight"]
    assert torch.allclose(merged.norm(dim=1), magnitude.abs(), 1e-5, 0)
    assert not torch.allclose(layer.get_parameter("base_layer.weight").norm(dim=1), magnitude.abs(), 1e-2, 0)


def test_the_norm_is_no_part_of_the_gradient() -> None:
    model, state = moved("dora", **OPTIONS)
    model.module(images()).square().sum().backward()
    name, layer = "blocks.1.mlp.fc1", model.module.get_submodule("blocks.1.mlp.fc1")
    down = state[f"{name}.lora_A.weight"].clone().requires_grad_()
    directed = state[f"{name}.weight"] + 6 / 4 * state[f"{name}.lora_B.weight"] @ down
    whole = weights(state)
    factor = state[f"{name}.lora_magnitude_vector.weight"] / directed.detach().norm(dim=1)
    whole[f"{name}.weight"] = factor[:, None] * directed
    PlainVit(whole)(images()).square().sum().backward()
    found = layer.get_parameter("lora_A.default.weight").grad
    assert found is not None and down.grad is not None
    assert torch.allclose(found, down.grad, 1e-3, 1e-4 * float(down.grad.abs().max()))


def test_merges_into_the_plain_model(tmp_path: Path) -> None:
    model, _ = moved("dora", **OPTIONS)
    formats.as_timm(model, tmp_path / "model.safetensors")
    assert close(model, PlainVit(load_file(tmp_path / "model.safetensors")))


def test_the_peft_library_loads_it_and_it_comes_back(tmp_path: Path) -> None:
    model, _ = moved("dora", **OPTIONS)
    formats.as_peft(model, tmp_path)
    loaded = PeftModel.from_pretrained(backbones.build(CONFIG, 3).module, str(tmp_path)).eval()
    with torch.no_grad():
        assert torch.allclose(loaded(images()), model.module(images()), 0, 1e-6)
    read = formats.from_peft(tmp_path, model.backbone)
    assert read.method == "dora"
    again = tune(model.backbone, "dora", read.options, 8)
    again.load(read.tensors)
    with torch.no_grad():
        assert torch.equal(again.module(images()), model.module(images()))
    assert "# A DoRA for image classification" in (tmp_path / "README.md").read_text()
    with pytest.raises(ModelInvalid, match="uses use_dora, which method lora does not have"):
        formats.from_peft(tmp_path, model.backbone, "lora")
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_rslora": True}))
    with pytest.raises(ModelInvalid, match="uses use_rslora, which method dora does not have"):
        formats.from_peft(tmp_path, model.backbone)


def test_parts_of_a_fused_layer_are_no_targets() -> None:
    with pytest.raises(ConfigInvalid, match=r"'qkv\.q' fits no linear layer of a block"):
        count(BASE, "dora", {"targets": ["qkv.q"]}, 100)
