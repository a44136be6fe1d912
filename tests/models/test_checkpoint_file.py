"""Weights files as training scripts and downloads leave them: taken where plain, else named as what they are."""

from __future__ import annotations

import argparse
import io
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from torch import nn

from fedpeft.config import ModelConfig
from fedpeft.errors import ModelInvalid
from fedpeft.models.backbones import build, check_weights

CONFIG: dict[str, Any] = {"name": "vit_tiny_patch16_224", "image_size": 32, "depth": 1, "classes": ("a", "b", "c")}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    made: nn.Module = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=7, depth=1)
    return made


@pytest.fixture(scope="module")
def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def read(path: Path) -> dict[str, torch.Tensor]:
    config = ModelConfig(**CONFIG, weights=str(path))
    check_weights(config)
    return build(config, 0).module.state_dict()


def refused(path: Path) -> str:
    """Returns what is said of a file, the same when it is looked at and when it is loaded."""
    with pytest.raises(ModelInvalid) as looked:
        check_weights(ModelConfig(**CONFIG, weights=str(path)))
    with pytest.raises(ModelInvalid) as loaded:
        build(ModelConfig(**CONFIG, weights=str(path)), 0)
    assert looked.value.message == loaded.value.message
    assert "\n" not in looked.value.message and str(path) in looked.value.message
    return looked.value.message


def under(prefix: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


TAKEN = {
    "plain": lambda s: s,
    "compiled": lambda s: under("_orig_mod.", s),
    "distributed and compiled": lambda s: {"state_dict": under("module._orig_mod.", s)},
    "of timm's trainer": lambda s: {"epoch": 3, "arch": "vit", "state_dict": s, "args": argparse.Namespace(lr=1.0)},
    "with a number of NumPy's": lambda s: {"state_dict": s, "metric": np.float64(71.3), "n": np.int64(3)},
    "of torch's tutorial": lambda s: {"model_state_dict": s, "optimizer_state_dict": {"state": {}}, "loss": 1.5},
    "of Lightning": lambda s: {"state_dict": under("model.", s), "pytorch-lightning_version": "2"},
    "of a backbone": lambda s: {"state_dict": under("model.backbone.", s)},
    "of a teacher": lambda s: {"teacher": under("module.backbone.", s), "epoch": 9},
    "deep": lambda s: {"checkpoint": 1, "model": {"state_dict": {"model": s}}},
    "of one network": lambda s: {"net": s, "acc": 0.9},
    "with averages": lambda s: {"state_dict": s, "state_dict_ema": s},
}


@pytest.mark.parametrize("form", TAKEN)
def test_what_training_scripts_save_is_taken(tmp_path: Path, state: dict[str, torch.Tensor], form: str) -> None:
    torch.save(TAKEN[form](state), tmp_path / "weights.pth.tar")
    got = read(tmp_path / "weights.pth.tar")
    assert all(torch.equal(got[name], tensor) for name, tensor in state.items() if not name.startswith("head."))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pth", "weights.safetensors", "weights"])
@pytest.mark.parametrize("form", ["safetensors", "torch", "old torch"])
def test_the_content_says_what_a_file_is_and_not_its_name(
    tmp_path: Path, state: dict[str, torch.Tensor], form: str, name: str
) -> None:
    if form == "safetensors":
        safetensors.torch.save_file(state, tmp_path / name)
    else:
        torch.save(state, tmp_path / name, _use_new_zipfile_serialization=form == "torch")
    assert torch.equal(read(tmp_path / name)["norm.weight"], state["norm.weight"])


def archive(*names: str) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        for name in names:
            file.writestr(name, b"data")
    return out.getvalue()


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 123\n", "a Git LFS pointer.*git lfs pull"),
        (b"/annex/objects/SHA256E-s1--ab.pth\n", "a git-annex pointer"),
        (b"outs:\n- md5: ab\n", "a DVC pointer"),
        (b"<!DOCTYPE html><html>Sign in</html>", r"a web page \(HTML\)"),
        (b"<html>", r"a web page \(HTML\)"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code>', "it is XML"),
        (b'{"metadata": {}, "weight_map": {}}', "JSON"),
        (b"\x1f\x8b\x08" + bytes(50), "compressed by gzip"),
        (b"\x89HDF\r\n\x1a\n" + bytes(50), "HDF5"),
        (b"GGUF" + bytes(50), "GGUF"),
        (b"\x93NUMPY" + bytes(50), "a NumPy array"),
        (bytes(5000), "nothing but zero bytes"),
    ],
)
def test_what_is_no_weights_file_is_named(tmp_path: Path, data: bytes, says: str, suffix: str) -> None:
    (tmp_path / f"weights.{suffix}").write_bytes(data)
    said = refused(tmp_path / f"weights.{suffix}")
    assert re.search(says, said), said


