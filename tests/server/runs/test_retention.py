"""Retention: files of versions that nobody needs any more go, and all else of them stays."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest

from fedpeft.errors import StateInvalid
from fedpeft.v1 import federation_service_pb2 as fed
from fedpeft_operator.cli.run.verify import verified
from fedpeft_operator.cli.session import Session
from fedpeft_server.commands import backup, check
from fedpeft_server.store.database import Database
from fedpeft_server.store.retention import BATCH, RetentionPolicy
from fedpeft_server.store.rows import FileState, RunState
from fedpeft_server.timing import TIMING

from ..conftest import Daemon, RawClient, StartDaemon, config, fault, filled, refused
from ..long_history import write_run
from .test_buffered_rounds import begin
from .test_rollback import back, hold
from .test_scoring import evaluator, push

FAST = pytest.mark.timed(removal_delay_s=0.02)
KEPT, HELD, REMOVING = FileState.KEPT, FileState.HELD, FileState.REMOVING


def files(daemon: Daemon, run: str, kind: str = "versions") -> list[int]:
    """Returns the versions whose files are there."""
    folder = daemon.server.settings.data_dir / "blobs" / "runs" / run / kind
    return sorted(int(path.name[:6]) for path in folder.iterdir())


async def settled(daemon: Daemon, run: str, wanted: list[int], kind: str = "versions") -> None:
    """Waits until just the wanted versions have files."""
    async with asyncio.timeout(20):
        while files(daemon, run, kind) != wanted:
            await asyncio.sleep(0.02)


async def marked(client: RawClient, run: str, version: int) -> bool:
    """Returns True if a version is refused, for it is removed or about to be."""
    try:
        await client.pull(run, version)
    except grpc.aio.AioRpcError:
        return await refused(client.pull(run, version)) == "VERSION_REMOVED"
    return False


async def begun(
    start: StartDaemon, count: int = 20, strategy: str = "fedavg", **settings: object
) -> tuple[Daemon, str, list[RawClient]]:
    daemon = await start(**settings)
    run = (await daemon.create(config(rounds={"count": count, "clients": 1}, aggregation={"strategy": strategy}))).id
    return daemon, run, await daemon.clients("a")


def test_what_a_policy_keeps() -> None:
    policy = RetentionPolicy(3, every=4)
    assert policy.decide([1, 2, 3, 4], {}, ()) == {1: REMOVING, 2: REMOVING, 3: REMOVING, 4: KEPT}
    scored = {1: (1, 0.5), 2: (1, 0.7), 4: (1, 0.7)}
    assert policy.decide([1, 2, 3, 4], scored, (3,)) == {1: REMOVING, 2: HELD, 3: HELD, 4: KEPT}
    assert policy.decide([2, 5], {2: (1, 0.7), 5: (1, 0.8)}, ()) == {2: REMOVING, 5: HELD}
    assert policy.decide([4, 5], {4: (0, -0.2), 5: (0, -0.1)}, ()) == {4: KEPT, 5: HELD}, "losses, none too small"
    assert RetentionPolicy(2).decide([4], {}, ()) == {4: REMOVING}


@FAST
async def test_the_newest_the_best_each_fourth_and_the_first_stay(
    start: StartDaemon, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    daemon, run, clients = await begun(start, strategy="fedavgm", keep_versions=3, keep_versions_every=4)
    judge = await evaluator(daemon)
    await judge.register(fed.CLIENT_ROLE_EVALUATOR)
    for number in range(1, 10):
        await hold(daemon, run, number, clients, 0.01 * number)
        if number in (2, 5):  # the second is the best by far
            request = fed.PushEvaluationRequest(run=run, version=number, metrics={"accuracy": 1 / number})
            await judge.stub.PushEvaluation(request, metadata=judge.metadata)
    await settled(daemon, run, [0, 2, 4, 7, 8, 9])
    await settled(daemon, run, [2, 4, 7, 8, 9], "state")

    error = await fault(judge.pull(run, 6))
    assert error.reason == "VERSION_REMOVED"
    assert error.message == (
        f"version 6 of {run} was removed by the server's retention; nearest to it is version 4, and "
        "all from version 7 on are there"
    )
    assert "nearest to it are version 2 and version 4, and" in (await fault(back(daemon, run, 3))).message
    assert len(await daemon.adapter(run, 2)) == 2
    assert len(await daemon.rounds(run)) == 10, "records stay"

    await back(daemon, run, 2)
    earlier, now = await daemon.adapter(run, 2), await daemon.adapter(run, 10)
    assert all(np.array_equal(earlier[name], now[name]) for name in earlier)
    await settled(daemon, run, [0, 2, 4, 8, 9, 10])
    await hold(daemon, run, 11, clients, 0.5)
    await settled(daemon, run, [0, 2, 4, 8, 9, 10, 11])

    assert (
        await asyncio.to_thread(backup.main, ["--data-dir", str(tmp_path / "data"), "--to", str(tmp_path / "copy")])
        == 0
    )
    entries = await daemon.server.store.transact(daemon.server.store.db.transactions.entries_after, 0, 1000)
    said = [json.loads(entry.details)["versions"] for entry in entries if entry.action == "versions.removed"]
    assert ", ".join(said).split(", ") == ["1", "3", "5", "6", "7"]
    await daemon.end()
    for folder in ("data", "copy"):
        capsys.readouterr()
        assert check.main(["--data-dir", str(tmp_path / folder)]) == 0
        summary = capsys.readouterr().out.splitlines()[-1]
        assert ", 7 versions, " in summary and ", 5 versions that the retention removed: 0 faults, 0 notes" in summary


@FAST
async def test_the_best_gives_way_to_a_better_one(start: StartDaemon) -> None:
    daemon, run, clients = await begun(start, keep_versions=2)
    judge = await evaluator(daemon)
    for number, accuracy in enumerate((0.5, 0.4, 0.6, 0.6), 1):
        await hold(daemon, run, number, clients, 0.1)
        request = fed.PushEvaluationRequest(run=run, version=number, metrics={"accuracy": accuracy})
        await judge.stub.PushEvaluation(request, metadata=judge.metadata)
    await settled(daemon, run, [0, 1, 3, 4])
    await hold(daemon, run, 5, clients, 0.1)
    await settled(daemon, run, [0, 3, 4, 5])
    await hold(daemon, run, 6, clients, 0.1)
    await settled(daemon, run, [0, 3, 5, 6])
    kept = await daemon.server.store.transact(daemon.server.store.db.version, run, 3)
    assert kept.retention is HELD, "of two that are equal the earlier"


@FAST
async def test_a_version_that_a_ticket_starts_from_stays_until_its_update_counts(start: StartDaemon) -> None:
    daemon = await start(keep_versions=2)
    run, ((a, _), (b, _), (c, for_c)) = await begin(daemon, count=12, max_staleness=20)
    await c.withdraw(for_c.ticket)
    for _ in range(2):
        for client in (a, b):
            await client.push((await client.task()).ticket, filled(0.1))
    await daemon.until(run, lambda found: found.version == 2)
    old = await c.task()
    assert old.version == 2
    for _ in range(4):
        for client in (a, b):
            await client.push((await client.task()).ticket, filled(0.1))
    await daemon.until(run, lambda found: found.version == 6)
    await settled(daemon, run, [0, 2, 5, 6])
    assert (await c.pull(run, 2))[1], "a client that begins anew fetches it again"
    await c.push(old.ticket, filled(0.1))
    await a.push((await a.task()).ticket, filled(0.1))
    await daemon.until(run, lambda found: found.version == 7)
    await settled(daemon, run, [0, 6, 7])


@FAST
async def test_nobody_is_to_score_what_is_removed(start: StartDaemon) -> None:
    daemon, run, clients = await begun(start, keep_versions=2)
    for number in range(1, 7):
        await hold(daemon, run, number, clients, 0.1)
    await settled(daemon, run, [0, 5, 6])
    judge, other = await evaluator(daemon), await evaluator(daemon, "other")
    order = []
    for _ in range(3):
        order.append((await judge.wait()).evaluation.version)
        await push(judge, run, order[-1])
    assert order == [6, 5, 0]
    assert (await other.wait()).evaluation.version == 6
    await hold(daemon, run, 7, clients, 0.1)
    await settled(daemon, run, [0, 5, 6, 7])
    await hold(daemon, run, 8, clients, 0.1)
    await settled(daemon, run, [0, 6, 7, 8])
    backlog = {scoring.evaluator: scoring.backlog for scoring in (await daemon.run(run)).evaluators}
    assert backlog == {"judge": 2, "other": 4}
    late = fed.PushEvaluationRequest(run=run, version=5, metrics={"accuracy": 0.9})
    await other.stub.PushEvaluation(late, metadata=other.metadata)
    assert (await daemon.rounds(run))[4].metrics["accuracy"] == pytest.approx(0.7), (
        "figures of it are taken all the same"
    )


async def test_what_a_killed_server_left_goes_with_the_next_start(start: StartDaemon, tmp_path: Path) -> None:
    daemon, run, clients = await begun(start, keep_versions=2)  # files stay for a minute
    for number in range(1, 6):
        await hold(daemon, run, number, clients, 0.1)
    async with asyncio.timeout(10):
        while not await marked(clients[0], run, 1):
            await asyncio.sleep(0.02)
    assert files(daemon, run) == [0, 1, 2, 3, 4, 5], "their files stay for a moment"
    await daemon.end()
    assert check.main(["--data-dir", str(tmp_path / "data")]) == 0


@FAST
async def test_a_retention_begins_with_all_runs_and_ends_with_none(start: StartDaemon, tmp_path: Path) -> None:
    daemon, run, clients = await begun(start, count=5)
    for number in range(1, 6):
        await hold(daemon, run, number, clients, 0.1)
    await daemon.end()
    daemon = await start(tmp_path / "data", keep_versions=2)
    await settled(daemon, run, [0, 4, 5])
    await daemon.end()
    database = Database.open(f"sqlite:///{tmp_path / 'data' / 'fedpeft.db'}", TIMING)
    with database.transactions.begin() as connection:
        connection.exec_driver_sql("UPDATE versions SET retention = 'removing' WHERE version = 4")
    database.close()
    daemon = await start(tmp_path / "data")
    await settled(daemon, run, [0, 5])
    assert await refused((await daemon.clients("a"))[0].pull(run, 4)) == "VERSION_REMOVED"


@FAST
async def test_a_run_is_verified_without_the_versions_that_are_gone(start: StartDaemon, tmp_path: Path) -> None:
    daemon, run, clients = await begun(start, strategy="fedavgm", keep_versions=2, keep_updates=True)
    for number in range(1, 6):
        await hold(daemon, run, number, clients, 0.1 * number)
    await settled(daemon, run, [0, 4, 5])
    gone = "a version was removed by the server's retention"
    spool, session = tmp_path / "data" / "spool", Session(daemon.server.settings.listen)
    for where, said in ((None, ("agrees", "record and version agree")), (spool, ("and replay agree",) * 2)):
        lines = list[str]()
        await verified(session, run, where, lines.append)
        assert [gone in line for line in lines] == [True, True, True, False, False]
        assert said[0] in lines[0] and said[1] in lines[4]
    await back(daemon, run, 0)
    for number in range(7, 10):
        await hold(daemon, run, number, clients, 0.1)
    await settled(daemon, run, [0, 8, 9])
    lines = []
    with pytest.raises(StateInvalid, match=r"round 7 cannot be folded again: version 6, .* removed .* without --spool"):
        await verified(session, run, spool, lines.append)
    assert len(lines) == 6
    assert (await verified(session, run, None, lines.append))["last_record_sha256"]


async def test_a_setting_that_says_nothing_is_refused(start: StartDaemon) -> None:
    with pytest.raises(ValueError, match="--keep-versions-every 5 says nothing without --keep-versions"):
        await start(keep_versions_every=5)
    with pytest.raises(ValueError, match="greater than or equal to 2"):
        await start(keep_versions=1)


# What a step costs


@contextmanager
def counted(database: Database) -> Iterator[list[int]]:
    """Counts the instructions of SQLite's machine, in tens."""
    found = [0]
    with database.transactions.engine.connect() as connection:
        driver = connection.connection.driver_connection
        assert driver is not None

    def count() -> int:
        found[0] += 1
        return 0

    driver.set_progress_handler(count, 10)
    yield found
    driver.set_progress_handler(None, 0)


