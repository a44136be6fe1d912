"""A run goes back to an earlier version: as a new one, with its record, and everything that follows holds."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest

from fedpeft.api.operator_client import OperatorClient
from fedpeft.errors import BlobCorrupt
from fedpeft.v1 import federation_service_pb2 as fed
from fedpeft.v1 import operator_service_pb2 as op
from fedpeft.v1 import run_pb2
from fedpeft_operator.cli.run.verify import verified
from fedpeft_operator.cli.session import Session

from ..conftest import Daemon, RawClient, StartDaemon, config, filled, refused

FEDAVGM = {"strategy": "fedavgm", "momentum": 0.9}


async def hold(daemon: Daemon, run: str, number: int, clients: list[RawClient], value: float) -> None:
    tasks = await asyncio.gather(*(client.task() for client in clients))
    for client, task in zip(clients, tasks, strict=True):
        assert (task.round, task.version) == (number, number - 1)
        await client.push(task.ticket, filled(value))
    await daemon.until(run, lambda found: found.version == number)


async def back(daemon: Daemon, run: str, to: int, reason: str = "") -> run_pb2.Run:
    request = op.RollbackRunRequest(run=run, version=to, reason=reason)
    return (await daemon.operator.RollbackRun(request)).run


async def verify(daemon: Daemon, run: str, *, replay: bool = True) -> list[str]:
    spool, lines = daemon.server.settings.data_dir / "spool", list[str]()
    await verified(Session(daemon.server.settings.listen), run, spool if replay else None, lines.append)
    return lines


@pytest.mark.parametrize("strategy", ["fedavg", "fedavgm", "fedadam"])
async def test_the_run_goes_on_from_the_earlier_version_and_its_state(start: StartDaemon, strategy: str) -> None:
    daemon = await start(keep_updates=True)
    sections = {"rounds": {"count": 6, "clients": 2}, "aggregation": {"strategy": strategy}}
    run = (await daemon.create(config(**sections))).id
    clients = await daemon.clients("a", "b")
    for number in (1, 2, 3):
        await hold(daemon, run, number, clients, 0.5 * number)
    went = await back(daemon, run, 1, "the third was wrong")
    assert (went.version, went.state) == (4, run_pb2.RUN_STATE_RUNNING)
    earlier, now = await daemon.adapter(run, 1), await daemon.adapter(run, 4)
    assert all(np.array_equal(earlier[name], now[name]) for name in earlier)
    await hold(daemon, run, 5, clients, 1.0)
    await hold(daemon, run, 6, clients, 1.0)

    # What follows is what would have followed: the strategy's state went back as well.
    straight = (await daemon.create(config(**{**sections, "rounds": {"count": 3, "clients": 2}}), request_id="s")).id
    for number, value in ((1, 0.5), (2, 1.0), (3, 1.0)):
        await hold(daemon, straight, number, clients, value)
    ended, expected = await daemon.adapter(run, 6), await daemon.adapter(straight, 3)
    assert all(np.array_equal(ended[name], expected[name]) for name in ended)
    assert len(await verify(daemon, run)) == 6
    assert len(await verify(daemon, run, replay=False)) == 6


async def test_the_round_in_progress_is_over_and_its_clients_are_told(daemon: Daemon) -> None:
    run = (await daemon.create(config(rounds={"count": 5, "clients": 2}))).id
    a, b = await daemon.clients("a", "b")
    await hold(daemon, run, 1, [a, b], 0.5)
    tasks = await asyncio.gather(a.task(), b.task())
    given = {client: task.ticket for client, task in zip((a, b), tasks, strict=True)}
    await a.push(given[a], filled(0.5))
    await back(daemon, run, 0)
    for client in (a, b):
        standing = await client.upload(given[client])
        assert standing.state == run_pb2.TICKET_STATE_REFUSED and "rolled back to version 0" in standing.reason
    assert await refused(b.push(given[b], filled(0.5))) == "TICKET_CLOSED"
    await hold(daemon, run, 3, [a, b], 0.5)
    assert all((values == 0.5).all() for values in (await daemon.adapter(run, 3)).values())
    listed = {c.id: c for c in (await daemon.operator.ListClients(op.ListClientsRequest())).clients}
    assert [listed[name].updates for name in "ab"] == [2, 2]
    assert not any(answer.missed for c in listed.values() for answer in c.answers), "that was not theirs"


async def test_the_record_the_audit_log_and_the_figures_say_it(daemon: Daemon) -> None:
    run = (await daemon.create(config(rounds={"count": 5, "clients": 1}))).id
    (a,) = await daemon.clients("a")
    for number in (1, 2):
        await hold(daemon, run, number, [a], 0.5)
    await back(daemon, run, 1, "poisoned")
    third = (await daemon.rounds(run))[2]
    written = json.loads(third.record)
    assert (written["format"], written["rolled_back_to"], written["contributions"]) == (2, 1, [])
    assert third.metrics["rolled_back_to"] == 1
    entries = await daemon.server.store.transact(daemon.server.store.db.transactions.entries_after, 0, 100)
    (entry,) = [e for e in entries if e.action == "run.rolled_back"]
    said = json.loads(entry.details)
    assert (entry.actor, entry.object, said["to"], said["version"], said["reason"]) == ("local", run, 1, 3, "poisoned")


async def test_a_repetition_changes_nothing_and_what_cannot_be_is_refused(daemon: Daemon) -> None:
    run = (await daemon.create(config(rounds={"count": 3, "clients": 1}))).id
    (a,) = await daemon.clients("a")
    assert await refused(back(daemon, run, 0)) == "VERSION_NOT_FOUND"
    await hold(daemon, run, 1, [a], 0.5)
    for version in (1, 2, 2**32 - 1):
        assert await refused(back(daemon, run, version)) == "VERSION_NOT_FOUND"
    assert await refused(back(daemon, "run-000000000000", 0)) == "RUN_NOT_FOUND"
    assert (await back(daemon, run, 0)).version == 2
    assert (await back(daemon, run, 0)).version == 2
    await hold(daemon, run, 3, [a], 0.5)
    assert await refused(back(daemon, run, 0)) == "RUN_FINISHED"


async def test_a_paused_run_goes_back_and_stays_paused_over_a_restart(start: StartDaemon) -> None:
    daemon = await start()
    run = (await daemon.create(config(rounds={"count": 4, "clients": 1}))).id
    (a,) = await daemon.clients("a")
    await hold(daemon, run, 1, [a], 0.5)
    await daemon.operator.PauseRun(op.PauseRunRequest(run=run))
    assert (await back(daemon, run, 0)).state == run_pb2.RUN_STATE_PAUSED
    await daemon.end()
    daemon = await start()
    assert (await daemon.run(run)).version == 2
    await daemon.operator.ResumeRun(op.ResumeRunRequest(run=run))
    (a,) = await daemon.clients("a")
    await hold(daemon, run, 3, [a], 0.5)


async def test_a_client_that_holds_the_earlier_version_pulls_nothing(daemon: Daemon) -> None:
    run = (await daemon.create(config(rounds={"count": 4, "clients": 1}))).id
    (a,) = await daemon.clients("a")
    header, _ = await a.pull(run, 0)
    await hold(daemon, run, 1, [a], 0.5)
    await back(daemon, run, 0)
    again, data = await a.pull(run, 2, have=header.manifest.sha256)
    assert again.up_to_date and not data


async def test_an_evaluator_scores_the_new_version(daemon: Daemon) -> None:
    run = (await daemon.create(config(rounds={"count": 4, "clients": 1}))).id
    (a,) = await daemon.clients("a")
    await hold(daemon, run, 1, [a], 0.5)
    await back(daemon, run, 0)
    scorer = daemon.client("scorer")
    await scorer.register(fed.CLIENT_ROLE_EVALUATOR)
    assert (await scorer.wait()).evaluation.version == 2


async def test_a_version_that_is_not_the_earlier_one_is_found(start: StartDaemon, tmp_path: Path) -> None:
    """A server that says it went back and put something else there."""
    daemon = await start()
    run = (await daemon.create(config(rounds={"count": 4, "clients": 1}))).id
    (a,) = await daemon.clients("a")
    for number in (1, 2):
        await hold(daemon, run, number, [a], 0.5)
    await back(daemon, run, 1)
    await verify(daemon, run, replay=False)
    await lie(daemon, run, tmp_path)
    with pytest.raises(BlobCorrupt, match="round 3"):
        await verify(daemon, run, replay=False)


async def lie(daemon: Daemon, run: str, scratch: Path) -> None:
    """Makes the server's record and file of version 3 those of other tensors, digests and all."""
    from fedpeft.rounds import record
    from fedpeft.rounds.commit import write_version
    from fedpeft_server.runs.aggregation import run_header
    from fedpeft_server.store.store import version_key

    store = daemon.server.store
    engine = daemon.server.runs.get(run)
    forged = scratch / "forged"
    written = write_version(run_header(engine.run), filled(9.0), forged)
    async with OperatorClient(daemon.server.settings.listen) as client:
        kept = (await client.rounds(run))[2]
    changed = json.loads(kept.record) | {"adapter_sha256": written.sha256}
    text = json.dumps(changed, sort_keys=True, separators=(",", ":"))
    with store.db.transactions.begin() as connection:
        connection.exec_driver_sql(
            "UPDATE rounds SET record = ?, record_sha256 = ? WHERE number = 3", (text, record.digest(text))
        )
        sizes = (written.sha256, written.size_bytes)
        connection.exec_driver_sql("UPDATE versions SET sha256 = ?, size_bytes = ? WHERE version = 3", sizes)
    store.blobs.put(version_key(run, 3, 1), forged)
