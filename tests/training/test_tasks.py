"""Tasks: found by entry point, built from a seed or a file, tuned by every method, trained by the same loop as images.

The task is the worked example of docs/extending.md.
"""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from structlog.testing import capture_logs

from fedpeft.config import ModelConfig, RunConfig, TrainingConfig, parse_config
from fedpeft.data.examples import Examples
from fedpeft.data.reading import Reading
from fedpeft.errors import ConfigInvalid, DataInvalid, ModelInvalid, SettingsInvalid, TrainingFailed
from fedpeft.export.formats import as_timm
from fedpeft.models import backbones
from fedpeft.models.structure import ModelStructure
from fedpeft.models.tasks import Batch, Task, split_data, task_of, tasks
from fedpeft.peft import TunedModel, methods, spec_of, tune
from fedpeft.rpc.wire import config_from_proto, config_to_proto
from fedpeft.simulation import check_run, simulate
from fedpeft.training import loop, precision
from fedpeft.training.batches import BatchOrder
from fedpeft.training.evaluation import evaluate
from fedpeft.training.loop import Progress, train
from fedpeft.training.result import TrainingResult

from ..outside_package import looked_up_anew

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "extending.md").read_text(encoding="utf-8")
(SOURCE,) = re.findall(r"^```python\n# fedpeft_text.py\n(.*?)^```$", PAGE, re.M | re.S)
CLASSES = ("a", "b")
CPU = torch.device("cpu")
POINTS = """
[fedpeft.tasks]
text = fedpeft_text:Text
broken = fedpeft_text:Absent
[fedpeft.kinds]
odd = fedpeft_text:LENGTH.bit_length
"""
"""The second group is the earlier name of the first, and read too."""


@pytest.fixture(autouse=True)
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """The worked example of the page, as pip installs it."""
    folder = tmp_path / "packages"
    about = folder / "fedpeft_text-1.0.dist-info"
    about.mkdir(parents=True)
    (folder / "fedpeft_text.py").write_text(SOURCE, encoding="utf-8")
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: fedpeft-text\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(POINTS)
    monkeypatch.syspath_prepend(str(folder))
    with looked_up_anew(tasks):
        __import__("fedpeft_text")
        yield sys.modules["fedpeft_text"]
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


def trained(model: TunedModel, data: Examples, said: TrainingConfig, **options: Any) -> TrainingResult:
    return train(task_of("text"), model, data, said, 7, 1, CPU, **options)


def scored(model: TunedModel, data: Examples) -> dict[str, float]:
    return evaluate(task_of("text"), model, data, device=CPU)


@pytest.mark.parametrize("method", methods.names())
def test_every_method_tunes_it_to_the_same_bits_twice(method: str) -> None:
    backbone, data = backbones.build(config(), 1), examples()
    frozen = {name: p.clone() for name, p in backbone.module.named_parameters()}
    results = []
    for _ in range(2):
        model = tune(backbone, method, {}, 1)
        assert model.spec == spec_of(config(), method, {})
        results.append(trained(model, data, settings()))
        figures = scored(model, data)
    first, second = results
    assert all(np.array_equal(first.delta[name], second.delta[name]) for name in first.delta)
    assert any(values.any() for values in first.delta.values())
    assert first.examples == 40 and first.metrics["steps"] == 5 and figures["examples"] == 40
    assert all(torch.equal(frozen[name], p) for name, p in backbone.module.named_parameters())


def test_training_learns_reports_and_can_be_stopped() -> None:
    model = tune(backbones.build(config(), 1), "full", {}, 1)
    told: list[Progress] = []
    assert scored(model, examples())["accuracy"] < 0.8
    result = trained(model, examples(), settings(epochs=6), progress=told.append)
    assert scored(model, examples())["accuracy"] == 1.0
    assert result.metrics["loss"] < result.metrics["loss_first"]
    assert (told[-1].step, told[-1].steps) == (30, 30)
    with pytest.raises(TrainingFailed, match="stopped as asked, after 0 of 5 steps"):
        trained(model, examples(), settings(), stop=lambda: True)
    with pytest.raises(TrainingFailed, match=r"loss is nan|not finite"):
        trained(model, examples(), settings(optimizer="sgd", learning_rate=100, epochs=20))


