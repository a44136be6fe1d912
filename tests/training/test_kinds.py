"""Kinds of models: found by entry point, built from a seed or a file, tuned by every method, trained by their own loop.

The kind is the worked example of docs/extending.md.
"""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fedpeft.config import ModelConfig, RunConfig, TrainingConfig, parse_config
from fedpeft.errors import ConfigInvalid, DataInvalid, ModelInvalid, TrainingFailed
from fedpeft.export.formats import as_timm
from fedpeft.models import backbones
from fedpeft.models.kind import Anatomy, Examples, Kind, Task, kind_of
from fedpeft.peft import methods, spec_of, tune
from fedpeft.rpc.wire import config_from_proto, config_to_proto
from fedpeft.simulation import simulate
from fedpeft.training.learning import Images, OfKind, learner_of, where

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "extending.md").read_text(encoding="utf-8")
(SOURCE,) = re.findall(r"^```python\n# fedpeft_text.py\n(.*?)^```$", PAGE, re.M | re.S)
CLASSES = ("a", "b")
CPU = torch.device("cpu")
POINTS = "text = fedpeft_text:Text\nbroken = fedpeft_text:Absent\nodd = fedpeft_text:LENGTH.bit_length\n"


@pytest.fixture(autouse=True)
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """The worked example of the page, as pip installs it."""
    folder = tmp_path / "packages"
    about = folder / "fedpeft_text-1.0.dist-info"
    about.mkdir(parents=True)
    (folder / "fedpeft_text.py").write_text(SOURCE, encoding="utf-8")
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: fedpeft-text\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[fedpeft.kinds]\n{POINTS}")
    monkeypatch.syspath_prepend(str(folder))
    kind_of.cache_clear()
    __import__("fedpeft_text")
    yield sys.modules["fedpeft_text"]
    kind_of.cache_clear()
    del sys.modules["fedpeft_text"]


def config(**changes: object) -> ModelConfig:
    return ModelConfig.model_validate({"name": "text:tiny", "weights": "none", "classes": CLASSES, **changes})


def examples(count: int = 40) -> Examples:
    """Class a is small bytes, class b large ones."""
    generator = np.random.default_rng(0)
    labels = np.arange(count) % 2
    values = generator.integers(0, 100, (count, 64)) + 100 * labels[:, None]
    return Examples(values.astype(np.uint8), labels, CLASSES)


def settings(**changes: object) -> TrainingConfig:
    return TrainingConfig.model_validate({"batch_size": 8, "optimizer": "adamw", "learning_rate": 0.01, **changes})


def test_a_model_comes_from_the_seed_or_from_a_file_and_its_fingerprint_tells(tmp_path: Path) -> None:
    one, again, other = (backbones.build(config(), seed) for seed in (1, 1, 2))
    prints = [backbones.fingerprint(b, tune(b, "head", {}, 1).spec) for b in (one, again, other)]
    assert prints[0] == prints[1] != prints[2]
    assert one.images is None
    path = tmp_path / "other.safetensors"
    save_file(dict(other.module.state_dict()), path)
    loaded = backbones.build(config(weights=str(path)), 1)
    assert torch.equal(loaded.module.get_parameter("bytes.weight"), other.module.get_parameter("bytes.weight"))
    assert torch.equal(loaded.module.get_parameter("head.weight"), one.module.get_parameter("head.weight"))


@pytest.mark.parametrize("method", methods.names())
def test_every_method_tunes_it_to_the_same_bits_twice(method: str) -> None:
    backbone, learner, data = backbones.build(config(), 1), learner_of("text"), examples()
    frozen = {name: p.clone() for name, p in backbone.module.named_parameters()}
    results = []
    for _ in range(2):
        model = tune(backbone, method, {}, 1)
        assert model.spec == spec_of(config(), method, {})
        results.append(learner.train(model, data, settings(), 7, 1, CPU))
        scored = learner.evaluate(model, data, CPU)
    first, second = results
    assert all(np.array_equal(first.delta[name], second.delta[name]) for name in first.delta)
    assert any(values.any() for values in first.delta.values())
    assert first.examples == 40 and first.metrics["steps"] == 5 and scored["examples"] == 40
    assert all(torch.equal(frozen[name], p) for name, p in backbone.module.named_parameters())


