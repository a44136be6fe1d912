"""Folders of finished runs are removed; nothing that was trained here and did not leave is lost."""

from __future__ import annotations

import errno
import os
import secrets
import time
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from structlog.testing import capture_logs

from fedpeft.process import logs
from fedpeft.v1 import federation_service_pb2 as pb
from fedpeft.v1 import run_pb2
from fedpeft_client.egress.log import EgressLog
from fedpeft_client.owner.metrics import Metrics
from fedpeft_client.state import state_dir
from fedpeft_client.state.outbox import Outbox
from fedpeft_client.state.state_dir import StateDirectory
from fedpeft_client.uplink.channel import Channel
from fedpeft_client.uplink.finished_runs import ASKED, KEPT, MARK, Ending, FinishedRuns
from fedpeft_client.uplink.traffic import Traffic

from ..federation import Context, Federation
from ..state.test_state import write_draft

ZERO, SOME = {"a": np.zeros(3, np.float32)}, {"a": np.ones(3, np.float32)}


class Site:
    """A state directory with runs, and a server that says in which state those are."""

    def __init__(self, directory: StateDirectory, channel: Channel, monkeypatch: pytest.MonkeyPatch) -> None:
        self.directory = directory
        self.outbox = Outbox(directory, "")
        self.egress_log = EgressLog(directory.path, "s:1")
        self.metrics = Metrics()
        self.series = self.metrics.series
        Traffic(channel, self.egress_log, self.metrics)
        self.states: dict[str, run_pb2.RunState.ValueType] = {}
        self.asked: list[list[str]] = []
        self._channel = channel

        async def check(_: Federation, request: pb.CheckRunsRequest, context: Context) -> pb.CheckRunsResponse:
            self.asked.append(list(request.runs))
            standings = [pb.RunStanding(run=run, state=self.states.get(run)) for run in request.runs]
            return pb.CheckRunsResponse(runs=standings)

        monkeypatch.setattr(Federation, "CheckRuns", check)

    def run(self, name: str, how: run_pb2.RunState.ValueType, **tensors: dict[str, np.ndarray]) -> Path:
        folder = self.directory.run(name)
        self.states[name] = how
        (folder / "adapter.json").write_text("{}")
        (folder / "adapter-00.payload").write_bytes(b"payload")
        (folder / f"adapter.json.{secrets.token_hex(8)}.new").write_bytes(b"")
        for each, values in tensors.items():
            safetensors.numpy.save_file(values, folder / f"{each}.safetensors")
        return folder

    def looks(self, end: Ending | None = None) -> FinishedRuns:
        log = logs.logger()
        return FinishedRuns(self.directory, self.outbox, self._channel, self.egress_log, self.series, log, end)

    async def clean_up(self) -> None:
        await self.looks().clean_up()


@pytest.fixture
async def site(federation: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Site]:
    with StateDirectory(tmp_path / "state") as directory:
        async with Channel(federation.address, "site-a", directory.instance) as channel:
            made = Site(directory, channel, monkeypatch)
            await federation.stop()
            await federation.start()  # with the call that was put in
            yield made
            made.egress_log.close()


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


async def test_what_is_over_goes_and_what_goes_on_stays(site: Site) -> None:
    over = [site.run("run-a", run_pb2.RUN_STATE_COMPLETED, residual=ZERO, local={}), site.run("run-b", 4)]
    over.append(site.run("run-gone", run_pb2.RUN_STATE_UNSPECIFIED))
    going = [site.run("run-c", run_pb2.RUN_STATE_RUNNING), site.run("run-d", run_pb2.RUN_STATE_PAUSED, residual=SOME)]
    await site.clean_up()
    assert not any(folder.exists() for folder in over)
    assert all((folder / "adapter-00.payload").exists() for folder in going)
    assert site.asked == [["run-a", "run-b", "run-c", "run-d", "run-gone"]]


async def test_what_is_held_elsewhere_too_is_ended_there_before_it_goes(site: Site) -> None:
    folder, ended = site.run("run-a", run_pb2.RUN_STATE_STOPPED), list[tuple[str, str]]()
    going = site.run("run-b", run_pb2.RUN_STATE_RUNNING)

    async def end(run: str, how: str) -> bool:
        ended.append((run, how))
        return len(ended) > 1

    looks = site.looks(end)
    await looks.clean_up()
    assert folder.exists(), "it could not be ended"
    await looks.clean_up()
    assert len(ended) == 1, "the next look is an hour later"
    looks.look_soon()
    await looks.clean_up()
    assert ended == 2 * [("run-a", "stopped")] and not folder.exists() and going.exists()


async def test_what_was_not_sent_stays_a_month_and_what_is_the_owners_for_good(site: Site) -> None:
    folder = site.run("run-a", run_pb2.RUN_STATE_COMPLETED, residual=SOME, local=SOME)
    await site.clean_up()
    assert names(folder) == {MARK, "residual.safetensors", "local.safetensors"}
    await site.clean_up()
    assert len(site.asked) == 1, "of what is cleaned nothing more is asked"
    old = time.time() - KEPT.total_seconds() - 60
    os.utime(folder / MARK, (old, old))
    await site.clean_up()
    assert names(folder) == {MARK, "local.safetensors"}


