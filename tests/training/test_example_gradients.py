"""Example-level privacy in training: gradients of single examples of every method, their bound, noise and batches."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedpeft.config import TrainingConfig
from fedpeft.errors import TrainingFailed
from fedpeft.models.tasks import task_of
from fedpeft.peft import methods
from fedpeft.privacy import noise
from fedpeft.training.example_gradients import ExampleGradients, ExampleNoise, clipped_sum
from fedpeft.training.local_round import LoadedRun, load_run
from fedpeft.training.poisson import PoissonOrder

from ..simulation.simulated_runs import config
from .test_local_round import RUN, job_of
from .test_loop import write_images

CPU = torch.device("cpu")


def loaded(method: str, **options: Any) -> LoadedRun:
    run = load_run(config(peft={"method": method, **options}), task_of(""), None, CPU)
    run.model.trainable(1)
    with torch.no_grad():
        for p in run.model.tensors.values():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))
    return run


def hiding(run: LoadedRun, bound: float = 1e6, z: float = 1.0, expected: float = 4) -> ExampleGradients:
    return ExampleGradients(run.task, run.model, ExampleNoise(bound, z), expected, torch.float32, CPU)


def batch_of(run: LoadedRun, count: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    labels = torch.arange(count) % len(run.config.model.classes)
    return {"values": torch.randn(count, 3, 32, 32, generator=draw), "labels": labels}


@pytest.mark.parametrize("method", sorted(methods.names()))
def test_gradients_of_single_examples_are_those_of_a_loop_for_every_method(method: str) -> None:
    run = loaded(method, **({"dropout": 0.0} if method in ("prompt", "adaptformer") else {}))
    run.model.train()
    batch = batch_of(run, 3)
    found, losses = hiding(run).of_examples(batch)
    trained = {name: p for name, p in run.model.module.named_parameters() if p.requires_grad}
    assert found.keys() == trained.keys()
    for at in range(3):
        run.model.module.zero_grad()
        (loss,) = run.task.loss(run.model.module, {name: values[at : at + 1] for name, values in batch.items()})
        loss.backward()
        assert torch.allclose(losses[at], loss, atol=1e-5)
        for name, p in trained.items():
            assert p.grad is not None and torch.allclose(found[name][at], p.grad, rtol=1e-3, atol=2e-5), name


def test_dropout_has_a_mask_for_each_example() -> None:
    run = loaded("adaptformer", dropout=0.5)
    run.model.train()
    same = {name: values[:1].repeat(4, *[1] * (values.dim() - 1)) for name, values in batch_of(run, 1).items()}
    _, losses = hiding(run).of_examples(same)
    assert len(set(losses.tolist())) > 1


def test_an_example_adds_at_most_the_bound_whatever_its_gradient_is() -> None:
    draw = torch.Generator().manual_seed(2)
    scale = torch.tensor([1e-3, 1.0, 1e4, 0.0, float("nan"), 1.0])
    each = {name: torch.randn(6, *shape, generator=draw) for name, shape in (("a", (5, 3)), ("b", (7,)))}
    given = {name: values * scale.reshape(-1, *[1] * (values.dim() - 1)) for name, values in each.items()}
    given["a"][5, 0, 0] = float("inf")
    alone = []
    for at in range(6):
        parts = clipped_sum({name: values[at : at + 1] for name, values in given.items()}, 0.7)
        alone.append(torch.cat([values.flatten() for values in parts.values()]))
    norms = [float(values.norm()) for values in alone]
    assert all(norm <= 0.7 for norm in norms) and norms[1:3] == pytest.approx([0.7, 0.7], rel=1e-5)
    assert norms[0] == pytest.approx(float(torch.cat([v[0].flatten() for v in given.values()]).norm()), rel=1e-5)
    assert norms[3:] == [0.0] * 3
    together = torch.cat([values.flatten() for values in clipped_sum(given, 0.7).values()])
    assert torch.allclose(together, torch.stack(alone).sum(0), atol=1e-12)


def test_a_step_has_noise_of_the_size_that_is_accounted_for_and_an_empty_batch_has_it_too() -> None:
    run = loaded("head")
    training = SimpleNamespace(dataset=None, micro=4)
    hiding(run, bound=0.5, z=8.0, expected=16).compute(training, {})
    first = torch.cat([p.grad.flatten() for p in run.model.module.parameters() if p.grad is not None])
    assert float(first.std()) == pytest.approx(8.0 * 0.5 / 16, rel=0.15) and first.numel() > 300
    assert float(hiding(run, bound=0.5, z=8.0, expected=16).compute(training, {})) == 0.0
    again = torch.cat([p.grad.flatten() for p in run.model.module.parameters() if p.grad is not None])
    assert not torch.equal(first, again)


def test_micro_batches_add_up_and_the_divisor_is_the_expected_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "gaussian", lambda size: np.zeros(size))
    run = loaded("bias")
    monkeypatch.setattr(run.task, "transform", lambda batch, dataset: batch, raising=False)
    batch, found = batch_of(run, 5), []
    for micro in (8, 2):
        loss = hiding(run, bound=1e-3, expected=10).compute(SimpleNamespace(dataset=None, micro=micro), batch)
        assert float(loss) == pytest.approx(float(run.task.loss(run.model.module, batch).detach().mean()), abs=1e-5)
        found.append(torch.cat([p.grad.flatten() for p in run.model.module.parameters() if p.grad is not None]))
    assert torch.allclose(found[0], found[1], atol=1e-9)
    assert 0 < float(found[0].norm()) <= 5 * 1e-3 / 10


def test_a_loss_that_cannot_be_taken_apart_is_refused_with_its_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    run = loaded("head")

    def loss(module: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        found = nn.functional.cross_entropy(module(batch["values"]), batch["labels"], reduction="none")
        return found * float(found.detach().sum().item())

    monkeypatch.setattr(run.task, "loss", loss, raising=False)
    with pytest.raises(TrainingFailed, match=r'privacy\.mechanism is "example", which cannot take apart'):
        hiding(run).of_examples(batch_of(run, 2))


def test_poisson_batches_draw_each_example_apart_and_no_two_orders_are_alike() -> None:
    settings = TrainingConfig(batch_size=16, steps=3000)
    order = PoissonOrder(settings, 100)
    drawn = np.zeros((3000, 100), bool)
    for step, batch in enumerate(order):
        drawn[step, batch] = True
    assert abs(drawn.mean() - 0.16) < 0.004
    sizes = drawn.sum(1)
    assert sizes.var() == pytest.approx(100 * 0.16 * 0.84, rel=0.15)
    together = np.corrcoef(drawn[:, :20].T.astype(float))[np.triu_indices(20, 1)]
    assert abs(together.mean()) < 0.01
    short = PoissonOrder(TrainingConfig(batch_size=16), 100)
    one, again = list(short), list(short)
    assert len(one) == short.steps == 7 and all(map(np.array_equal, one, again))
    assert not all(map(np.array_equal, one, PoissonOrder(TrainingConfig(batch_size=16), 100)))
    assert all(len(batch) == 5 for batch in PoissonOrder(TrainingConfig(batch_size=16), 5))
    assert any(not len(batch) for batch in PoissonOrder(TrainingConfig(batch_size=1, steps=50), 4))


def test_no_seed_repeats_a_training_and_nothing_of_the_data_is_among_its_figures(tmp_path: Path) -> None:
    privacy = {"mechanism": "example", "clip_norm": 1.0, "noise_multiplier": 2.0, "delta": 1e-2}
    run = load_run(
        config(model=RUN.model, privacy=privacy, training={"batch_size": 1, "steps": 6}), task_of(""), None, CPU
    )
    job = job_of(run, tmp_path)
    dataset = run.dataset(run.task.read(write_images(tmp_path / "images", 4)), {})
    one, again = run.train(job, dataset), run.train(job, dataset)
    assert one.prepared.payload != again.prepared.payload
    figures = {"seconds", "steps", "threads", "privacy_epsilon", "privacy_noise_multiplier"}
    assert one.metrics.keys() == figures and one.metrics["steps"] == 6.0