@pytest.mark.parametrize("every", [0, 10])
def test_a_step_costs_the_same_however_many_versions_there_were(tmp_path: Path, every: int) -> None:
    policy, costs = RetentionPolicy(20, every), []
    for rounds in (300, 3000):
        run = f"run-{rounds:012}"
        write_run(tmp_path / str(rounds), run, rounds, 1, state=RunState.RUNNING)
        database = Database.open(f"sqlite:///{tmp_path / str(rounds) / 'fedpeft.db'}", TIMING)
        steps = 0
        while True:
            step = database.retention.decide(run, policy, "server")
            assert len(step.removing) <= BATCH
            database.retention.removed(run, step.removing)
            steps += 1
            if not step.more:
                break
        assert steps == -(-(rounds - 20) // BATCH)
        with database.transactions.begin() as connection:
            connection.exec_driver_sql(
                f"INSERT INTO versions SELECT run, {rounds + 1}, sha256, size_bytes, state_sha256, "
                f"created_at, source, draw, '' FROM versions WHERE version = {rounds}"
            )
            connection.exec_driver_sql(f"UPDATE runs SET version = {rounds + 1}")
        with counted(database) as instructions:
            step = database.retention.decide(run, policy, "server")
            database.retention.removed(run, step.removing)
        # The best so far is the newest but twenty, since the accuracy grows: the one before it goes.
        assert step.removing == ((rounds - 20,) if not every else ())
        costs.append(instructions[0])
        database.close()
    assert costs[0] > 10
    assert costs[1] <= 1.1 * costs[0], costs