async def test_a_run_that_goes_on_after_all_is_kept_and_marked_no_more(site: Site) -> None:
    folder = site.run("run-a", run_pb2.RUN_STATE_COMPLETED, residual=SOME)
    await site.clean_up()
    site.run("run-a", run_pb2.RUN_STATE_RUNNING)
    await site.clean_up()
    assert MARK not in names(folder) and "residual.safetensors" in names(folder)


async def test_the_metrics_of_a_run_go_at_the_second_look_that_finds_it_over(site: Site) -> None:
    for run in ("run-a", "run-b", "run-c", "no run"):
        site.metrics.tickets_given_up.labels(run, "TRAINING_FAILED").inc()
        site.metrics.rounds.labels(run).inc()
    site.states = {"run-a": run_pb2.RUN_STATE_RUNNING, "run-b": run_pb2.RUN_STATE_COMPLETED}
    looks = site.looks()
    left = []
    for _ in range(2):
        looks._next = 0.0
        await looks.clean_up()
        left.append(site.series.runs)
    assert left == [["run-a", "run-b", "run-c", "no run"], ["run-a", "no run"]]
    value = site.metrics.registry.get_sample_value
    assert value("fedpeft_client_rounds_total", {"run": "run-a"}) == 1
    assert value("fedpeft_client_rounds_total", {"run": "run-b"}) is None


async def test_a_folder_of_somebody_else_stays_and_keeps_nothing_from_being_cleaned(site: Site) -> None:
    folder = site.run("run-a", run_pb2.RUN_STATE_COMPLETED, residual=SOME)
    (folder / "@eaDir").mkdir()
    await site.clean_up()
    assert names(folder) == {MARK, "residual.safetensors", "@eaDir"}
    await site.clean_up()
    assert len(site.asked) == 1, "it is clean"


async def test_a_folder_that_cannot_be_cleaned_is_said_and_the_others_are_cleaned(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    stuck, other = (site.run(name, run_pb2.RUN_STATE_COMPLETED, residual=SOME) for name in ("run-a", "run-b"))
    marked = site.run("run-c", run_pb2.RUN_STATE_RUNNING)
    (marked / MARK).mkdir()  # not to be unlinked
    unlink = Path.unlink

    def refuse(path: Path, missing_ok: bool = False) -> None:
        if path == stuck / "adapter.json":
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(path))
        unlink(path, missing_ok=missing_ok)

    with monkeypatch.context() as patch, capture_logs() as lines:
        patch.setattr(Path, "unlink", refuse)
        await site.clean_up()
    warned = {line["run"]: line["cause"] for line in lines if line["log_level"] == "warning"}
    assert set(warned) == {"run-a", "run-c"} and warned["run-a"].endswith("adapter.json: Operation not permitted")
    assert names(other) == {MARK, "residual.safetensors"} and stuck.exists()
    await site.clean_up()
    assert names(stuck) == {MARK, "residual.safetensors"}, "the next time did"


async def test_no_folder_is_made_for_a_run_that_goes_on(site: Site) -> None:
    site.states = {"run-a": run_pb2.RUN_STATE_RUNNING}
    site.metrics.rounds.labels("run-a").inc()
    await site.clean_up()
    assert site.asked == [["run-a"]] and not (site.directory.path / "runs").exists()


@pytest.mark.parametrize("settling", [False, True])
async def test_a_run_with_an_update_that_waits_is_left_as_it_is(site: Site, settling: bool) -> None:
    folder = site.run("run-0123456789ab", run_pb2.RUN_STATE_STOPPED, residual=SOME)
    before = names(folder)
    pending = site.outbox.commit("run-0123456789ab", 5, write_draft(site.outbox))
    if settling:
        pending.folder.rename(site.directory.path / "settled-not-counted@run-0123456789ab")
    await site.clean_up()
    assert names(folder) == before


async def test_very_many_runs_are_asked_for_in_several_calls(site: Site) -> None:
    for number in range(ASKED + 3):
        site.run(f"run-{number:02}", run_pb2.RUN_STATE_RUNNING)
    await site.clean_up()
    assert [len(some) for some in site.asked] == [ASKED, 3]


async def test_a_server_that_does_not_know_the_question_costs_nothing(
    federation: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with StateDirectory(tmp_path / "state") as directory:
        async with Channel(federation.address, "site-a", directory.instance) as channel:
            site = Site(directory, channel, monkeypatch)
            monkeypatch.undo()
            folder = site.run("run-a", run_pb2.RUN_STATE_COMPLETED)
            await site.clean_up()
            assert folder.exists()
            site.egress_log.close()


def test_what_a_killed_process_left_half_written_is_swept_at_the_start(tmp_path: Path) -> None:
    left = [tmp_path / "runs" / "run-a", tmp_path / "identity", tmp_path]
    for folder in left:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"name.{secrets.token_hex(8)}.new").write_bytes(b"half")
        (folder / "name.new").write_bytes(b"the owner's own")
    with StateDirectory(tmp_path):
        assert all(not list(folder.glob("name.*.new")) and (folder / "name.new").exists() for folder in left)
    assert state_dir.identity_folder(tmp_path) == tmp_path / "identity"
