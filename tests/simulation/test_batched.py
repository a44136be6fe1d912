"""batched: the values of one client after another within a tolerance, and the same bits in each repeat."""

from dataclasses import replace
from itertools import count

import numpy as np
import pytest
import torch
from torch.func import functional_call, grad_and_value

from fedpeft import seeds
from fedpeft.adapters import payload
from fedpeft.errors import ConfigInvalid, DataInvalid, TrainingFailed
from fedpeft.models.tasks.image_classification import ImageClassification
from fedpeft.peft import methods
from fedpeft.rounds.local_job import LocalFailure, LocalJob, Version
from fedpeft.simulation import clients_of, simulate
from fedpeft.simulation.engines.batched import Batched
from fedpeft.simulation.local_trainer import Inputs, LocalTrainer
from fedpeft.training.run_spec import version_0
from fedpeft.training.stacked import StackedGradients, Turn

from ..data.test_sources import table, write
from .simulated_runs import config, same, tensors, without_clock

TOLERANCE = 1e-5
"""Largest difference of a value after a round, of tensors whose values change by 0.01 to 1."""
SIZES = {"a": 20, "b": 5, "c": 33, "d": 8, "e": 15}
METHODS = sorted(methods.names())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Clients that have 1 to 5 batches of 8, the last of 1 to 8 images."""
    root = tmp_path_factory.mktemp("batched")
    return {name: write(root / name / "data.parquet", table(size)) for name, size in SIZES.items()}


def trainer_of(data, method="bias", options=None, **training):
    run = config(
        peft={"method": method, **(options or {})},
        training={"batch_size": 8, "learning_rate": 0.05, "augmentation": "crop", **training},
    )
    return LocalTrainer(Inputs(run, data))


def jobs_of(trainer, folder, names=SIZES, number=1, state=None):
    """Returns the jobs of a round, from random values near the initial ones."""
    run, draw = trainer.run, np.random.default_rng(1)
    start = version_0(run.spec, run.model)
    start = {name: start[name] + draw.normal(0, 0.02, start[name].shape).astype(np.float32) for name in start}
    manifest, packed = payload.encode(start, run.spec.shared, "float32")
    (folder / "version").write_bytes(packed)
    version, settings = Version(manifest, folder / "version"), run.config.training
    seed = run.config.rounds.seed
    return [
        LocalJob(name, number, seeds.training(seed, number, name), settings, version, (state or {}).get(name, {}))
        for name in names
    ]


def trained(outcome):
    return payload.decode(outcome.prepared.manifest, memoryview(outcome.prepared.payload))


def difference(one, other):
    assert one.keys() == other.keys()
    return max((float(np.abs(one[name] - other[name]).max()) for name in one), default=0.0)


def together(trainer, jobs, places=3):
    """Returns the outcomes of the engine, in the order of the jobs."""
    with Batched(trainer, places) as engine:
        return list(engine.run(iter(jobs)))


def apart(one, alone):
    """Returns how far two outcomes of a client are apart, in tolerances by name; infinite where there is none."""
    exact = {"client", "examples", "facts"}
    found = {name: 0.0 if getattr(one, name) == getattr(alone, name) else np.inf for name in exact}
    for figure in ("steps", "micro_batch", "skipped_images"):
        found[figure] = 0.0 if one.metrics[figure] == alone.metrics[figure] else np.inf
    found["loss"] = abs(one.metrics["loss"] - alone.metrics["loss"]) / 1e-4
    found["trained"] = difference(trained(one), trained(alone)) / TOLERANCE
    for kept in ("if_counted", "if_not"):
        mine, wanted = getattr(one, kept), getattr(alone, kept)
        found[kept] = max((difference(mine[g], wanted[g]) for g in mine), default=0.0) / (5 * TOLERANCE)
        if mine.keys() != wanted.keys():
            found[kept] = np.inf
    return found


def moved(outcome):
    """Returns the largest change of a value."""
    return max(float(np.abs(values).max()) for values in trained(outcome).values())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_as_one_client_after_another(tmp_path, data, method):
    """With the defaults of each, dropout included."""
    trainer = trainer_of(data, method)
    jobs = jobs_of(trainer, tmp_path, number=2)
    for job, outcome in zip(jobs, together(trainer, jobs), strict=True):
        alone = trainer.train(job)
        assert max(apart(outcome, alone).values()) < 1, apart(outcome, alone)
        assert moved(alone) > 0


@pytest.mark.parametrize("method", [name for name in METHODS if name != "full"])
def test_gradients_of_a_pass_are_those_of_torch_func(tmp_path, data, method):
    options = {"dropout": 0.0} if method in ("prompt", "adaptformer") else {}
    trainer = trainer_of(data, method, options, augmentation="none")
    run, turns = trainer.run, []
    for job in jobs_of(trainer, tmp_path, ("a", "c", "e", "d")):
        training, stream = trainer.begin(job)
        with torch.no_grad():
            for p, shift in zip(training.tensors.values(), count(1), strict=False):
                p.add_(0.01 * len(turns) * shift**0.5)
        turns.append(Turn(training, stream, next(training.steps())))
    turns[1] = replace(turns[1], batch={name: values[:5] for name, values in turns[1].batch.items()})
    run.model.train()
    losses = StackedGradients(run.task, run.model, run.device).compute(turns)

    for turn, loss in zip(turns, losses, strict=True):
        batch = run.task.transform(turn.batch, turn.training.dataset)
        own = {run.model.names[name]: p.detach() for name, p in turn.training.tensors.items()}

        def mean(values, batch=batch):
            logits = functional_call(run.model.module, values, (batch["values"],))
            return torch.nn.functional.cross_entropy(logits, batch["labels"])

        wanted, value = grad_and_value(mean)(own)
        assert torch.allclose(loss, value, atol=1e-6)
        for name, p in turn.training.tensors.items():
            if p.requires_grad:
                truth = wanted[run.model.names[name]]
                # sums of float32 that nearly cancel, as a norm's, differ by 7e-4 with the kernels of some processors
                assert float((p.grad - truth).abs().max()) < 1e-3 * float(truth.abs().max()) + 1e-6, name


@pytest.mark.parametrize(
    "training",
    [
        {"optimizer": "adamw", "learning_rate": 0.001},
        {"epochs": 3, "clip_gradient_norm": 0.5},
        {"epochs": None, "steps": 4},
        {"algorithm": {"name": "fedprox", "mu": 0.5}},
    ],
)
def test_optimizers_clipping_steps_and_fedprox_are_each_clients_own(tmp_path, data, training):
    trainer = trainer_of(data, "lora", **{key: value for key, value in training.items() if value is not None})
    jobs = jobs_of(trainer, tmp_path)
    for job, outcome in zip(jobs, together(trainer, jobs), strict=True):
        alone = trainer.train(job)
        assert max(apart(outcome, alone).values()) < 1, apart(outcome, alone)
        assert moved(alone) > 0


@pytest.mark.parametrize("algorithm", ["scaffold", "feddyn"])
def test_kept_state_of_local_algorithms_is_each_clients_own(tmp_path, data, algorithm):
    options = {"population": 5} if algorithm == "scaffold" else {"alpha": 0.1}
    trainer = trainer_of(data, algorithm={"name": algorithm, **options}, momentum=0.0)
    kept = {}
    for number in (1, 2):
        jobs = jobs_of(trainer, tmp_path, number=number, state=kept)
        outcomes = together(trainer, jobs)
        for job, outcome in zip(jobs, outcomes, strict=True):
            alone = trainer.train(job)
            assert max(apart(outcome, alone).values()) < 1, apart(outcome, alone)
        kept = {outcome.client: outcome.if_counted for outcome in outcomes}
        assert all(any(group.startswith(algorithm) and kept[name][group] for group in kept[name]) for name in kept)


def test_a_client_that_has_finished_is_not_touched(tmp_path, data):
    """Its bits are those that it has without the others' further steps; a pass of one client is a training alone."""
    trainer = trainer_of(data, "lora")
    jobs = {job.client: job for job in jobs_of(trainer, tmp_path)}
    few = replace(jobs["a"], settings=jobs["a"].settings.model_copy(update={"steps": 1, "epochs": None}))
    beside = [Batched(trainer, 2).run([few, replace(jobs["c"], settings=few.settings)])]
    beside.append(Batched(trainer, 2).run([few, jobs["c"]]))
    finished, goes_on = (list(outcomes) for outcomes in beside)
    assert same(trained(finished[0]), trained(goes_on[0]))
    assert not same(trained(finished[1]), trained(goes_on[1]))
    alone = next(Batched(trainer, 1).run([jobs["c"]]))
    assert same(trained(alone), trained(trainer.train(jobs["c"])))


