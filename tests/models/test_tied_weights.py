"""Tied weights stay tied: one tensor in the spec, on the wire and in the fingerprint, whichever name it has first."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fedpeft.config import ModelConfig, TrainingConfig
from fedpeft.data.examples import Examples
from fedpeft.errors import ModelInvalid
from fedpeft.models import backbones
from fedpeft.models.structure import ModelStructure
from fedpeft.models.tasks import Classification
from fedpeft.peft import spec_of, tune
from fedpeft.training.loop import train

CLASSES = tuple("abcdef")
CPU = torch.device("cpu")


class Tied(nn.Module):
    """Predicts the next of six letters; the output layer's weight is the embedding's."""

    def __init__(self, head_first: bool) -> None:
        super().__init__()
        parts = {"embed": nn.Embedding(6, 4), "mix": nn.Linear(4, 4), "head": nn.Linear(4, 6)}
        for name in reversed(parts) if head_first else parts:
            self.add_module(name, parts[name])
        self.head.weight = self.embed.weight

    def forward(self, letters: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(torch.tanh(self.mix(self.embed(letters))))
        return logits


class Letters(Classification):
    def module(self, config: ModelConfig) -> nn.Module:
        return Tied(config.variant == "head-first")

    def structure(self, module: nn.Module, config: ModelConfig) -> ModelStructure:
        return ModelStructure(head="head")

    def read(self, path: object) -> Examples:
        raise NotImplementedError


@pytest.fixture(autouse=True)
def letters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbones, "task_of", lambda name: Letters())


def config(variant: str, weights: str = "none") -> ModelConfig:
    return ModelConfig.model_validate({"name": f"letters:{variant}", "weights": weights, "classes": CLASSES})


@pytest.mark.parametrize(("variant", "name"), [("plain", "embed.weight"), ("head-first", "head.weight")])
@pytest.mark.parametrize("method", ["full", "head"])
def test_a_tied_weight_is_one_tensor_and_stays_tied_in_training(variant: str, name: str, method: str) -> None:
    backbone = backbones.build(config(variant), 3)
    model = tune(backbone, method, {}, 3)
    tensors = {tensor.name for tensor in model.spec.tensors}
    assert name in tensors and len(tensors & {"embed.weight", "head.weight"}) == 1
    assert model.spec == spec_of(config(variant), method, {})
    assert model.module.head.weight is model.module.embed.weight
    assert model.module.head.weight is not backbone.module.head.weight
    data = Examples(np.arange(6).repeat(4), (np.arange(6).repeat(4) + 1) % 6, CLASSES)
    result = train(Letters(), model, data, TrainingConfig(epochs=3, batch_size=8), 1, 1, CPU)
    assert np.abs(result.delta[name]).max() > 0
    assert model.module.head.weight is model.module.embed.weight
    copy = tune(backbone, method, {}, 3)
    copy.load(model.state())
    letters = torch.arange(6)
    assert torch.equal(copy.module(letters), model.module(letters))


@pytest.mark.parametrize("variant", ["plain", "head-first"])
@pytest.mark.parametrize("held", [("embed.weight", "head.weight"), ("embed.weight",), ("head.weight",)])
def test_weights_come_from_a_file_under_either_name_and_the_fresh_head_does_not_replace_them(
    tmp_path, variant: str, held: tuple[str, ...]
) -> None:
    values = {"mix.weight": torch.eye(4), "mix.bias": torch.zeros(4), "head.bias": torch.ones(6)}
    table = torch.arange(24.0).reshape(6, 4)
    save_file(values | {name: table.clone() for name in held}, tmp_path / "w.safetensors")
    backbone = backbones.build(config(variant, str(tmp_path / "w.safetensors")), 3)
    assert torch.equal(backbone.module.embed.weight, table)
    assert backbone.module.head.weight is backbone.module.embed.weight
    assert not backbone.module.head.bias.any()  # the head's own is fresh
    assert len(backbone.stored.keys() & {"embed.weight", "head.weight"}) == 1


def test_two_values_for_one_tensor_are_refused(tmp_path) -> None:
    values = {"mix.weight": torch.eye(4), "mix.bias": torch.zeros(4), "embed.weight": torch.ones(6, 4)}
    save_file(values | {"head.weight": torch.zeros(6, 4)}, tmp_path / "w.safetensors")
    with pytest.raises(ModelInvalid, match=r"embed\.weight and head\.weight are one tensor of the model, and differ"):
        backbones.build(config("plain", str(tmp_path / "w.safetensors")), 3)


def test_the_fingerprint_leaves_a_tuned_tied_tensor_out(tmp_path) -> None:
    prints = []
    for scale in (1.0, 2.0):
        values = {"mix.weight": torch.eye(4), "mix.bias": torch.zeros(4), "embed.weight": torch.full((6, 4), scale)}
        save_file(values, tmp_path / f"{scale}.safetensors")
        backbone = backbones.build(config("plain", str(tmp_path / f"{scale}.safetensors")), 3)
        prints.append(backbones.fingerprint(backbone, tune(backbone, "head", {}, 3).spec))
    assert prints[0] == prints[1]
