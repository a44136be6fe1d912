"""A client's round as a value: the same bits wherever it is computed, and state for either outcome."""

import pickle
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
import torch

from fedpeft import seeds
from fedpeft.adapters import payload
from fedpeft.adapters.sections import initial
from fedpeft.config import PeftConfig, parse_config
from fedpeft.errors import ModelInvalid, PayloadInvalid
from fedpeft.models.tasks import task_of
from fedpeft.rounds.groups import LOCAL, RESIDUAL
from fedpeft.rounds.local_job import LocalJob, Version
from fedpeft.training.local_round import load_run

from ..outside_package import PRIVATE_HEAD, install
from ..programs import run_program
from .test_loop import CLASSES, write_images

RUN = parse_config(
    {
        "model": {
            "name": "vit_tiny_patch16_224",
            "weights": "none",
            "image_size": 32,
            "depth": 1,
            "classes": list(CLASSES),
        },
        "peft": {"method": "lora", "rank": 2, "dropout": 0.1},
        "training": {"batch_size": 8, "learning_rate": 0.05, "augmentation": "crop"},
        "codec": {"up": "sparse", "density": 0.1, "values": "float16"},
    }
)
ELSEWHERE = """
import pickle, sys, torch
torch.set_num_threads(1)
from fedpeft.models.tasks import task_of
from fedpeft.training.local_round import load_run
config, data, job = pickle.load(open(sys.argv[1], "rb"))
run = load_run(config, task_of(""), None, torch.device("cpu"))
update = run.train(job, run.dataset(run.task.read(data), {}))
pickle.dump(update, open(sys.argv[2], "wb"))
"""


def loaded(config=RUN):
    return load_run(config, task_of(""), None, torch.device("cpu"))


def job_of(run, folder, **parts):
    manifest, data = payload.encode(run.model.state(), run.model.spec.shared, "float32")
    (folder / "version").write_bytes(data)
    seed = seeds.training(0, 3, "site-a")
    return LocalJob("site-a", 3, seed, run.config.training, Version(manifest, folder / "version"), **parts)


def same_groups(one, other):
    return one.keys() == other.keys() and all(
        one[g].keys() == other[g].keys() and all(np.array_equal(one[g][n], other[g][n]) for n in one[g]) for g in one
    )


@pytest.mark.parametrize("method", ["lora", "private_head"])
def test_another_process_makes_the_same_bits_of_a_pickled_job(tmp_path, monkeypatch, method):
    config = RUN
    if method == "private_head":
        install(tmp_path / "outside", monkeypatch, PRIVATE_HEAD, {"fedpeft.peft/private_head": "PrivateHead"})
        config = RUN.model_copy(update={"peft": PeftConfig(method=method)})
    data = write_images(tmp_path / "images", 20)
    run = loaded(config)
    job = job_of(run, tmp_path)
    dataset = run.dataset(run.task.read(data), {})
    first = run.train(job, dataset)
    job = replace(job, round=4, state=first.if_not)  # a late client: all of its update is in the residual
    here = run.train(job, dataset)
    given, made = tmp_path / "given", tmp_path / "made"
    given.write_bytes(pickle.dumps((config, data, job)))
    done = run_program(tmp_path, ELSEWHERE, str(given), str(made))
    assert done.returncode == 0, done.stderr
    there = pickle.loads(made.read_bytes())
    assert there.prepared.payload == here.prepared.payload
    assert (there.client, there.prepared.manifest, there.facts) == ("site-a", here.prepared.manifest, here.facts)
    assert same_groups(there.if_counted, here.if_counted) and same_groups(there.if_not, here.if_not)
    assert there.examples == 20 and there.facts["threads"] == "1"
    assert there.metrics["loss"] == here.metrics["loss"]
    assert not same_groups(first.if_not, here.if_not)
    assert sorted(here.if_not[LOCAL]) == (["head.bias", "head.weight"] if method == "private_head" else [])


def test_a_group_that_does_not_depend_on_the_outcome_is_one_object_and_a_job_is_frozen(tmp_path):
    run = loaded()
    job = job_of(run, tmp_path)
    update = run.train(job, run.dataset(run.task.read(write_images(tmp_path / "images", 8)), {}))
    assert update.if_counted[LOCAL] is update.if_not[LOCAL] == {}
    assert update.if_counted[RESIDUAL].keys() == update.if_not[RESIDUAL].keys()
    back = pickle.loads(pickle.dumps(update))
    assert back.if_counted[LOCAL] is back.if_not[LOCAL]
    with pytest.raises(FrozenInstanceError):
        job.round = 2


def test_the_state_of_tensors_that_a_round_does_not_train_stays(tmp_path):
    """B and A take turns: the control variates of one survive the other's round."""
    training = {"batch_size": 8, "momentum": 0.0, "algorithm": {"name": "scaffold", "population": 2}}
    said = {**RUN.model_dump(exclude={"codec", "peft", "training"}, exclude_none=True), "rounds": {"clients": 2}}
    run = loaded(parse_config({**said, "peft": {"method": "rolora", "rank": 2}, "training": training}))
    manifest, data = payload.encode({**run.model.state(), **initial(run.spec)}, run.spec.shared, "float32")
    (tmp_path / "version").write_bytes(data)
    dataset = run.dataset(run.task.read(write_images(tmp_path / "images", 16)), {})
    job = LocalJob("site-a", 1, 7, run.config.training, Version(manifest, tmp_path / "version"))
    first = run.train(job, dataset)
    second = run.train(replace(job, round=2, state=first.if_counted), dataset)
    before, after = (update.if_counted["scaffold-control"] for update in (first, second))
    idle = [name for name in before if "lora_B" in name]
    assert idle and {name for name in after if "lora_" in name} > set(idle)
    assert all(np.array_equal(before[name], after[name]) and before[name].any() for name in idle)
    assert same_groups(second.if_not, {**second.if_not, "scaffold-control": before})


def test_a_version_that_is_not_what_its_manifest_says_is_refused(tmp_path):
    run = loaded()
    job = job_of(run, tmp_path)
    dataset = run.dataset(run.task.read(write_images(tmp_path / "images", 8)), {})
    whole = job.version.payload.read_bytes()
    job.version.payload.write_bytes(whole[:-4])
    with pytest.raises(PayloadInvalid, match="its manifest says"):
        run.train(job, dataset)
    job.version.payload.write_bytes(whole)
    with pytest.raises(ModelInvalid, match="tensor other is not of adapter lora"):
        run.train(replace(job, state={LOCAL: {"other": np.zeros(2, np.float32)}}), dataset)