def test_jobs_are_taken_a_few_ahead_and_places_are_filled_again(tmp_path, data):
    trainer, taken = trainer_of(data), []

    def source():
        for job in jobs_of(trainer, tmp_path, ("c", "b", "d", "a", "e")):
            taken.append(job.client)
            yield job

    outcomes = Batched(trainer, 2).run(source())
    assert taken == []
    assert next(outcomes).client == "c"
    assert taken == ["c", "b", "d", "a"], "the longest keeps its place, the others take turns"
    assert [outcome.client for outcome in outcomes] == ["b", "d", "a", "e"]


def test_a_pass_that_does_not_fit_is_made_with_fewer_clients(tmp_path, data, monkeypatch):
    trainer, passes = trainer_of(data, "prompt"), []
    jobs, real = jobs_of(trainer, tmp_path), StackedGradients._mapped

    def full(self, values, clients, batch):
        passes.append(len(clients.turns))
        if len(clients.turns) > 2:
            real(self, values, clients, batch)
            raise torch.OutOfMemoryError("full")
        return real(self, values, clients, batch)

    monkeypatch.setattr(StackedGradients, "_mapped", full)
    outcomes = together(trainer, jobs, places=4)
    assert passes[0] == 4 and set(passes[1:]) == {2}
    assert all(
        max(apart(outcome, trainer.train(job)).values()) < 1 for job, outcome in zip(jobs, outcomes, strict=True)
    )


