"""Engines: the same bits from all of them, errors with the client's name, and no process left behind."""

import os
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from fedpeft.errors import ConfigInvalid, DataInvalid, TrainingFailed
from fedpeft.simulation import clients_of, simulate
from fedpeft.simulation.engines import processes

from ..data.test_sources import table, write
from ..outside_package import PRIVATE_HEAD, install
from .simulated_runs import config, same, tensors, without_clock

pytestmark = pytest.mark.usefixtures("preloaded")

REVERSED = """
from fedpeft.simulation.engines import Engine


class Reversed(Engine):
    closed = False

    def run(self, jobs):
        taken = list(jobs)
        outcomes = {job.client: self.trainer.train(job) for job in reversed(taken)}
        return iter([outcomes[job.client] for job in taken])

    def close(self):
        Reversed.closed = True
"""


@pytest.fixture
def whole(tmp_path):
    return write(tmp_path / "whole.parquet", table(48))


@pytest.fixture
def started(monkeypatch):
    """Returns the process ids of the workers that were started."""
    real, pids = processes._Worker.__init__, []

    def noted(self, *arguments):
        real(self, *arguments)
        pids.append(self._process.pid)

    monkeypatch.setattr(processes._Worker, "__init__", noted)
    return pids


def gone(pids):
    """Returns True once none of the processes is there."""
    until = time.monotonic() + 20
    while any(os.path.exists(f"/proc/{pid}") for pid in pids):
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


def run_file(engine, workers=2, **sections):
    settings = {"clients": 5, "partition": "dirichlet", "alpha": 1.0, "engine": engine}
    settings |= {"workers": workers} if engine != "inprocess" else {}
    rounds = {"count": 3, "clients": 3, "over_selection": 0.3, "quorum": 2, "seed": 7}
    return config(**{"rounds": rounds, "simulation": settings, **sections})


@pytest.mark.parametrize("method", ["bias", "private_head"])
def test_processes_make_the_bits_and_the_report_of_one_process(tmp_path, monkeypatch, whole, started, method):
    """With residuals, a late client in every round, and for one method local tensors."""
    install(tmp_path / "outside", monkeypatch, PRIVATE_HEAD, {"fedpeft.peft/private_head": "PrivateHead"})
    reports = {}
    for engine in ("inprocess", "processes"):
        run = run_file(engine, method=method, codec={"up": "sparse", "density": 0.2, "values": "float16"})
        reports[engine] = simulate(run, clients_of(whole, run)[0], tmp_path / engine, evaluate=whole)
    assert without_clock(reports["inprocess"]) == without_clock(reports["processes"])
    late = [t for row in reports["processes"]["rounds"] for t in row["tickets"] if t["state"] == "late"]
    assert len(late) == 3
    assert same(tensors(tmp_path / "inprocess")[1], tensors(tmp_path / "processes")[1])
    for file in ("adapter.safetensors", "records.jsonl"):
        assert (tmp_path / "inprocess" / file).read_bytes() == (tmp_path / "processes" / file).read_bytes()
    assert reports["processes"]["facts"]["threads"] == str(torch.get_num_threads())
    assert len(started) == 2 and gone(started)


def test_a_worker_that_dies_ends_the_simulation_with_the_name_of_its_client(tmp_path, whole, started):
    def kill(*_):
        for pid in started:
            os.kill(pid, signal.SIGKILL)

    run = run_file("processes")
    died = r"client client-\d: the worker process that trained it was ended by SIGKILL"
    with pytest.raises(TrainingFailed, match=died):
        simulate(run, clients_of(whole, run)[0], tmp_path / "out", worked=kill)
    assert gone(started)
    left = [path.name for path in (tmp_path / "out").iterdir() if path.is_dir()]
    assert left == ["unfinished"], "the scratch folder is removed"


def test_data_that_a_worker_cannot_use_ends_the_simulation_with_the_name_of_its_client(tmp_path, whole, started):
    run = run_file("processes", rounds={"count": 1, "clients": 2})
    odd = write(tmp_path / "odd" / "data.parquet", table(6, names=("cat", "dog", "yak")))
    with pytest.raises(DataInvalid, match=r"client odd: class 'yak' \(2 rows\) is not among the run's"):
        simulate(run, {"good": whole, "odd": odd}, tmp_path / "out")
    assert gone(started)


def test_a_worker_ends_with_its_parent():
    ours, theirs = socket.socketpair()
    with theirs:
        worker = subprocess.Popen([sys.executable, "-m", "fedpeft.simulation.worker"], stdin=theirs.fileno())
    ours.close()  # as when the parent is killed
    assert worker.wait(60) == 0


def test_an_interrupt_leaves_no_process(tmp_path, whole, started):
    def interrupt(*_):
        raise KeyboardInterrupt

    run = run_file("processes")
    with pytest.raises(KeyboardInterrupt):
        simulate(run, clients_of(whole, run)[0], tmp_path / "out", worked=interrupt)
    assert started and gone(started)


def test_workers_are_as_many_as_there_are_cores_for_their_threads(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    trainer = SimpleNamespace(run=SimpleNamespace(config=None, device=torch.device("cpu")))
    assert processes.Processes(trainer)._count == 2
    assert processes.Processes(trainer, 5)._count == 5
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    assert processes.Processes(trainer)._count == 1


def test_an_engine_of_an_installed_package_is_one_class_and_makes_the_same_bits(tmp_path, monkeypatch, whole):
    install(tmp_path / "outside", monkeypatch, REVERSED, {"fedpeft.simulation.engines/reversed": "Reversed"})
    for engine in ("inprocess", "reversed"):
        run = run_file(engine)
        simulate(run, clients_of(whole, run)[0], tmp_path / engine)
    assert same(tensors(tmp_path / "inprocess")[1], tensors(tmp_path / "reversed")[1])
    import outside_package

    assert outside_package.Reversed.closed


def test_an_engine_that_nobody_brings_is_refused_at_its_place_in_the_run_file(tmp_path, whole):
    run = run_file("abacus")
    there = "there is no engine 'abacus'; there are: batched, inprocess, processes, ray"
    with pytest.raises(ConfigInvalid, match=there) as refused:
        simulate(run, {"a": whole, "b": whole, "c": whole}, tmp_path / "out")
    assert [path for path, _ in refused.value.fields] == ["simulation.engine"]
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigInvalid, match=r"simulation\.workers"):
        config(simulation={"workers": 0})
