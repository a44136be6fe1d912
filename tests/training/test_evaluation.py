from functools import partial

import numpy as np
import pytest
import torch

from fedpeft.data.dataset import open_dataset
from fedpeft.errors import DataInvalid, TrainingFailed
from fedpeft.models.tasks import task_of
from fedpeft.training import evaluation

from .test_loop import CLASSES, INPUT, StandIn, data, train, vit, write_images

evaluate = partial(evaluation.evaluate, task_of(""))


def test_figures_are_those_of_a_plain_loop(tmp_path):
    model, dataset = StandIn(dropout=0.5), data(tmp_path, 30)
    model.train()
    figures = evaluate(model, dataset, batch_size=7)
    model.eval()
    images = torch.stack([dataset[i][0] for i in range(30)])
    labels = torch.tensor(dataset.labels)
    with torch.no_grad():
        logits = model.module(images)
    right = (logits.argmax(1) == labels).numpy()
    assert figures["accuracy"] == pytest.approx(right.mean())
    assert figures["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert figures["examples"] == 30
    for k, name in enumerate(CLASSES):
        assert figures[f"accuracy/{name}"] == pytest.approx(right[dataset.labels == k].mean())
    assert evaluate(model, dataset, batch_size=7) == figures


def test_classes_without_examples_and_long_names(tmp_path):
    root = write_images(tmp_path / "x", 4)
    long = "d" * 200
    dataset = open_dataset(root, ("empty", long, "light"), INPUT, label_map={"dark": long})
    model = StandIn()
    model.module[2] = torch.nn.Linear(192, 3)
    figures = evaluate(model, dataset)
    per_class = [name for name in figures if name.startswith("accuracy/")]
    assert len(per_class) == 2
    assert per_class[1] == "accuracy/light"
    assert len(per_class[0]) == 128
    assert per_class[0].startswith("accuracy/dddd")


def test_unreadable_images_are_left_out(tmp_path):
    figures = evaluate(StandIn(), data(tmp_path, 100, broken={5}), batch_size=1)
    assert (figures["examples"], figures["skipped_images"]) == (99, 1)
    with pytest.raises(DataInvalid, match="none of 10 images can be read"):
        evaluate(StandIn(), data(tmp_path, 10, broken=set(range(10))))


def test_memory_that_holds_fewer_images(tmp_path):
    model, dataset = StandIn(), data(tmp_path, 30)
    whole = evaluate(model, dataset)
    limit = 4

    def full(_, inputs):
        if len(inputs[0]) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")

    model.module.register_forward_pre_hook(full)
    assert evaluate(model, dataset) == pytest.approx(whole)
    limit = 0
    with pytest.raises(TrainingFailed, match="not even one image"):
        evaluate(model, dataset)


def test_a_real_model_is_scored_and_can_train_afterwards(tmp_path):
    from .test_loop import settings

    model, dataset = vit("lora"), data(tmp_path, 30)
    dataset = open_dataset(tmp_path / "images-30", CLASSES, dataset.preprocessing.of(model.backbone))
    before = evaluate(model, dataset)
    train(model, dataset, settings(epochs=4), seed=1, number=1)
    after = evaluate(model, dataset)
    assert after["loss"] < before["loss"]
    assert np.isfinite(list(after.values())).all()