def test_one_whose_loss_is_not_finite_fails_alone(tmp_path, data, monkeypatch):
    trainer = trainer_of(data)
    jobs, real = jobs_of(trainer, tmp_path), ImageClassification.transform

    def broken(self, batch, dataset):
        inputs = real(self, batch, dataset)
        return {**inputs, "values": inputs["values"] * (np.nan if len(dataset) == SIZES["c"] else 1)}

    monkeypatch.setattr(ImageClassification, "transform", broken)
    outcomes = {outcome.client: outcome for outcome in Batched(trainer, 3).run(jobs)}
    assert isinstance(outcomes["c"], LocalFailure) and "the loss is nan in step 1" in outcomes["c"].error.message
    for job in jobs:
        if job.client != "c":
            assert difference(trained(outcomes[job.client]), trained(trainer.train(job))) < TOLERANCE


def test_a_loss_that_cannot_be_mapped_is_refused_at_its_place_in_the_run_file(tmp_path, data, monkeypatch):
    trainer = trainer_of(data)
    jobs, real = jobs_of(trainer, tmp_path), ImageClassification.loss
    monkeypatch.setattr(ImageClassification, "loss", lambda *each: real(*each) * (1 if real(*each).sum() > 0 else 2))
    with pytest.raises(ConfigInvalid, match=r"batched.*cannot compute this model or loss") as refused:
        list(Batched(trainer, 2).run(jobs))
    assert [path for path, _ in refused.value.fields] == ["simulation.engine"]


def test_a_wrong_shape_of_losses_fails_every_client(tmp_path, data, monkeypatch):
    trainer = trainer_of(data)
    jobs, real = jobs_of(trainer, tmp_path, ("a", "c")), ImageClassification.loss
    monkeypatch.setattr(ImageClassification, "loss", lambda *each: real(*each).mean())
    outcomes = list(Batched(trainer, 2).run(jobs))
    assert all(isinstance(outcome.error, TrainingFailed) for outcome in outcomes)
    assert "a loss for each of 8 is needed" in outcomes[0].error.message


def test_data_that_cannot_be_used_end_the_simulation_with_the_name_of_their_client(tmp_path):
    odd = write(tmp_path / "odd" / "data.parquet", table(6, names=("cat", "dog", "yak")))
    good = write(tmp_path / "good" / "data.parquet", table(6))
    run = config(rounds={"count": 1, "clients": 2}, simulation={"engine": "batched"})
    with pytest.raises(DataInvalid, match=r"client odd: class 'yak' \(2 rows\) is not among the run's"):
        simulate(run, {"good": good, "odd": odd}, tmp_path / "out")


def test_a_simulation_has_the_same_bits_each_time_and_the_report_of_one_client_after_another(tmp_path):
    """With residuals, a late client in every round, and more clients than places."""
    whole, reports = write(tmp_path / "whole.parquet", table(48)), {}
    for name, engine in (("first", "batched"), ("again", "batched"), ("alone", "inprocess")):
        settings = {"clients": 5, "partition": "dirichlet", "alpha": 1.0, "engine": engine}
        settings |= {"workers": 2} if engine == "batched" else {}
        rounds = {"count": 3, "clients": 3, "over_selection": 0.3, "quorum": 2, "seed": 7}
        run = config(rounds=rounds, simulation=settings, codec={"up": "float16", "error_feedback": True})
        reports[name] = simulate(run, clients_of(whole, run)[0], tmp_path / name)
    assert without_clock(reports["first"]) == without_clock(reports["again"])
    for file in ("adapter.safetensors", "records.jsonl"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
    assert difference(tensors(tmp_path / "first")[1], tensors(tmp_path / "alone")[1]) < 1e-3  # float16 rounds elsewhere
    tickets = {name: [row["tickets"] for row in report["rounds"]] for name, report in reports.items()}
    states = {name: [[(t["client"], t["state"]) for t in row] for row in each] for name, each in tickets.items()}
    assert states["first"] == states["alone"]


def test_other_precisions_than_float32_are_refused_at_the_engines_place(data):
    with pytest.raises(ConfigInvalid, match="computes in float32") as refused:
        Batched(trainer_of(data, precision="bfloat16"))
    assert [path for path, _ in refused.value.fields] == ["simulation.engine"]
