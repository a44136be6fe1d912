"""Interruptions of a transition: a restart between rounds, a caller that leaves, a disk that is full for a moment."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedpeft.adapters import payload
from fedpeft.errors import DiskFull, StateInvalid
from fedpeft.v1 import operator_service_pb2 as op
from fedpeft.v1 import run_pb2
from fedpeft_server.parts import write_activity
from fedpeft_server.runs import aggregation
from fedpeft_server.store.rows import Place, Transition
from fedpeft_server.store.store import NewVersion, Store, version_key
from fedpeft_server.timing import TIMING

from .conftest import SPEC, Daemon, StartDaemon, config, filled, refused

Kind = Callable[[Any], bool]
"""Chooses transitions, or whatever a method is called with first."""


def anything(_: Any) -> bool:
    return True


def receipts(made: Transition) -> bool:
    return bool(made.updates)


def commits(made: Transition) -> bool:
    return made.result is not None


def of_run(made: Transition) -> bool:
    """Chooses pauses, resumptions and ends of a run."""
    return made.changes.before.state is not made.changes.after.state


def failing(method: Callable[..., Any], kind: Kind = anything, times: int = 1) -> Callable[..., Any]:
    """Returns a transaction that finds the disk full a few times."""
    left = times

    def transaction(*args: Any) -> Any:
        nonlocal left
        if left and kind(args[0]):
            left -= 1
            raise DiskFull("there is no room; free some space")
        return method(*args)

    return transaction


class SlowClock:
    """The module `time` after the clock was set back."""

    perf_counter = staticmethod(time.perf_counter)

    def __init__(self, back_s: float) -> None:
        self._back_s = back_s

    def time(self) -> float:
        return time.time() - self._back_s


class Held:
    """A transaction that waits, once begun, until it is let go."""

    def __init__(self, method: Callable[..., Any], kind: Kind = anything) -> None:
        self._method = method
        self._kind = kind
        self.begun = threading.Event()
        self.go = threading.Event()

    def __call__(self, *args: Any) -> Any:
        if self._kind(args[0]):
            self.begun.set()
            assert self.go.wait(10)
        return self._method(*args)


async def tickets(daemon: Daemon, run: str) -> dict[str, int]:
    """Returns the states of the last round's tickets, by client."""
    return {t.client: t.state for t in (await daemon.rounds(run))[-1].tickets}


async def test_a_daemon_restarted_between_two_rounds_opens_the_next_one(start: StartDaemon) -> None:
    daemon = await start()
    run = await daemon.create(config(rounds={"count": 2, "clients": 1}))
    (a,) = await daemon.clients("a")
    await a.push((await a.task()).ticket, filled(1.0))
    await daemon.until(run.id, lambda r: r.version == 1)
    await daemon.end()
    daemon = await start()
    (a,) = await daemon.clients("a")
    async with asyncio.timeout(5):
        task = await a.task()
    assert (task.round, task.version) == (2, 1)


async def test_two_waits_of_one_client_do_not_wake_each_other_for_ever(daemon: Daemon) -> None:
    await daemon.create(config(rounds={"count": 1, "clients": 2}))
    (a,) = await daemon.clients("a")
    first = asyncio.ensure_future(a.wait())
    await asyncio.sleep(0.1)
    second = asyncio.ensure_future(a.wait())
    async with asyncio.timeout(2):
        assert (await first).HasField("idle")
    assert not second.done()
    second.cancel()


async def test_an_update_counts_though_its_client_leaves_while_it_is_written(daemon: Daemon) -> None:
    run = await daemon.create(config(rounds={"count": 1, "clients": 1}))
    (a,) = await daemon.clients("a")
    task = await a.task()
    db = daemon.server.store.db
    held = Held(db.transit, receipts)
    db.transit = held  # type: ignore[method-assign]
    push = asyncio.ensure_future(a.push(task.ticket, filled(1.0)))
    await asyncio.to_thread(held.begun.wait, 10)
    push.cancel()
    await asyncio.sleep(0.2)
    held.go.set()
    await daemon.until(run.id, lambda r: r.version == 1)
    assert await tickets(daemon, run.id) == {"a": run_pb2.TICKET_STATE_RECEIVED}
    assert all((x == 1.0).all() for x in (await daemon.adapter(run.id, 1)).values())