class Net(nn.Module):
    """A model of somebody's own script."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2)


class Options:
    """An object that somebody keeps beside the weights."""


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_what_holds_more_than_tensors_is_named(
    tmp_path: Path, model: nn.Module, state: dict[str, torch.Tensor]
) -> None:
    scripted = io.BytesIO()
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), scripted)
    cases: list[tuple[Any, str]] = [
        (model, r"a whole model object \(timm\.models\.vision_transformer\.VisionTransformer\).*model\.state_dict\(\)"),
        (Net(), r"a whole model object \(.*\.Net\), not a state dict"),
        ({"model": Net(), "epoch": 1}, r"a whole model object"),
        ({"state_dict": state, "options": Options()}, r"more than tensors \(.*\.Options\).*save the state dict alone"),
        (scripted.getvalue(), "a TorchScript archive"),
        (archive("model.npy"), "a zip archive that PyTorch did not write"),
        ({"teacher": state, "student": state}, r"2 state dicts \(teacher, student\); save the one that is meant"),
        ({"state": {}, "param_groups": [{"lr": 1}]}, "is not a state dict: state, param_groups"),
        ({}, "no state dict but an empty dict"),
        (torch.zeros(3), r"no state dict but one tensor of shape \(3,\)"),
        ([state], "no state dict but a list"),
    ]
    for form in (True, False):
        for data, says in cases:
            if isinstance(data, bytes):
                (tmp_path / "w.pth").write_bytes(data)
            else:
                torch.save(data, tmp_path / "w.pth", _use_new_zipfile_serialization=form)
            said = refused(tmp_path / "w.pth")
            old = not form and "more than tensors" in said  # of an old file only the first class is known
            assert old or re.search(says, said), said


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_values_that_are_no_numbers_are_found_before_training(
    tmp_path: Path, state: dict[str, torch.Tensor], value: float, dtype: torch.dtype
) -> None:
    changed = {name: tensor.to(dtype).clone() for name, tensor in state.items()}
    changed["blocks.0.norm1.weight"][:3] = value
    safetensors.torch.save_file(changed, tmp_path / "w.safetensors")
    said = refused(tmp_path / "w.safetensors")
    assert "blocks.0.norm1.weight has 3 values that are NaN or infinite; the file is damaged, or its training" in said
    changed["blocks.0.norm1.weight"][:3] = 1
    changed["head.weight"][:] = value  # which is not used
    safetensors.torch.save_file(changed, tmp_path / "w.safetensors")
    assert read(tmp_path / "w.safetensors")["blocks.0.norm1.weight"][0] == 1


def test_a_sparse_tensor_is_named(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    torch.save({**state, "norm.weight": state["norm.weight"].to_sparse()}, tmp_path / "w.pth")
    said = refused(tmp_path / "w.pth")
    assert said.endswith("norm.weight is sparse_coo; dense tensors are needed (tensor.to_dense())"), said


def test_tensors_of_others_are_named(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    foreign = {"vit.encoder.layer.0.attention.attention.query.weight": torch.zeros(3, 3)}
    lora = {"base_model.model.blocks.0.attn.qkv.lora_A.weight": torch.zeros(3, 3)}
    for tensors, file, says in [
        (foreign, "w.safetensors", "the names are those of Hugging Face transformers; timm's are needed"),
        (lora, "w.safetensors", "a LoRA adapter"),
        ({"base_model.model.blocks.0.mlp.fc2.ia3_l": torch.zeros(1, 3)}, "w.safetensors", "an (IA)^3 adapter"),
        (
            {"norm.weight": state["norm.weight"]},
            "model-00001-of-00003.safetensors",
            "one of the 3 files of a checkpoint",
        ),
    ]:
        safetensors.torch.save_file(tensors, tmp_path / file)
        assert says in refused(tmp_path / file)


def test_an_adapter_of_ours_is_no_backbone(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    about = {"format": "fedpeft-adapter", "classes": json.dumps(["a"])}
    safetensors.torch.save_file({"norm.weight": state["norm.weight"]}, tmp_path / "w.safetensors", about)
    assert "a file of FedPEFT with an adapter or a state" in refused(tmp_path / "w.safetensors")


def test_a_file_that_was_cut_is_named(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    safetensors.torch.save_file(state, tmp_path / "w.bin")
    (tmp_path / "w.bin").write_bytes((tmp_path / "w.bin").read_bytes()[:-100])
    assert "a safetensors file whose header is damaged, or whose end is missing" in refused(tmp_path / "w.bin")
    (tmp_path / "empty.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")
    assert "there is no tensor in it" in refused(tmp_path / "empty.safetensors")