def test_the_loop_has_the_bits_of_a_loop_written_by_hand() -> None:
    """Mean cross entropy as torch has it, and batches in the order of the seed."""
    model, by_hand = (tune(backbones.build(config(), 1), "full", {}, 1) for _ in range(2))
    result, data = trained(model, examples(43), settings()), examples(43)
    optimizer = torch.optim.AdamW(by_hand.trainable(1).values(), lr=0.01, weight_decay=1e-4)
    losses = []
    for rows in BatchOrder(settings(), 43, 7):
        values, labels = torch.from_numpy(data.values[rows]), torch.from_numpy(data.labels[rows])
        loss = torch.nn.functional.cross_entropy(by_hand.module(values.long()), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(np.array_equal(values, model.state()[name]) for name, values in by_hand.state().items())
    assert (result.metrics["loss_first"], result.metrics["loss_last"]) == (losses[0], losses[-1])


def test_a_batch_that_does_not_fit_is_halved_in_training_and_in_evaluation() -> None:
    whole, halved = (tune(backbones.build(config(), 1), "bias", {}, 1) for _ in range(2))

    def full(_: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
        if len(inputs[0]) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")

    halved.module.register_forward_pre_hook(full)
    sgd = settings(optimizer="sgd")  # AdamW makes whole steps of gradients that are zero but for rounding
    one, other = (trained(model, examples(), sgd) for model in (whole, halved))
    assert (one.metrics["micro_batch"], other.metrics["micro_batch"]) == (8, 2)
    assert all(np.allclose(one.delta[name], other.delta[name], atol=1e-5) for name in one.delta)
    assert scored(halved, examples()) == pytest.approx(scored(whole, examples()))


def test_precision_and_the_scaling_of_float16_are_those_of_images(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = tune(backbones.build(config(), 1), "lora", {}, 1), []
    model.module.blocks[0].mlp[0].register_forward_hook(lambda m, i, out: seen.append((m.weight.dtype, out.dtype)))
    result = trained(model, examples(), settings(precision="bfloat16"))
    assert result.facts["precision"] == "bfloat16" and set(seen) == {(torch.bfloat16, torch.bfloat16)}
    monkeypatch.setattr(loop, "precision", lambda wanted, device: torch.float16)
    monkeypatch.setattr(precision, "INITIAL_SCALE", 2.0**30)
    with capture_logs() as logs:
        assert trained(tune(backbones.build(config(), 1), "bias", {}, 1), examples(), settings()).metrics["steps"] == 5
    assert "float16_overflow" in [log["event"] for log in logs]


class Gaps(Examples):
    """Examples of which the first cannot be read."""

    @property
    def examples(self) -> int:
        return len(self) - 1

    def batches(self, orders: Iterable[np.ndarray]) -> Iterator[Examples]:
        return (self.select(order[order > 0]) if (order > 0).any() else [] for order in orders)


def test_rows_that_cannot_be_read_are_left_out_and_counted() -> None:
    whole = examples(9)
    data = Gaps(whole.values, whole.labels, whole.class_names)
    model = tune(backbones.build(config(), 1), "bias", {}, 1)
    result = trained(model, data, settings(batch_size=1))
    assert (result.examples, result.metrics["skipped_images"], result.metrics["steps"]) == (8, 1, 8)
    assert scored(model, data)["skipped_images"] == 1 and scored(model, data)["examples"] == 8


def test_labels_go_by_name_and_read_says_what_is_missing(tmp_path: Path, package: types.ModuleType) -> None:
    task, backbone = task_of("text"), backbones.build(config(), 1)
    for name, letter in (("b", b"b"), ("alpha", b"a"), ("other", b"o")):
        (tmp_path / "site" / name).mkdir(parents=True)
        (tmp_path / "site" / name / "text").write_bytes(letter * 130)
    data = task.dataset(task.read(tmp_path / "site"), backbone, {"alpha": "a", "other": None})
    assert data.class_names == CLASSES and data.values[data.labels == 0].tolist() == [[ord("a")] * 64] * 2
    assert data.examples == 4
    with pytest.raises(DataInvalid, match="'other'"):
        task.dataset(task.read(tmp_path / "site"), backbone, {"alpha": "a"})
    with pytest.raises(DataInvalid, match="no folder of files"):
        task.read(tmp_path / "site" / "b")


def test_data_says_its_task_before_a_colon(tmp_path: Path) -> None:
    odd = tmp_path / "text:x"
    odd.mkdir()
    assert split_data(str(odd)) == ("", str(odd)), "a path that is there is a path"
    assert split_data("text:/far/x") == ("text", "/far/x") and split_data("/far/x") == ("", "/far/x")
    assert type(task_of("")).__name__ == "ImageClassification" and type(task_of("text")).__name__ == "Text"


def test_options_for_images_are_refused_for_other_data() -> None:
    assert task_of("text").reading(Reading()).example == "example"
    with pytest.raises(SettingsInvalid, match="columns and pixels are of images; Text reads other data"):
        task_of("text").reading(Reading(label_column="y"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("speech:tiny", "there is no task 'speech'; there are: broken, odd, text"),
        ("broken:x", "task 'broken' (fedpeft_text:Absent): AttributeError"),
        ("odd:x", "task 'odd' is a int, not a fedpeft.models.tasks.Task"),
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


class Plain(Task):
    """One linear layer, which is no head, and a loss that is not one for each example."""

    def module(self, config: ModelConfig) -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(4, len(config.classes)))

    def structure(self, module: torch.nn.Module, config: ModelConfig) -> ModelStructure:
        return ModelStructure()

    def read(self, path: Path) -> Examples:
        raise DataInvalid(f"there is nothing at {path}")

    def loss(self, module: torch.nn.Module, batch: Batch) -> torch.Tensor:
        return module(batch["values"]).mean()


def test_a_model_without_blocks_or_head_and_a_loss_of_the_wrong_shape(package: types.ModuleType) -> None:
    package.Text = Plain
    backbone = backbones.build(config(), 0)
    assert backbone.module[0].weight.std() > 0.1, "its own random values, not a fresh head's"
    assert tune(backbone, "bias", {}, 0).spec.parameters == 2 and tune(backbone, "full", {}, 0).spec.parameters == 10
    for method, part in (("head", "head"), ("lora", "blocks"), ("prompt", "blocks"), ("adapter", "mlps")):
        with pytest.raises(ConfigInvalid, match=f"{method} attaches to a model's {part}"):
            tune(backbone, method, {}, 0)
    data = Examples(np.zeros((8, 4), np.float32), np.arange(8) % 2, CLASSES)
    with pytest.raises(TrainingFailed, match=r"Plain\.loss returned \(\); a loss for each of 8 is needed"):
        trained(tune(backbone, "full", {}, 0), data, settings())


@pytest.mark.parametrize(("values", "labels"), [(2, [0, 1, 1]), (0, []), (1, [2]), (1, [-1])])
def test_examples_have_a_label_each(values: int, labels: list[int]) -> None:
    with pytest.raises(DataInvalid):
        Examples(np.zeros((values, 3)), np.array(labels, np.int64), CLASSES)


class Next(Task):
    """A task without classes: from four numbers the fifth, by as many layers as an option says."""

    def module(self, config: ModelConfig) -> torch.nn.Module:
        layers = (config.options or {}).get("layers", 1)
        if not isinstance(layers, int):
            text = f"model.options.layers: {layers!r} is no whole number"
            raise ModelInvalid(text, (("model.options.layers", text),))
        return torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(layers)), torch.nn.Linear(4, 1))

    def structure(self, module: torch.nn.Module, config: ModelConfig) -> ModelStructure:
        return ModelStructure(list(dict(module.named_children()))[-1])

    def read(self, path: Path) -> Examples:
        return Examples.unlabelled(np.random.default_rng(3).normal(size=(40, 5)).astype(np.float32))

    def loss(self, module: torch.nn.Module, batch: Batch) -> torch.Tensor:
        values = batch["values"]
        return (module(values[:, :4]) - values[:, 4:]).square().mean(1)


def next_run(**model: object) -> RunConfig:
    said = {"name": "text:next", "weights": "none", **model}
    return parse_config({"model": said, "peft": {"method": "full"}, "rounds": {"count": 2, "clients": 2}})


def test_a_task_without_classes_names_none_and_has_options(package: types.ModuleType, tmp_path: Path) -> None:
    package.Text = Next
    config = next_run(options={"layers": 3})
    assert config.model.classes == ("examples",)
    assert config_from_proto(config_to_proto(config)) == config, "whole numbers are whole on the other side"
    check_run(config, "cpu")
    sites = {name: task_of("text").read(tmp_path) for name in ("a", "b")}
    report = simulate(config, sites, tmp_path / "out")
    assert report["adapter_parameters"] == 3 * 20 + 5
    ticket = report["rounds"][-1]["tickets"][0]
    assert ticket["examples"] == 40 and ticket["metrics"]["images_per_second"] > 0
    assert report["rounds"][1]["metrics"]["train_loss"] < report["rounds"][0]["metrics"]["train_loss"]


def test_options_are_a_task_s_own_and_it_says_what_is_wrong_with_them(package: types.ModuleType) -> None:
    package.Text = Next
    with pytest.raises(ModelInvalid, match=r"model\.options\.layers: 'many' is no whole number") as caught:
        backbones.build(next_run(options={"layers": "many"}).model, 0)
    assert caught.value.fields[0][0] == "model.options.layers"
    with pytest.raises(ConfigInvalid, match=r"model: options are of TASK:NAME; 'vit_tiny_patch16_224' is timm's"):
        next_run(name="vit_tiny_patch16_224", classes=["a", "b"], options={"layers": 3})
    with pytest.raises(ConfigInvalid, match=r"model\.classes"):
        next_run(name="vit_tiny_patch16_224")
    with pytest.raises(ConfigInvalid, match="1 class; at least 2"):
        next_run(name="vit_tiny_patch16_224", classes=["a"])


def test_data_without_labels_does_not_suit_a_run_with_classes(package: types.ModuleType, tmp_path: Path) -> None:
    package.Text = Next
    task, backbone = task_of("text"), backbones.build(next_run(classes=["a", "b"]).model, 0)
    with pytest.raises(DataInvalid, match=r"class 'examples' \(40 rows\) is not among the run's"):
        task.dataset(task.read(tmp_path), backbone, {})