async def test_a_run_is_there_though_its_creator_leaves_while_it_is_written(daemon: Daemon) -> None:
    db = daemon.server.store.db
    held = Held(db.create_run)
    db.create_run = held  # type: ignore[method-assign]
    creation = asyncio.ensure_future(daemon.create())
    await asyncio.to_thread(held.begun.wait, 10)
    creation.cancel()
    await asyncio.sleep(0.2)
    held.go.set()
    run = await daemon.create()
    assert (await daemon.run(run.id)).id == run.id


@pytest.mark.parametrize("method", ["writer", "publish", "open"])
async def test_nothing_stays_of_a_creation_whose_caller_leaves(daemon: Daemon, method: str) -> None:
    """As its file is opened, as it becomes whole, and as the first version is made of it."""
    store, spool = daemon.server.store, daemon.server.settings.data_dir / "spool"
    held = Held(getattr(store.updates, method))
    setattr(store.updates, method, held)
    creation = asyncio.ensure_future(daemon.create())
    await asyncio.to_thread(held.begun.wait, 10)
    creation.cancel()
    await asyncio.sleep(0.2)  # until the server knows
    held.go.set()
    async with asyncio.timeout(10):
        while store._files._work_queue.qsize() or daemon.server.uploads._tasks._tasks or list(spool.iterdir()):
            await asyncio.sleep(0.02)
    await asyncio.sleep(0.1)
    assert not list(spool.iterdir())


async def test_a_resumed_run_has_its_deadline_though_the_operator_leaves(daemon: Daemon) -> None:
    run = await daemon.create(config(rounds={"count": 1, "clients": 1, "deadline_s": 1.0, "max_extensions": 0}))
    (a,) = await daemon.clients("a")
    await a.task()
    await daemon.until(run.id, lambda r: r.state == run_pb2.RUN_STATE_PAUSED)
    db = daemon.server.store.db
    held = Held(db.transit, of_run)
    db.transit = held  # type: ignore[method-assign]
    resume = asyncio.ensure_future(daemon.operator.ResumeRun(op.ResumeRunRequest(run=run.id)))
    await asyncio.to_thread(held.begun.wait, 10)
    resume.cancel()
    await asyncio.sleep(0.2)
    held.go.set()
    resumed = await daemon.until(run.id, lambda r: r.state == run_pb2.RUN_STATE_RUNNING)
    assert "awaits a" in resumed.reason and "to the deadline" in resumed.reason
    paused = await daemon.until(run.id, lambda r: r.state == run_pb2.RUN_STATE_PAUSED)
    assert "still awaited: a" in paused.reason
    assert await tickets(daemon, run.id) == {"a": run_pb2.TICKET_STATE_ISSUED}


async def test_a_stopped_run_leaves_no_updates_though_the_operator_leaves(daemon: Daemon) -> None:
    run = await daemon.create(config(rounds={"count": 1, "clients": 2}))
    a, b = await daemon.clients("a", "b")
    task, _ = await asyncio.gather(a.task(), b.task())
    await a.push(task.ticket, filled(1.0))
    spool = daemon.server.settings.data_dir / "spool"
    assert len(list(spool.iterdir())) == 1
    db = daemon.server.store.db
    held = Held(db.transit, of_run)
    db.transit = held  # type: ignore[method-assign]
    stop = asyncio.ensure_future(daemon.operator.StopRun(op.StopRunRequest(run=run.id)))
    await asyncio.to_thread(held.begun.wait, 10)
    stop.cancel()
    await asyncio.sleep(0.2)
    held.go.set()
    await daemon.until(run.id, lambda r: r.state == run_pb2.RUN_STATE_STOPPED)
    async with asyncio.timeout(10):
        while list(spool.iterdir()):
            await asyncio.sleep(0.01)
    assert daemon.server.metrics.rounds.labels(run.id, "stopped")._value.get() == 1