def test_training_learns_reports_and_can_be_stopped() -> None:
    model = tune(backbones.build(config(), 1), "full", {}, 1)
    learner, told = learner_of("text"), []
    assert learner.evaluate(model, examples(), CPU)["accuracy"] < 0.8
    result = learner.train(model, examples(), settings(epochs=6), 7, 1, CPU, progress=told.append)
    assert learner.evaluate(model, examples(), CPU)["accuracy"] == 1.0
    assert result.metrics["loss"] < result.metrics["loss_first"]
    assert (told[-1].step, told[-1].steps) == (30, 30)
    with pytest.raises(TrainingFailed, match="stopped as asked, after 0 of 5 steps"):
        learner.train(model, examples(), settings(), 7, 1, CPU, stop=lambda: True)
    with pytest.raises(TrainingFailed, match=r"loss is nan|not finite"):
        learner.train(model, examples(), settings(optimizer="sgd", learning_rate=100, epochs=20), 7, 1, CPU)


def test_labels_go_by_name_and_read_says_what_is_missing(tmp_path: Path, package: types.ModuleType) -> None:
    learner, backbone = learner_of("text"), backbones.build(config(), 1)
    for name, letter in (("b", b"b"), ("alpha", b"a"), ("other", b"o")):
        (tmp_path / "site" / name).mkdir(parents=True)
        (tmp_path / "site" / name / "text").write_bytes(letter * 130)
    data = learner.dataset(learner.read(tmp_path / "site"), backbone, {"alpha": "a", "other": None})
    assert data.class_names == CLASSES and data.values[data.labels == 0].tolist() == [[ord("a")] * 64] * 2
    assert learner.usable(data)[0] == 4
    with pytest.raises(DataInvalid, match="'other'"):
        learner.dataset(learner.read(tmp_path / "site"), backbone, {"alpha": "a"})
    with pytest.raises(DataInvalid, match="no folder of files"):
        learner.read(tmp_path / "site" / "b")


def test_data_says_its_kind_before_a_colon(tmp_path: Path) -> None:
    odd = tmp_path / "text:x"
    odd.mkdir()
    assert where(str(odd)) == ("", str(odd)), "a path that is there is a path"
    assert where("text:/far/x") == ("text", "/far/x") and where("/far/x") == ("", "/far/x")
    assert isinstance(learner_of(""), Images) and isinstance(learner_of("text"), OfKind)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("speech:tiny", "there is no kind of model 'speech' on this machine; installed: broken, odd, text"),
        ("broken:x", "kind 'broken' (fedpeft_text:Absent): AttributeError"),
        ("odd:x", "kind 'odd' (fedpeft_text:LENGTH.bit_length) is a int, not a fedpeft.models.kind.Kind"),
        ("text:huge", "there is no text:huge; there are: tiny, small"),
    ],
)
def test_what_cannot_be_built_is_said(name: str, words: str) -> None:
    with pytest.raises(ModelInvalid, match=re.escape(words)):
        backbones.build(config(name=name), 0)


def test_what_only_timm_has_is_said(tmp_path: Path) -> None:
    with pytest.raises(ModelInvalid, match='"hub" is timm\'s'):
        backbones.build(config(weights="hub"), 0)
    with pytest.raises(ConfigInvalid, match="text:tiny is no model of timm"):
        as_timm(tune(backbones.build(config(), 0), "head", {}, 0), tmp_path / "x.safetensors")


class Plain(Kind):
    """One linear layer, which adds nothing to learn of."""

    def module(self, config: ModelConfig) -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(4, len(config.classes)))

    def anatomy(self, module: torch.nn.Module) -> Anatomy:
        return Anatomy("0")

    def read(self, path: Path) -> Examples:
        raise DataInvalid(f"there is nothing at {path}")

    def train(self, task: Task) -> None:
        next(iter(task.batches))

    def evaluate(self, module: torch.nn.Module, examples: Examples, device: torch.device) -> dict[str, float]:
        return {"loss": 0.0}


def test_a_model_without_blocks_and_a_loop_that_stops_short(package: types.ModuleType) -> None:
    package.Text = Plain
    backbone = backbones.build(config(), 0)
    assert tune(backbone, "head", {}, 0).spec.parameters == 10
    for method, part in (("lora", "blocks"), ("prompt", "blocks"), ("adapter", "mlps")):
        with pytest.raises(ConfigInvalid, match=f"{method} attaches to a model's {part}"):
            tune(backbone, method, {}, 0)
    data = Examples(np.zeros((8, 4), np.float32), np.arange(8) % 2, CLASSES)
    with pytest.raises(TrainingFailed, match="reported 0 of 1 step"):
        learner_of("text").train(tune(backbone, "head", {}, 0), data, settings(), 0, 1, CPU)


