"""Features that are kept: the adapters of runs without, with the frozen front computed once an example."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from structlog.testing import capture_logs

from fedpeft.adapters import payload
from fedpeft.config import parse_config
from fedpeft.errors import ConfigInvalid, DataInvalid
from fedpeft.models.halves import _VitFront
from fedpeft.models.tasks.image_classification import ImageClassification
from fedpeft.peft import methods
from fedpeft.peft.partial import Partial
from fedpeft.rounds.local_job import LocalJob, Version
from fedpeft.simulation import simulate
from fedpeft.simulation.local_trainer import Inputs, LocalTrainer
from fedpeft.training.example_gradients import ExampleGradients, ExampleNoise
from fedpeft.training.features.divided_task import KeptFeatures
from fedpeft.training.local_round import LoadedRun
from fedpeft.training.run_spec import spec_without_weights

from ..data.test_sources import table, write
from .simulated_runs import MODEL, same, tensors, without_clock

TOLERANCE = 1e-6
"""Largest difference of a value after two rounds, of tensors whose values change by 0.01 to 1."""
SIZES = {"a": 20, "b": 5, "c": 17}
"""Examples of each client: last batches of 4, 5 and 1."""
HELD_OUT = 11
TUNED = {"head": {"method": "head"}, "partial": {"method": "partial", "blocks": 1}}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("kept")
    sizes = {**SIZES, "held-out": HELD_OUT}
    return {name: write(root / name / "data.parquet", table(size)) for name, size in sizes.items()}


@pytest.fixture
def fronts(monkeypatch):
    """Returns the number of examples of each call of the front."""
    seen, real = [], _VitFront.forward

    def counted(self, images):
        seen.append(len(images))
        return real(self, images)

    monkeypatch.setattr(_VitFront, "forward", counted)
    return seen


def run_file(tuned="head", keep=True, engine="inprocess", more=None, **training):
    settings = {"batch_size": 8, "learning_rate": 0.05, "augmentation": "none", "epochs": 2, "keep_features": keep}
    return parse_config(
        {
            "model": {**MODEL, "depth": 2},
            "peft": TUNED.get(tuned, {"method": tuned}),
            "training": {**settings, **training},
            "rounds": {"count": 2, "clients": 3, "seed": 7},
            "simulation": {"engine": engine} | ({} if engine == "inprocess" else {"workers": 2}),
            **(more or {}),
        }
    )


def held(config, data, out):
    clients = {name: data[name] for name in SIZES}
    return simulate(config, clients, out, evaluate=data["held-out"])


def assert_near(one, other, tolerance=TOLERANCE):
    assert one.keys() == other.keys()
    assert max(float(np.abs(one[name] - other[name]).max()) for name in one) <= tolerance


@pytest.mark.parametrize("engine", ["inprocess", "batched"])
@pytest.mark.parametrize("tuned", TUNED)
def test_adapters_and_scores_are_those_of_a_run_without(tmp_path, data, tuned, engine):
    reports, found = [], []
    for keep in (False, True):
        out = tmp_path / str(keep)
        reports.append(held(run_file(tuned, keep, engine), data, out))
        found.append(tensors(out)[1])
    tolerance = 1e-5 if engine == "batched" else TOLERANCE  # as batched is from inprocess
    assert_near(*found, tolerance)
    first = tmp_path / "first"
    held(run_file(tuned).model_copy(update={"rounds": run_file().rounds.model_copy(update={"count": 1})}), data, first)
    moved = max(float(np.abs(found[1][name] - value).max()) for name, value in tensors(first)[1].items())
    assert moved > 100 * tolerance, "a round changes more than the tolerance"
    for plain, kept in zip(*(report["rounds"] for report in reports), strict=True):
        assert plain["metrics"].keys() == kept["metrics"].keys()
        assert kept["metrics"]["loss"] == pytest.approx(plain["metrics"]["loss"], abs=1e-4)


@pytest.mark.parametrize("engine", ["inprocess", "batched"])
@pytest.mark.parametrize("tuned", TUNED)
def test_the_front_computes_every_example_once(tmp_path, data, fronts, tuned, engine):
    held(run_file(tuned, engine=engine), data, tmp_path / "out")
    assert sum(fronts) == sum(SIZES.values()) + HELD_OUT
    assert sorted(fronts) == sorted([8, 8, 4, 5, 8, 8, 1, 8, 3])


def test_engines_make_the_same_bits_and_a_repeat_too(tmp_path, data, preloaded):
    reports = {}
    for name, engine in (("one", "inprocess"), ("again", "inprocess"), ("two", "processes")):
        reports[name] = held(run_file("partial", engine=engine), data, tmp_path / name)
    assert without_clock(reports["one"]) == without_clock(reports["two"]) == without_clock(reports["again"])
    assert same(tensors(tmp_path / "one")[1], tensors(tmp_path / "two")[1])


def test_local_algorithms_are_those_of_a_run_without(tmp_path, data):
    found, more = [], {"aggregation": {"strategy": "feddyn", "population": 3}, "codec": {"error_feedback": False}}
    for keep in (False, True):
        run = run_file("partial", keep, more=more, algorithm={"name": "feddyn"}, momentum=0.0)
        held(run, data, tmp_path / str(keep))
        found.append(tensors(tmp_path / str(keep))[1])
    assert_near(*found)


def test_gradients_of_single_examples_go_through_the_back(tmp_path, data):
    """Those of runs that hide single examples; their noise is of no seed."""
    found = []
    for keep in (False, True):
        trainer = trainer_of(data, tuned="partial", keep=keep)
        run, dataset = trainer.run, trainer._prepared("a")
        assert isinstance(dataset, KeptFeatures) == keep
        (rows,) = dataset.batches([np.arange(6)])
        batch = run.trained_task.transform(run.trained_task.collate(rows, None), dataset)
        noise = ExampleNoise(1.0, 1.0)
        hiding = ExampleGradients(run.trained_task, run.model, noise, 6, torch.float32, run.device)
        gradients, _ = hiding.of_examples(batch)
        found.append({name: each.numpy() for name, each in gradients.items()})
    assert_near(*found, 1e-5)


def trainer_of(data, limit=None, **changes):
    trainer = LocalTrainer(Inputs(run_file(**changes), {name: data[name] for name in SIZES}, data["held-out"]))
    if limit is not None:
        trainer.run.features._limit_bytes = limit
    return trainer


def job_of(trainer, folder, client="a", number=1):
    manifest, packed = payload.encode(trainer.run.model.state(), trainer.run.model.spec.shared, "float32")
    (folder / "version").write_bytes(packed)
    return LocalJob(client, number, 5, trainer.run.config.training, Version(manifest, folder / "version"))


def trained(trainer, job):
    update = trainer.train(job)
    return payload.decode(update.prepared.manifest, memoryview(update.prepared.payload))


def test_what_is_beyond_the_limit_is_computed_anew_to_the_same_bits(tmp_path, data, fronts):
    plain, bounded = trainer_of(data), trainer_of(data)
    wanted = {name: trained(plain, job_of(plain, tmp_path, name)) for name in SIZES}
    one = plain.run.features._kept["a"].nbytes
    assert one == SIZES["a"] * (192 * 4 + 8), "pooled features, and a label"
    bounded.run.features._limit_bytes = one
    with capture_logs() as logs:
        for number in (1, 2):
            fronts.clear()
            for name in SIZES:
                found = trained(bounded, job_of(bounded, tmp_path, name, number))
                assert number == 2 or same(found, wanted[name])
    assert sum(fronts) == SIZES["b"] + SIZES["c"], "in the second round, those that are not kept"
    assert [log["event"] for log in logs] == ["features of further data are computed anew in each round"]


def test_features_do_not_depend_on_the_round_that_computes_them(tmp_path, data):
    """As in a simulation that was killed and goes on, and in a worker that gets a client later."""
    early, late = trainer_of(data, tuned="partial"), trainer_of(data, tuned="partial")
    second = job_of(late, tmp_path, number=2)
    trained(early, replace(second, round=1, seed=6))
    assert same(trained(early, second), trained(late, second))


def test_a_data_set_that_alone_is_beyond_the_limit_is_trained_as_without(tmp_path, data, fronts):
    plain, bounded = trainer_of(data, keep=False), trainer_of(data, limit=1000)
    job = job_of(bounded, tmp_path)
    wanted = trained(plain, job)
    with capture_logs() as logs:
        for _ in range(2):
            fronts.clear()
            assert_near(trained(bounded, job), wanted)
    assert [(log["event"], log["bytes"]) for log in logs] == [("features are not kept: too many", 20 * 776)]
    assert sum(fronts) == 8 + 2 * SIZES["a"], "a batch to see their size, and two passes"


def test_data_are_not_opened_again_once_their_features_are_kept(tmp_path, data, monkeypatch):
    trainer = trainer_of(data)
    trained(trainer, job_of(trainer, tmp_path))
    monkeypatch.setattr(LoadedRun, "dataset", None)
    trainer._data._open.clear()
    assert trained(trainer, job_of(trainer, tmp_path, number=2))


def test_an_unreadable_image_keeps_its_place(tmp_path, data):
    broken = table(200)
    images = broken["image"].to_pylist()
    images[13] = {"bytes": b"no image", "path": "13.png"}
    path = write(tmp_path / "broken.parquet", broken.set_column(0, broken.schema.field("image"), [images]))
    both = []
    for keep in (False, True):
        trainer = trainer_of({**data, "a": path}, keep=keep)
        update = trainer.train(job_of(trainer, tmp_path))
        assert update.examples == 199 and update.metrics["skipped_images"] == 1
        both.append(payload.decode(update.prepared.manifest, memoryview(update.prepared.payload)))
    assert_near(*both)
    images[14] = images[15] = images[13]
    write(path, broken.set_column(0, broken.schema.field("image"), [images]))
    trainer = trainer_of({**data, "a": path})
    with pytest.raises(DataInvalid, match=r"^client a: 3 of 200 images"):
        trainer.train(job_of(trainer, tmp_path))


def test_computing_stops_as_asked(tmp_path, data):
    trainer = trainer_of(data)
    with pytest.raises(Exception, match="stopped as asked, before its first step"):
        trainer.run.prepared("a", lambda: trainer._data.of("a"), lambda: True)


@pytest.mark.parametrize("method", sorted(methods.names()))
def test_only_methods_that_tune_the_end_keep_features(method):
    """The others are refused from the model without weights, before anything runs, with the tensor that comes first."""
    if method in TUNED:
        assert spec_without_weights(run_file(method))
        return
    with pytest.raises(ConfigInvalid, match=f"method '{method}' tunes .*, at the model's beginning") as refused:
        spec_without_weights(run_file(method))
    assert [field for field, _ in refused.value.fields] == ["training.keep_features"]


def test_what_else_would_change_features_is_refused_before_anything_runs(tmp_path, data, monkeypatch):
    with pytest.raises(ConfigInvalid, match=r'training\.keep_features: .*augmentation "flip" changes .* = "none"'):
        run_file(augmentation="flip")
    monkeypatch.setitem(TUNED, "partial", {"method": "partial", "blocks": 2})
    with pytest.raises(ConfigInvalid, match=r"tunes blocks\.0\..*at the model's beginning"):
        held(run_file("partial"), data, tmp_path / "out")
    monkeypatch.setitem(TUNED, "partial", {"method": "partial", "blocks": 1})
    with monkeypatch.context() as changed:
        changed.setattr(Partial, "whole_model_trains", True)
        with pytest.raises(ConfigInvalid, match=r"the whole model in training mode, where dropout"):
            held(run_file("partial"), data, tmp_path / "out")
    monkeypatch.setattr(ImageClassification, "halves", lambda *_: None)
    with pytest.raises(ConfigInvalid, match=r"vit_tiny_patch16_224 cannot be divided before head\.") as refused:
        held(run_file(), data, tmp_path / "out")
    assert [field for field, _ in refused.value.fields] == ["training.keep_features"]
    assert not (tmp_path / "out" / "report.json").exists()