@pytest.mark.timed(deadline_retry_s=0.2)
async def test_a_deadline_that_could_not_be_written_is_tried_again(daemon: Daemon) -> None:
    run = await daemon.create(config(rounds={"count": 1, "clients": 2, "quorum": 1, "deadline_s": 0.5}))
    a, b = await daemon.clients("a", "b")
    tasks = await asyncio.gather(a.task(), b.task())
    await a.push(tasks[0].ticket, filled(1.0))
    db = daemon.server.store.db
    db.transit = failing(db.transit)  # type: ignore[method-assign]
    done = await daemon.until(run.id, lambda r: r.state == run_pb2.RUN_STATE_COMPLETED)
    assert done.version == 1
    assert await tickets(daemon, run.id) == {"a": run_pb2.TICKET_STATE_RECEIVED, "b": run_pb2.TICKET_STATE_LATE}


async def test_a_clock_that_is_set_back_only_puts_a_deadline_off(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = await daemon.create(config(rounds={"count": 1, "clients": 2, "quorum": 1, "deadline_s": 0.5}))
    a, b = await daemon.clients("a", "b")
    tasks = await asyncio.gather(a.task(), b.task())
    await a.push(tasks[0].ticket, filled(1.0))
    deadline = (await daemon.rounds(run.id))[-1].deadline.ToNanoseconds() / 1e9
    monkeypatch.setattr(daemon.server.store, "clock", SlowClock(0.7))
    done = await daemon.until(run.id, lambda r: r.state == run_pb2.RUN_STATE_COMPLETED)
    assert done.version == 1 and time.time() >= deadline + 0.7
    assert await tickets(daemon, run.id) == {"a": run_pb2.TICKET_STATE_RECEIVED, "b": run_pb2.TICKET_STATE_LATE}


@pytest.mark.parametrize("times", [1, 2], ids=["result", "result-and-pause"])
async def test_a_commit_that_could_not_be_written_pauses_the_run_and_a_resume_repeats_it(
    daemon: Daemon, times: int
) -> None:
    run = await daemon.create(config(rounds={"count": 1, "clients": 1}))
    (a,) = await daemon.clients("a")
    task = await a.task()
    db = daemon.server.store.db
    db.transit = failing(db.transit, commits)  # type: ignore[method-assign]
    if times == 2:
        db.transit = failing(db.transit, lambda made: of_run(made) and not commits(made))  # type: ignore[method-assign]
    await a.push(task.ticket, filled(1.0))
    paused = await daemon.until(run.id, lambda r: r.state == run_pb2.RUN_STATE_PAUSED)
    assert "free some space; then resume the run" in paused.reason
    await daemon.operator.ResumeRun(op.ResumeRunRequest(run=run.id))
    await daemon.until(run.id, lambda r: r.state == run_pb2.RUN_STATE_COMPLETED)


async def test_a_fold_that_finds_the_disk_full_says_so_and_a_resume_repeats_it(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reason was "OSError: [Errno 28]", with a traceback in the log."""
    run = await daemon.create(config(rounds={"count": 1, "clients": 1}))
    (a,) = await daemon.clients("a")
    task = await a.task()
    with monkeypatch.context() as patched:
        patched.setattr(aggregation, "create_eagerly", lambda _: open("/dev/full", "wb"))  # noqa: SIM115
        await a.push(task.ticket, filled(1.0))
        paused = await daemon.until(run.id, lambda r: r.state == run_pb2.RUN_STATE_PAUSED)
    assert "folding round 1 of" in paused.reason and "no room" in paused.reason
    assert "free some space; then resume the run" in paused.reason
    await daemon.operator.ResumeRun(op.ResumeRunRequest(run=run.id))
    await daemon.until(run.id, lambda r: r.state == run_pb2.RUN_STATE_COMPLETED)


async def test_a_commit_that_was_made_though_its_answer_was_lost_gives_the_same_record_again(daemon: Daemon) -> None:
    """As when the connection to a PostgreSQL breaks in the instant of the commit."""
    run = await daemon.create(config(rounds={"count": 2, "clients": 1}))
    (a,) = await daemon.clients("a")
    db, transit = daemon.server.store.db, daemon.server.store.db.transit

    def unanswered(made: Transition, *rest: Any) -> None:
        transit(made, *rest)
        if commits(made):
            db.transit = transit  # type: ignore[method-assign]
            raise StateInvalid("the connection broke")

    db.transit = unanswered  # type: ignore[method-assign]
    await a.push((await a.task()).ticket, filled(1.0))
    await daemon.until(run.id, lambda r: r.version == 1)
    await a.push((await a.task()).ticket, filled(1.0))
    await daemon.until(run.id, lambda r: r.state == run_pb2.RUN_STATE_COMPLETED)
    first, second = await daemon.rounds(run.id)
    assert json.loads(first.record)["previous_sha256"] == ""
    assert json.loads(second.record)["previous_sha256"] == first.record_sha256


async def test_a_pause_that_could_not_be_written_did_not_happen(daemon: Daemon) -> None:
    run = await daemon.create()
    db = daemon.server.store.db
    db.transit = failing(db.transit, of_run)  # type: ignore[method-assign]
    with pytest.raises(Exception, match="no room"):
        await daemon.operator.PauseRun(op.PauseRunRequest(run=run.id))
    assert (await daemon.run(run.id)).state == run_pb2.RUN_STATE_RUNNING


async def test_bytes_that_could_not_be_written_are_written_later(daemon: Daemon) -> None:
    run = await daemon.create(config(rounds={"count": 1, "clients": 1}))
    (a,) = await daemon.clients("a")
    task = await a.task()
    db, server = daemon.server.store.db, daemon.server
    of_server = server.byte_counter, server.sessions, server.store
    db.add_traffic = failing(db.add_traffic)  # type: ignore[method-assign]
    before = server.byte_counter.pending(run.id)
    assert before
    with pytest.raises(DiskFull):  # which what calls it, again and again, says in the log
        await write_activity(*of_server)
    assert server.byte_counter.pending(run.id) == before
    await write_activity(*of_server)
    assert not server.byte_counter.pending(run.id)
    (row,), _ = await server.store.transact(db.rounds_from, run.id, Place(), 9, 9, {})
    assert [ticket.traffic for ticket in row.tickets] == [before[1, "a"]]
    assert task.round == 1


async def test_what_a_killed_creation_left_is_gone_after_the_start(start: StartDaemon, tmp_path: Path) -> None:
    """The upload whole and the first version stored, but no run in the database: killed between the two."""
    folder = tmp_path / "data"
    daemon = await start(folder)
    run = await daemon.create()
    await daemon.end()
    store = Store(folder, "", "", keep_updates=True, timing=TIMING)
    manifest, data = payload.encode(filled(1.0), SPEC.sent(1), "float32")
    for name in ("run-killed", run.id):
        with store.spool.writer(NewVersion(name, 0, "").spool_key, manifest) as writer:
            writer.write(0, data)
            writer.finish()
    store.blobs.put(version_key("run-killed", 0), data)
    store.close()
    await (await start(folder, keep_updates=True)).end()
    assert [path.name for path in (folder / "blobs" / "runs").iterdir()] == [run.id]
    assert list((folder / "spool").iterdir()) == []


async def test_a_deletion_that_could_not_be_written_is_repeated(daemon: Daemon, tmp_path: Path) -> None:
    """So nothing of a deleted run can stay: its files go first, and while it is listed it can be deleted."""
    run = await daemon.create()
    await daemon.operator.StopRun(op.StopRunRequest(run=run.id))
    db = daemon.server.store.db
    db.delete_run = failing(db.delete_run)  # type: ignore[method-assign]
    assert await refused(daemon.operator.DeleteRun(op.DeleteRunRequest(run=run.id))) == "DISK_FULL"
    assert list((tmp_path / "data" / "blobs" / "runs").iterdir()) == []
    await daemon.operator.DeleteRun(op.DeleteRunRequest(run=run.id))
    assert await refused(daemon.run(run.id)) == "RUN_NOT_FOUND"
