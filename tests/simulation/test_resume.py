"""A simulation that is killed at any instant goes on to the same bits, as the next one in its folder."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
import warnings
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from fedpeft.data import pixel_cache
from fedpeft.data.sources.parquet import ParquetSource
from fedpeft.errors import StateInvalid
from fedpeft.process import durable
from fedpeft.simulation import clients_of, content, local_trainer, simulate
from fedpeft.simulation.progress_log import ProgressLog

from ..data.test_sources import table, write
from .simulated_runs import clients, config, same, tensors, without_clock

SETTINGS = {
    "rounds": {"count": 4, "clients": 2, "seed": 3, "over_selection": 0.5},
    "aggregation": {"strategy": "fedavgm"},
    "codec": {"up": "sparse", "density": 0.2},
}
"""State of every kind: of the server, of clients whose updates count, and of those that come too late."""


TWO_ROUNDS = config("head", rounds={"count": 2, "clients": 2, "seed": 3})


class Crash(BaseException):
    """The end of a process at some instant; nothing catches it."""


class Crashes:
    """Ends the process before the n-th operation that changes a file."""

    def __init__(self, monkeypatch):
        self.left = 10**9
        for owner, name in ((os, "replace"), (os, "link"), (Path, "replace"), (Path, "unlink")):
            monkeypatch.setattr(owner, name, self._counted(getattr(owner, name)))
        real = ProgressLog._append

        def append(log, line):
            if self._is_over():
                with log._file.open("ab") as stream:
                    stream.write(json.dumps(line).encode()[:50])  # torn
                raise Crash
            real(log, line)
            if self._is_over():
                raise Crash

        monkeypatch.setattr(ProgressLog, "_append", append)

    def _is_over(self):
        self.left -= 1
        return self.left < 0

    def _counted(self, real):
        def call(*arguments, **options):
            if self._is_over():
                raise Crash
            return real(*arguments, **options)

        return call


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, folders):
    out = tmp_path_factory.mktemp("undisturbed")
    report = simulate(config("head", **SETTINGS), clients(folders), out, folders / "client-0")
    return out, report


def stopped_after_one_round(out, chosen, evaluate=None, run=TWO_ROUNDS, **options):
    """Leaves the folder of a simulation that was interrupted after the first of two rounds."""

    def stop(row):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(run, chosen, out, evaluate, committed=stop, **options)


def rounds_done(out, chosen, evaluate=None, **options):
    """Returns the numbers of the rounds that the same simulation holds then."""
    done = []
    simulate(TWO_ROUNDS, chosen, out, evaluate, committed=lambda row: done.append(row["version"]), **options)
    return done


@pytest.mark.parametrize("step", [3, 5, 7])
def test_crashes_between_any_two_changes_of_files_change_no_bit(tmp_path, folders, undisturbed, monkeypatch, step):
    first, expected = undisturbed
    crashes, restarts, after = Crashes(monkeypatch), 0, step
    while True:
        crashes.left = after
        try:
            report = simulate(config("head", **SETTINGS), clients(folders), tmp_path, folders / "client-0")
            break
        except Crash:
            crashes.left = 10**9
            restarts, after = restarts + 1, after + step
    assert restarts >= 4, "it was not disturbed"
    assert (tmp_path / "records.jsonl").read_bytes() == (first / "records.jsonl").read_bytes()
    assert same(tensors(tmp_path)[1], tensors(first)[1])
    assert without_clock(report) == without_clock(expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter.safetensors", "records.jsonl", "report.json"]


def test_a_process_that_is_killed_goes_on_after_its_last_round(tmp_path, folders, undisturbed):
    first, expected = undisturbed
    done: list[int] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # a fork beside torch's threads
        child = os.fork()
    if child == 0:

        def stall(row):
            if row["version"] == 2:
                time.sleep(600)

        simulate(config("head", **SETTINGS), clients(folders), tmp_path, folders / "client-0", committed=stall)
        os._exit(1)
    until = time.monotonic() + 60
    log = tmp_path / "unfinished" / "progress.jsonl"
    while not (log.exists() and log.read_bytes().count(b"\n") == 3):
        assert time.monotonic() < until
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    report = simulate(
        config("head", **SETTINGS),
        clients(folders),
        tmp_path,
        folders / "client-0",
        committed=lambda row: done.append(row["version"]),
    )
    assert done == [3, 4], "the first two rounds were not repeated"
    assert without_clock(report) == without_clock(expected)
    assert same(tensors(tmp_path)[1], tensors(first)[1])


@pytest.mark.parametrize("change", ["seed", "clients", "done"])
def test_another_simulation_in_the_folder_begins_anew(tmp_path, folders, change):
    stopped_after_one_round(tmp_path, clients(folders))
    assert (tmp_path / "unfinished").is_dir()
    settings, chosen, done = TWO_ROUNDS, clients(folders), []
    if change == "seed":
        settings = config("head", rounds={"count": 2, "clients": 2, "seed": 4})
    elif change == "clients":
        del chosen["client-0"]
    else:
        simulate(settings, chosen, tmp_path)
    simulate(settings, chosen, tmp_path, committed=lambda row: done.append(row["version"]))
    assert done == [1, 2]
    assert not (tmp_path / "unfinished").exists()


@pytest.mark.parametrize(("began", "here", "wanted"), [("cpu", "cpu", [2]), ("auto", "cpu:0", [1, 2])])
def test_a_simulation_goes_on_with_the_device_that_it_began_with_by_whatever_name(
    tmp_path, folders, monkeypatch, began, here, wanted
):
    stopped_after_one_round(tmp_path, clients(folders), device=began)
    monkeypatch.setattr(local_trainer, "device_of", lambda wanted: torch.device(here))
    assert rounds_done(tmp_path, clients(folders), device="auto") == wanted


def test_a_simulation_that_goes_on_says_how_many_rounds_there_are(tmp_path, folders):
    resumed: list[int] = []
    stopped_after_one_round(tmp_path, clients(folders), resumed=resumed.append)
    assert resumed == []
    assert rounds_done(tmp_path, clients(folders), resumed=resumed.append) == [2] and resumed == [1]


def test_a_simulation_goes_on_where_its_data_lie_now_and_not_with_others(tmp_path, folders):
    here, there = tmp_path / "here", tmp_path / "there"
    shutil.copytree(folders, here)
    for change, wanted in (("moved", [2]), ("trained on", [1, 2]), ("scored on", [1, 2])):
        out = tmp_path / change
        stopped_after_one_round(out, clients(here), here / "client-0")
        shutil.copytree(here, there)
        if change != "moved":
            client = {"trained on": "client-1", "scored on": "client-0"}[change]
            shutil.copytree(folders / "client-2", there / client, dirs_exist_ok=True)
        assert rounds_done(out, clients(there), there / "client-0") == wanted, change
        shutil.rmtree(there)


@pytest.mark.parametrize("whole_bytes", [content.WHOLE_BYTES, 0])
def test_a_simulation_goes_on_with_parts_of_one_data_set_if_it_has_the_same_images(tmp_path, monkeypatch, whole_bytes):
    monkeypatch.setattr(content, "WHOLE_BYTES", whole_bytes)
    simulated = config("head", rounds={"count": 2, "clients": 2, "seed": 3}, simulation={"clients": 2})
    write(tmp_path / "one.parquet", table(24))
    shutil.copy(tmp_path / "one.parquet", tmp_path / "moved.parquet")
    whole = table(24)
    turned = pa.concat_tables([whole[1:], whole[:1]]).column("image")
    write(tmp_path / "other.parquet", whole.set_column(0, whole.schema.field("image"), turned))
    for name, wanted in (("moved", [2]), ("other", [1, 2])):
        out = tmp_path / name
        stopped_after_one_round(out, clients_of(tmp_path / "one.parquet", simulated)[0])
        assert rounds_done(out, clients_of(tmp_path / f"{name}.parquet", simulated)[0]) == wanted, name


def test_of_a_large_data_set_only_the_images_that_clients_have_are_read(tmp_path, monkeypatch):
    read, real = set(), ParquetSource.image_bytes
    monkeypatch.setattr(ParquetSource, "image_bytes", lambda self, row: read.add(row) or real(self, row))
    monkeypatch.setattr(content, "WHOLE_BYTES", 0)
    monkeypatch.setattr(pixel_cache, "folder_here", lambda: None)
    some = config("head", rounds={"count": 1, "clients": 2}, simulation={"clients": 2, "examples": 10})
    simulate(some, clients_of(write(tmp_path / "whole.parquet", table(30)), some)[0], tmp_path / "out")
    assert len(read) == 10


def test_a_simulation_goes_on_only_under_an_engine_of_the_same_arithmetic(tmp_path, folders):
    """Begun with batched, it goes on with as many clients in a pass, and with any others begins anew."""

    def killed(row):
        raise Crash

    began = {"rounds": {"count": 2, "clients": 2, "seed": 3}}
    out = tmp_path / "out"
    with pytest.raises(Crash):
        simulate(
            config(simulation={"engine": "batched", "workers": 2}, **began), clients(folders), out, committed=killed
        )
    shutil.copytree(out, tmp_path / "kept")
    for engine, workers, wanted in (("batched", 2, [2]), ("batched", 3, [1, 2]), ("inprocess", None, [1, 2])):
        shutil.rmtree(out)
        shutil.copytree(tmp_path / "kept", out)
        done = []
        run = config(simulation={"engine": engine, "workers": workers}, **began)
        simulate(run, clients(folders), out, committed=lambda row, done=done: done.append(row["version"]))
        assert done == wanted, engine


def test_progress_that_cannot_be_read_is_said_and_the_simulation_begins_anew(tmp_path, folders, capsys):
    stopped_after_one_round(tmp_path, clients(folders))
    file = tmp_path / "unfinished" / "progress.jsonl"
    whole, other = file.read_bytes(), tmp_path / "other"
    shutil.copytree(tmp_path, other)
    figure = whole.replace(b'"train_loss": ', b'"train_loss": 1')
    swapped = b"\n".join([*whole.splitlines()[::-1], b""])
    for damaged in (b"\0" * 10 + whole, figure, swapped, whole.replace(b'"memory"', b'"memoir"')):
        assert damaged != whole
        (other / "unfinished" / "progress.jsonl").write_bytes(damaged)
        again = shutil.copytree(other, tmp_path / "again")
        assert rounds_done(again, clients(folders)) == [1, 2] and "it begins anew" in capsys.readouterr().out
        shutil.rmtree(again)


def test_a_round_counts_only_once_all_that_the_next_one_needs_is_on_the_disk(tmp_path, folders, monkeypatch):
    synced: dict[Path, bytes] = {}
    real, line, checked = durable.sync, ProgressLog._append, []

    def sync(path):
        real(path)
        if path.is_file():
            synced[path] = path.read_bytes()

    def append(log, row):
        needed = [file for file in log.folder.rglob("*") if file.is_file() and file.name != "progress.jsonl"]
        for file in (*needed, tmp_path / "records.jsonl"):
            assert synced.get(file) == file.read_bytes(), file
            checked.append(file.name)
        line(log, row)
        assert synced[log._file] == log._file.read_bytes()

    monkeypatch.setattr(durable, "sync", sync)
    monkeypatch.setattr(ProgressLog, "_append", append)
    simulate(config("head", **SETTINGS), clients(folders), tmp_path)
    assert {"adapter-0", "adapter-4", "state-4"} < set(checked) and any("@residual@4" in name for name in checked)


@pytest.mark.parametrize(
    ("kept", "damage"),
    [
        ("unfinished/adapter-0", "gone"),
        ("unfinished/adapter-1", "changed"),
        ("unfinished/state-1", "changed"),
        ("unfinished/memory/client-?@residual@1.safetensors", "gone"),
        ("unfinished/memory/client-?@residual@1.safetensors", "changed"),
        ("unfinished/memory/client-?@residual@1.safetensors", "cut"),
        ("records.jsonl", "gone"),
        ("records.jsonl", "cut"),
        ("records.jsonl", "another client"),
    ],
)
def test_a_damaged_file_of_the_progress_is_said_once_and_not_met_again(tmp_path, folders, kept, damage):
    def stop(row):
        raise KeyboardInterrupt

    aggregation = {"strategy": "fedadam"}
    rounds, codec = {"count": 2, "clients": 2, "seed": 3}, {"up": "sparse", "density": 0.2}
    settings, done = config("head", aggregation=aggregation, rounds=rounds, codec=codec), []
    with pytest.raises(KeyboardInterrupt):
        simulate(settings, clients(folders), tmp_path, committed=stop)
    file = next(tmp_path.glob(kept))
    if damage == "changed":
        file.write_bytes(file.read_bytes()[:-4] + b"\1\1\1\1")
    elif damage == "another client":
        file.write_bytes(file.read_bytes().replace(b"client-", b"cliend-", 1))
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-4])
    else:
        file.unlink()
    with pytest.raises(StateInvalid, match="the same command begins at round 1"):
        simulate(settings, clients(folders), tmp_path)
    simulate(settings, clients(folders), tmp_path, committed=lambda row: done.append(row["version"]))
    assert done == [1, 2]
