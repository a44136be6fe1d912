"""A client that hangs is pointed out: judged by the clock and by its own pace, shown in every list, logged once."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import NoReturn

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.api import views
from fedpeft.errors import DiskFull, FedpeftError, StoreUnavailable
from fedpeft.v1 import federation_service_pb2 as fed
from fedpeft.v1 import operator_service_pb2 as op
from fedpeft.v1 import run_pb2
from fedpeft_server.runs.progress import Past, Progress, Refusal, Report, State, judge
from fedpeft_server.timing import TIMING

from ..conftest import Daemon, RawClient, StartDaemon, config, fault, filled, refused

START = 1000.0
MINUTE = Past((40.0, 38.0, 42.0), (60.0,))
"""Of a client whose rounds take 40 s and whose steps take a minute."""
AT_12 = Progress(START, Report(12, 40), began=START + 5, moved=START + 17)
"""A step a second."""
FAST = replace(TIMING, silent_s=1.0, stalled_s=0.5, slow_least_s=0.1, progress_check_s=0.02)


@pytest.mark.parametrize(
    ("progress", "after_s", "heard_s", "past", "uploading", "words"),
    [
        (Progress.at(START), 3, 3, Past(), False, "training, last word 3 s ago"),
        (Progress.at(START), 44, 44, Past(), False, "training, last word 44 s ago"),
        (Progress.at(START), 65, 65, Past(), False, "no word for 65 s"),
        (Progress.at(START), 600, 4, Past(), False, "training, last word 4 s ago"),
        (AT_12, 20, 1, Past(), False, "training, step 12 of 40, 3 s ago"),
        (AT_12, 87, 1, Past(), False, "step 12 of 40 for 70 s"),
        (AT_12, 87, 70, Past(), False, "no word for 70 s, last at step 12 of 40"),
        (AT_12, 87, 1, MINUTE, False, "slower than usual: 87 s, usually 40 s, step 12 of 40"),
        (AT_12, 137, 1, MINUTE, False, "step 12 of 40 for 120 s"),
        (AT_12, 49, 1, Past((40.0, 40.0)), False, "training, step 12 of 40, 32 s ago"),
        (Progress.at(START), 95, 1, Past((40.0, 40.0)), False, "slower than usual: 95 s, usually 40 s"),
        (Progress.at(START), 95, 1, Past((40.0,)), False, "training, last word 1 s ago"),
        (Progress.at(START), 9, 1, Past((0.1, 0.1)), False, "training, last word 1 s ago"),
        (AT_12, 87, 2, Past(), True, "uploading, 2 s ago"),
        (AT_12, 87, 50, Past(), True, "no word for 50 s, last at step 12 of 40"),
        (Progress.at(START), 720, 720, Past(), False, "no word for 12 min"),
    ],
)
def test_what_is_said_of_a_client(
    progress: Progress, after_s: float, heard_s: float, past: Past, uploading: bool, words: str
) -> None:
    now = START + after_s
    verdict = judge(progress, now, heard=now - heard_s, past=past, uploading=uploading, timing=TIMING)
    assert (verdict.words, verdict.state.is_well) == (words, words.startswith(("training", "uploading")))


FULL = "writing the upload failed: there is no room left on its disk"


@pytest.mark.parametrize(
    ("progress", "transfer", "uploading", "words"),
    [
        (Progress.at(START), State.UPLOADING, False, f"waits to upload, refused 3 s ago: {FULL}"),
        (AT_12, State.TRAINING, False, f"waits to download, refused 3 s ago: {FULL}"),
        (Progress.at(START), State.UPLOADING, True, "uploading, 1 s ago"),
    ],
)
def test_what_is_said_of_a_client_that_is_refused(
    progress: Progress, transfer: State, uploading: bool, words: str
) -> None:
    now = START + 300
    waiting = replace(progress, refusal=Refusal(transfer, FULL, now - 3))
    past = Past() if uploading else Past((40.0, 40.0))
    verdict = judge(waiting, now, heard=now - 1, past=past, uploading=uploading, timing=TIMING)
    assert (verdict.words, verdict.refused, verdict.is_well) == (words, "" if uploading else FULL, uploading)
    assert judge(waiting, now, heard=now - 60, timing=TIMING).state is State.SILENT


def test_a_client_that_was_heard_before_its_ticket_is_silent_since_the_ticket() -> None:
    assert judge(Progress.at(START), START + 20, heard=START - 100, timing=TIMING).state is State.TRAINING


@given(st.floats(0.01, 300), st.integers(1, 50))
def test_an_honest_pace_is_said_to_hang_only_before_it_is_known(step_s: float, steps: int) -> None:
    """A training whose steps all take as long is said at its own pace; the client calls every 10 s meanwhile."""
    progress = Progress.at(START).reported(Report(0, steps), START)
    for step in range(1, steps + 1):
        before = START + step * step_s - 0.001
        verdict = judge(progress, before, heard=before, timing=TIMING)
        assert not verdict.state.hangs or (step == 1 and step_s >= TIMING.stalled_s)
        progress = progress.reported(Report(step, steps), START + step * step_s)
    assert progress.step_s(Past()) == pytest.approx(step_s)
    known = judge(
        Progress.at(START).reported(Report(0, steps), START),
        START + step_s,
        heard=START + step_s,
        past=Past((), (step_s,)),
        timing=TIMING,
    )
    assert not known.state.hangs


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=20))
def test_any_reports_are_taken_and_no_step_takes_less_than_nothing(reports: list[tuple[int, int]]) -> None:
    progress = Progress.at(START)
    for at, (step, steps) in enumerate(reports):
        progress = progress.reported(Report(min(step, steps), steps), START + at)
        assert progress.began <= progress.moved and progress.step_s(Past()) >= 0


def test_a_training_that_began_anew_has_its_own_pace() -> None:
    again = AT_12.reported(Report(1, 40), START + 60)
    assert (again.report.step, again.began, again.moved) == (1, START + 60, START + 60)
    assert AT_12.reported(Report(0, 0), START + 60) is AT_12


def test_an_edge_is_measured_by_its_calls_alone_and_shown_with_the_updates_it_has() -> None:
    waits, now = Progress.at(START).reported(Report(50, 1200, 0, 12), START), START + 5000
    verdict = judge(waits, now, heard=now - 3, past=Past((), (0.1,)), timing=TIMING)
    assert (verdict.state, verdict.words) == (State.TRAINING, "training, 0 of 12 updates, last word 3 s ago")
    has = waits.reported(Report(250, 1200, 2, 12), now)
    assert judge(has, now + 60, heard=now, timing=TIMING).words == "no word for 60 s, last at 2 of 12 updates"
    slow = judge(has, now, heard=now, past=Past((40.0, 40.0)), timing=TIMING)
    assert (slow.state, slow.words) == (State.SLOW, "slower than usual: 83 min, usually 40 s, 2 of 12 updates")


async def test_the_updates_of_an_edge_are_shown_to_operators(start: StartDaemon) -> None:
    daemon = await start(timing=FAST)
    run, clients, tickets = await begun(daemon)
    said = fed.GetUploadRequest(ticket=tickets["a"], step=150, steps=300, updates=1, updates_wanted=3)
    await clients["a"].stub.GetUpload(said, metadata=clients["a"].metadata)
    (shown,) = [each for each in (await daemon.run(run)).awaited if each.client == "a"]
    assert (shown.updates, shown.updates_wanted) == (1, 3) and "1 of 3 updates" in shown.description
    said.updates = 4
    assert await refused(clients["a"].stub.GetUpload(said, metadata=clients["a"].metadata)) == "PROGRESS_INVALID"


async def trains(client: RawClient, ticket: str, step: int = 0, steps: int = 0) -> fed.GetUploadResponse:
    request = fed.GetUploadRequest(ticket=ticket, step=step, steps=steps)
    return await client.stub.GetUpload(request, metadata=client.metadata)


async def listed(daemon: Daemon, client: str) -> op.Client:
    clients = (await daemon.operator.ListClients(op.ListClientsRequest())).clients
    return next(each for each in clients if each.id == client)


async def begun(daemon: Daemon, **rounds: object) -> tuple[str, dict[str, RawClient], dict[str, str]]:
    """Begins a run of two; returns its id, the clients, and their tickets."""
    run = await daemon.create(config(rounds={"count": 5, "clients": 2, "quorum": 2, **rounds}))
    clients = await daemon.clients("a", "b")
    tasks = await asyncio.gather(*(client.task() for client in clients))
    return run.id, {c.name: c for c in clients}, {c.name: t.ticket for c, t in zip(clients, tasks, strict=True)}


def hangs(run: run_pb2.Run) -> dict[str, int]:
    return {each.client: each.state for each in run.awaited}


SILENT, STALLED = run_pb2.PROGRESS_STATE_SILENT, run_pb2.PROGRESS_STATE_STALLED
TRAINING, SLOW = run_pb2.PROGRESS_STATE_TRAINING, run_pb2.PROGRESS_STATE_SLOW


async def test_both_kinds_of_hanging_are_shown_where_people_look(start: StartDaemon) -> None:
    daemon = await start(timing=FAST)
    run, clients, tickets = await begun(daemon)
    with structlog.testing.capture_logs() as logs:
        async with asyncio.timeout(20):
            while hangs(shown := await daemon.run(run)) != {"a": SILENT, "b": STALLED}:
                await trains(clients["b"], tickets["b"], 3, 8)  # it calls, and stands still; a says nothing
                await asyncio.sleep(0.02)
        silent, stalled = shown.awaited
        assert silent.description.startswith("no word for ") and stalled.description.startswith("step 3 of 8 for ")
        assert (stalled.step, stalled.steps) == (3, 8) and stalled.moved_s >= 0.5
        assert f"awaits a ({silent.description[:8]}" in shown.reason and ", b (step 3 of 8 for " in shown.reason
        for name in ("a", "b"):
            row = await listed(daemon, name)
            assert (row.activity, row.progress.run) == ("training", run)
            assert row.progress.state in (SILENT, STALLED)
        metrics = daemon.server.metrics.registry
        async with asyncio.timeout(20):
            while [
                metrics.get_sample_value("fedpeft_awaited_clients", {"run": run, "state": state})
                for state in ("silent", "stalled", "training", "slow", "uploading")
            ] != [1, 1, 0, 0, 0]:
                await trains(clients["b"], tickets["b"], 3, 8)
                await asyncio.sleep(0.02)
        await trains(clients["b"], tickets["b"], 4, 8)
        await daemon.until(run, lambda seen: hangs(seen).get("b") == TRAINING)
        async with asyncio.timeout(20):
            while not any(each["event"] == "client is back" for each in logs):  # logged at the next look
                await asyncio.sleep(0.02)
    told = [(each["log_level"], each["event"], each["client"]) for each in logs if "client" in each]
    assert told.count(("warning", "client hangs", "a")) == 1, "once, however often it is looked at"
    assert {("warning", "client hangs", "b"), ("info", "client is back", "b")} <= set(told)


async def test_a_client_that_waits_is_not_told_of_the_others_progress(start: StartDaemon) -> None:
    daemon = await start(timing=FAST)
    run, _, _ = await begun(daemon)
    await daemon.until(run, lambda seen: hangs(seen) == {"a": SILENT, "b": SILENT})
    (other,) = await daemon.clients("c")
    assert "no word" not in (await other.register()).runs[0].reason


@pytest.mark.parametrize(
    "fault", [DiskFull("no room on its disk; free some"), StoreUnavailable("it is read-only; look")]
)
async def test_a_client_that_waits_for_room_on_the_server_is_said_to(
    start: StartDaemon, monkeypatch: pytest.MonkeyPatch, fault: FedpeftError
) -> None:
    daemon = await start(timing=replace(FAST, silent_s=60, stalled_s=60))
    run, clients, tickets = await begun(daemon)
    a, cause = clients["a"], fault.in_short

    def refuse(*_: object) -> NoReturn:
        raise fault

    for method, transfer in (
        ("writer", lambda: a.push(tickets["a"], filled(1.0))),
        ("position", lambda: a.upload(tickets["a"], bytes(32))),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(daemon.server.store.updates, method, refuse)
            assert await refused(transfer()) == fault.reason
        seen = (await listed(daemon, "a")).progress
        assert (seen.state, seen.refused) == (run_pb2.PROGRESS_STATE_UPLOADING, cause)
        assert seen.description.startswith("waits to upload, refused ") and seen.description.endswith(
            f" s ago: {cause}"
        )
        assert views.progress_state(seen) == "refused" and not views.is_well(seen)
    shown = await daemon.until(run, lambda seen: "a (waits to upload" in seen.reason)
    assert cause in shown.reason and [each.client for each in shown.awaited] == ["a", "b"]
    await trains(a, tickets["a"], 1, 8)
    assert (await listed(daemon, "a")).progress.description.startswith("training, step 1 of 8")


async def test_a_client_that_waits_for_its_version_is_said_to(
    start: StartDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = await start()
    run, clients, _ = await begun(daemon)

    def refuse(*_: object) -> NoReturn:
        raise DiskFull("no room; free some")

    with monkeypatch.context() as patch:
        patch.setattr(daemon.server.store.download_cache, "open", refuse)
        assert await refused(clients["a"].pull(run, 0)) == "DISK_FULL"
    seen = (await listed(daemon, "a")).progress
    assert (seen.state, seen.refused) == (TRAINING, "no room")
    assert not (await listed(daemon, "b")).progress.refused
    await clients["a"].pull(run, 0)
    assert not (await listed(daemon, "a")).progress.refused


async def test_what_hung_and_delivered_is_forgotten(start: StartDaemon) -> None:
    daemon = await start(timing=FAST)
    run, clients, tickets = await begun(daemon)
    await daemon.until(run, lambda seen: hangs(seen) == {"a": SILENT, "b": SILENT})
    for name, client in clients.items():
        await client.push(tickets[name], filled(1.0))
    await daemon.until(run, lambda seen: seen.version == 1)
    assert not (await daemon.run(run)).awaited and not (await listed(daemon, "a")).HasField("progress")
    watch = daemon.server.runs.progress
    async with asyncio.timeout(10):
        while watch._open or watch._of:
            await asyncio.sleep(0.01)
    value = daemon.server.metrics.registry.get_sample_value
    assert value("fedpeft_awaited_clients", {"run": run, "state": "silent"}) == 0


async def test_a_client_is_measured_by_its_own_rounds(start: StartDaemon) -> None:
    daemon = await start(timing=replace(FAST, silent_s=60, stalled_s=60))
    run, clients, tickets = await begun(daemon)
    for version in (1, 2):
        for name, client in clients.items():
            await client.push(tickets[name], filled(0.1))
        await daemon.until(run, lambda seen, wanted=version: seen.version == wanted)
        tasks = await asyncio.gather(*(client.task() for client in clients.values()))
        tickets = dict(zip(clients, (task.ticket for task in tasks), strict=True))
    shown = await daemon.until(run, lambda seen: hangs(seen) == {"a": SLOW, "b": SLOW})
    usual = shown.awaited[0]
    assert usual.description.startswith("slower than usual: ") and 0 < usual.usual_s < usual.seconds


async def test_a_server_that_was_started_again_counts_from_its_start(start: StartDaemon) -> None:
    daemon = await start()
    run, _, _ = await begun(daemon)
    await daemon.end()
    again = await start(timing=FAST)
    shown = await again.until(run, lambda seen: hangs(seen) == {"a": SILENT, "b": SILENT})
    assert all(each.seconds >= 1 for each in shown.awaited)


@pytest.mark.parametrize(("step", "steps", "words"), [(9, 8, "is 9, of 8 in all"), (1, 0, "is given without `steps`")])
async def test_more_steps_than_there_are_are_refused(daemon: Daemon, step: int, steps: int, words: str) -> None:
    run, clients, tickets = await begun(daemon)
    error = await fault(trains(clients["a"], tickets["a"], step, steps))
    assert error.reason == "PROGRESS_INVALID" and error.fields[0][0] == "step" and words in str(error)
    assert (await daemon.run(run)).awaited[0].steps == 0


async def test_what_was_said_stands_where_nothing_is_said(daemon: Daemon) -> None:
    run, clients, tickets = await begun(daemon)
    await trains(clients["a"], tickets["a"], 2, 8)
    await trains(clients["a"], tickets["a"])
    found = (await listed(daemon, "a")).progress
    assert (found.run, found.step, found.steps, found.state) == (run, 2, 8, TRAINING)