@pytest.mark.parametrize(("values", "labels"), [(2, [0, 1, 1]), (0, []), (1, [2]), (1, [-1])])
def test_examples_have_a_label_each(values: int, labels: list[int]) -> None:
    with pytest.raises(DataInvalid):
        Examples(np.zeros((values, 3)), np.array(labels, np.int64), CLASSES)


class Next(Kind):
    """A kind without classes: from four numbers the fifth, by as many layers as an option says."""

    def module(self, config: ModelConfig) -> torch.nn.Module:
        layers = (config.options or {}).get("layers", 1)
        if not isinstance(layers, int):
            text = f"model.options.layers: {layers!r} is no whole number"
            raise ModelInvalid(text, (("model.options.layers", text),))
        return torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(layers)), torch.nn.Linear(4, 1))

    def anatomy(self, module: torch.nn.Module) -> Anatomy:
        return Anatomy(list(dict(module.named_children()))[-1])

    def read(self, path: Path) -> Examples:
        return Examples.unlabelled(np.random.default_rng(3).normal(size=(40, 5)).astype(np.float32))

    def train(self, task: Task) -> None:
        for batch in task.batches:
            values = torch.from_numpy(batch.values)
            loss = torch.nn.functional.mse_loss(task.module(values[:, :4]), values[:, 4:])
            task.optimizer.zero_grad()
            loss.backward()
            task.optimizer.step()
            task.step(loss)

    def evaluate(self, module: torch.nn.Module, examples: Examples, device: torch.device) -> dict[str, float]:
        values = torch.from_numpy(examples.values)
        return {"loss": torch.nn.functional.mse_loss(module(values[:, :4]), values[:, 4:]).item()}


def next_run(**model: object) -> RunConfig:
    said = {"name": "text:next", "weights": "none", **model}
    return parse_config({"model": said, "peft": {"method": "full"}, "rounds": {"count": 2, "clients": 2}})


def test_a_kind_without_classes_names_none_and_has_options(package: types.ModuleType, tmp_path: Path) -> None:
    package.Text = Next
    config = next_run(options={"layers": 3})
    assert config.model.classes == ("examples",)
    assert config_from_proto(config_to_proto(config)) == config, "whole numbers are whole on the other side"
    sites = {name: learner_of("text").read(tmp_path) for name in ("a", "b")}
    report = simulate(config, sites, tmp_path / "out")
    assert report["adapter_parameters"] == 3 * 20 + 5
    ticket = report["rounds"][-1]["tickets"][0]
    assert ticket["examples"] == 40 and ticket["metrics"]["images_per_second"] > 0
    assert report["rounds"][1]["metrics"]["train_loss"] < report["rounds"][0]["metrics"]["train_loss"]


def test_options_are_a_kind_s_own_and_it_says_what_is_wrong_with_them(package: types.ModuleType) -> None:
    package.Text = Next
    with pytest.raises(ModelInvalid, match=r"model\.options\.layers: 'many' is no whole number") as caught:
        backbones.build(next_run(options={"layers": "many"}).model, 0)
    assert caught.value.fields[0][0] == "model.options.layers"
    with pytest.raises(ConfigInvalid, match=r"model: options are of KIND:NAME; 'vit_tiny_patch16_224' is timm's"):
        next_run(name="vit_tiny_patch16_224", classes=["a", "b"], options={"layers": 3})
    with pytest.raises(ConfigInvalid, match=r"model\.classes"):
        next_run(name="vit_tiny_patch16_224")
    with pytest.raises(ConfigInvalid, match="1 class; at least 2"):
        next_run(name="vit_tiny_patch16_224", classes=["a"])


def test_data_without_labels_does_not_suit_a_run_with_classes(package: types.ModuleType, tmp_path: Path) -> None:
    package.Text = Next
    learner, backbone = learner_of("text"), backbones.build(next_run(classes=["a", "b"]).model, 0)
    with pytest.raises(DataInvalid, match=r"class 'examples' \(40 rows\) is not among the run's"):
        learner.dataset(learner.read(tmp_path), backbone, {})
