"""Of several daemons on one database one folds, and another when that one is gone."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import replace
from typing import Any

import pytest
from structlog.testing import capture_logs

from fedpeft.errors import DatabaseUnavailable, DiskFull, RunNotFound, StoreUnavailable
from fedpeft.rounds.state_machine import Phase, Round
from fedpeft_server.runs import aggregation, waiting
from fedpeft_server.sharing.fold_lease import FoldLease
from fedpeft_server.store import database
from fedpeft_server.store.blobs.blobs import Blobs
from fedpeft_server.store.database import Database
from fedpeft_server.store.rows import RunState
from fedpeft_server.store.store import file_key, version_key, version_prefix
from fedpeft_server.timing import TIMING

from . import two_servers
from .two_servers import Cluster, Server, check

pytestmark = pytest.mark.parametrize("url", ["postgresql"], indirect=True)


async def folding_both(cluster: Cluster) -> tuple[str, Server, Server]:
    """Two servers, each of which knows of a round that is to be folded."""
    run = (await cluster.create()).id
    one, two = [await Server.of(store, run) for store in cluster.stores]
    await one.offer("ab")
    await one.receive("a", 1)
    await one.receive("b", 1)
    await two.engine.refresh()
    return run, one, two


async def test_one_folds_while_the_other_waits(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    folds, fold = list[object](), aggregation.Folding._fold_round

    async def counted(self: aggregation.Folding, folding: Round) -> Any:
        folds.append(self)
        await asyncio.sleep(0.5)
        return await fold(self, folding)

    monkeypatch.setattr(aggregation.Folding, "_fold_round", counted)
    run, one, two = await folding_both(cluster)
    await asyncio.gather(one.idle(), two.idle())
    assert len(folds) == 1 and one.engine.actor.status == two.engine.actor.status
    await asyncio.gather(one.close(), two.close())
    check(cluster.stores[0], run, [])


@pytest.mark.parametrize("returns", [False, True], ids=["died", "stood still"])
async def test_another_takes_over_from_one_that_does_not_prolong_its_lease(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, returns: bool
) -> None:
    """One that only stood still finds that its round is folded, and does no harm."""
    monkeypatch.setattr(two_servers, "TIMING", replace(TIMING, lease_s=0.6, lease_look_s=0.05))
    back, fold, keep = asyncio.Event(), aggregation.Folding._fold_round, FoldLease._keep
    first: list[aggregation.Folding] = []

    async def hangs(self: aggregation.Folding, folding: Round) -> Any:
        first[:] = first or [self]
        result = await fold(self, folding)
        if self is first[0]:
            await back.wait()
        return result

    async def keeps(self: FoldLease, epoch: int) -> None:
        if epoch > 1:
            await keep(self, epoch)

    monkeypatch.setattr(aggregation.Folding, "_fold_round", hangs)
    monkeypatch.setattr(FoldLease, "_keep", keeps)
    run, one, two = await folding_both(cluster)
    while not first:
        await asyncio.sleep(0.01)
    holder, other = (one, two) if first[0] is one.engine.folding else (two, one)
    began = time.monotonic()
    await asyncio.wait_for(other.idle(), 5)
    assert cluster.database.run(run).version == 1 and time.monotonic() - began < 4
    if not returns:
        holder.engine.folding._task.cancel()
    back.set()
    await holder.idle()
    assert cluster.database.run(run).version == 1
    await other.close()
    if returns:
        await holder.close()
    check(cluster.stores[0], run, [])


async def test_a_fold_that_finds_its_store_away_is_left_to_others(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its credentials may have expired, or its disk be full; the run is not paused for that, and goes on."""
    monkeypatch.setattr(two_servers, "TIMING", replace(TIMING, fold_retry_s=1.0, lease_look_s=0.05))
    tried, fold = list[aggregation.Folding](), aggregation.Folding._fold_round

    async def refused(self: aggregation.Folding, folding: Round) -> Any:
        tried.append(self)
        if self is tried[0] or len(tried) == 2:
            raise StoreUnavailable("the bucket refuses: the key has expired")
        return await fold(self, folding)

    monkeypatch.setattr(aggregation.Folding, "_fold_round", refused)
    run, one, two = await folding_both(cluster)
    async with asyncio.timeout(10):
        await asyncio.gather(one.idle(), two.idle())
    assert tried[0] is not tried[1] and len(tried) >= 3, "both could not at first"
    found = cluster.database.run(run)
    assert (found.state, found.version) == (RunState.RUNNING, 1)
    await asyncio.gather(one.close(), two.close())
    check(cluster.stores[0], run, [])


async def test_a_server_ends_though_it_may_not_fold_yet(cluster: Cluster) -> None:
    """Its bucket did not answer since its start, or it keeps files elsewhere than the others."""
    for store in cluster.stores:
        store.agreed.clear()
    run, one, two = await folding_both(cluster)
    async with asyncio.timeout(10):
        await asyncio.gather(one.close(), two.close())
    assert cluster.database.run(run).version == 0


@pytest.mark.parametrize("finds", ["a store away", "an update lost"])
async def test_a_fold_that_fails_once_another_has_its_lease_changes_nothing(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, finds: str
) -> None:
    """It would pause a run whose round is being folded, or have an update sent again that is there."""
    monkeypatch.setattr(two_servers, "TIMING", replace(TIMING, lease_s=0.6, lease_look_s=0.05))
    back, go, fold = asyncio.Event(), asyncio.Event(), aggregation.Folding._fold_round
    folds: list[aggregation.Folding] = []

    async def stands_still(self: aggregation.Folding, folding: Round) -> Any:
        folds.append(self)
        if self is not folds[0]:
            await go.wait()
            return await fold(self, folding)
        await back.wait()
        if finds == "a store away":
            raise StoreUnavailable("the bucket did not answer")
        raise aggregation.UpdatesLost({folding.tickets[0].id: f"{aggregation.LOST}: it is not there"})

    async def dies(self: FoldLease, epoch: int) -> None:
        pass

    monkeypatch.setattr(aggregation.Folding, "_fold_round", stands_still)
    monkeypatch.setattr(FoldLease, "_keep", dies)
    run, one, two = await folding_both(cluster)
    async with asyncio.timeout(5):
        while len(set(folds)) < 2:
            await asyncio.sleep(0.01)
    revision = cluster.database.revision(run)
    back.set()
    await asyncio.sleep(0.3)
    assert cluster.database.revision(run) == revision
    go.set()
    await asyncio.gather(one.idle(), two.idle())
    row = cluster.database.run(run)
    assert (row.version, row.state, row.reason) == (1, RunState.RUNNING, "")
    await asyncio.gather(one.close(), two.close())
    check(cluster.stores[0], run, [])


async def test_a_lease_for_which_the_database_has_no_room_is_asked_for_again(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ended the daemon, and the next one likewise."""
    monkeypatch.setattr(two_servers, "TIMING", replace(TIMING, fold_retry_s=0.05))
    take, refusals = Database.take_lease, list[str]()

    def full(self: Database, run: str, seconds: float) -> int | None:
        if len(refusals) < 3:
            refusals.append(run)
            raise DiskFull("the database has no room to grow")
        return take(self, run, seconds)

    monkeypatch.setattr(Database, "take_lease", full)
    run, one, two = await folding_both(cluster)
    async with asyncio.timeout(5):
        await asyncio.gather(one.idle(), two.idle())
    assert cluster.database.run(run).version == 1 and refusals == [run] * 3
    await asyncio.gather(one.close(), two.close())
    check(cluster.stores[0], run, [])


async def test_a_run_that_is_deleted_as_its_round_is_to_be_folded_ends_no_daemon(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    take, deleted, both = Database.take_lease, list[str](), threading.Event()

    def then_deleted(self: Database, run: str, seconds: float) -> int | None:
        if not both.is_set():  # as though another had it
            return None
        epoch = take(self, run, seconds)
        if not deleted:
            deleted.append(run)
            self.delete_run(run)
        return epoch

    monkeypatch.setattr(Database, "take_lease", then_deleted)
    run, one, two = await folding_both(cluster)
    both.set()
    folds = [server.engine.folding._task for server in (one, two)]
    async with asyncio.timeout(5):
        await asyncio.wait([fold for fold in folds if fold], return_when=asyncio.FIRST_COMPLETED)
    assert deleted == [run]
    await asyncio.gather(one.close(), two.close())


async def test_a_fold_whose_run_is_deleted_as_it_is_stored_leaves_nothing(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, goes_on, put = threading.Event(), threading.Event(), Blobs.put

    def stands_still(self: Blobs, key: str, *content: Any) -> Any:
        if "versions/000001" in key:
            begun.set()
            goes_on.wait(60)
        return put(self, key, *content)

    monkeypatch.setattr(Blobs, "put", stands_still)
    run, one, two = await folding_both(cluster)
    await asyncio.to_thread(begun.wait, 20)
    with capture_logs() as lines:
        store = cluster.stores[0]
        await asyncio.to_thread(store.forget_run, run, ())
        await store.transact(store.db.delete_run, run)
        goes_on.set()
        folds = [server.engine.folding._task for server in (one, two)]  # the other one waits for the lease
        async with asyncio.timeout(20):
            await asyncio.wait([fold for fold in folds if fold], return_when=asyncio.FIRST_COMPLETED)
    assert list(store.blobs.keys(f"runs/{run}")) == []
    assert [line for line in lines if line["log_level"] == "error"] == []
    await asyncio.gather(one.close(), two.close())


@pytest.mark.parametrize(("place", "name"), [(aggregation, "fold_round"), (Blobs, "put")], ids=["sums", "stores"])
async def test_a_fold_that_comes_late_does_not_write_over_the_version_that_was_committed(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, place: Any, name: str
) -> None:
    """Its server stood still while another found an update lost, was sent it with other bytes, and folded that."""
    monkeypatch.setattr(two_servers, "TIMING", replace(TIMING, lease_s=2.0, lease_look_s=0.05))
    begun, goes_on, method = threading.Event(), threading.Event(), getattr(place, name)

    def stands_still(*facts: Any, **options: Any) -> Any:
        if not begun.is_set() and (name != "put" or "versions/000001" in facts[1]):
            begun.set()
            goes_on.wait(60)
        return method(*facts, **options)

    async def dies(self: FoldLease, epoch: int) -> None:
        pass

    monkeypatch.setattr(place, name, stands_still)
    monkeypatch.setattr(FoldLease, "_keep", dies)
    run, one, two = await folding_both(cluster)
    await asyncio.to_thread(begun.wait, 20)
    cluster.stores[0].places[-1].delete_prefix(f"updates/{one.ticket('b', 1)}/")
    async with asyncio.timeout(20):
        while two.engine.round.phase is not Phase.OPEN:
            await asyncio.sleep(0.01)
    receipt = await two.receive("b", 1, 2.0)
    async with asyncio.timeout(20):
        while cluster.database.run(run).version != 1:
            await asyncio.sleep(0.01)
    goes_on.set()
    await asyncio.gather(one.idle(), two.idle())
    await asyncio.gather(one.close(), two.close())
    stored = cluster.database.version(run, 1)
    blobs = cluster.stores[0].blobs
    assert blobs.digest(file_key(stored)) == stored.sha256
    there = [key for key in blobs.keys(f"runs/{run}/versions") if key.startswith(version_prefix(run, 1))]
    assert there == [file_key(stored)], "what was not committed is removed"
    (held,) = [each for each in two_servers.shown(cluster.stores[0], run) if each.record]
    assert {each.payload_sha256 for each in held.tickets if each.ticket.client == "b"} == {receipt}


@pytest.mark.parametrize("ends", [False, True], ids=["goes on", "ends"])
async def test_files_of_folds_that_came_to_nothing_are_removed_once_the_store_lets_that_be_done(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, ends: bool
) -> None:
    monkeypatch.setattr(two_servers, "TIMING", replace(TIMING, files_retry_s=60.0 if ends else 0.05))
    run, server = (await cluster.create()).id, None
    blobs, keep, refused = cluster.stores[0].blobs, Blobs.keep_only, list[str]()
    other = version_key(run, 1, draw="0" * 16)
    blobs.put(other, b"of another fold")

    def refuses(self: Blobs, key: str, beginning: str) -> None:
        if len(refused) < 2 or ends:
            refused.append(key)
            raise StoreUnavailable("the bucket refuses")
        keep(self, key, beginning)

    monkeypatch.setattr(Blobs, "keep_only", refuses)
    server = await Server.of(cluster.stores[0], run)
    await server.offer("ab")
    await server.receive("a", 1)
    await server.receive("b", 1)
    async with asyncio.timeout(20):
        while (blobs.has(other) and not ends) or not refused:
            await asyncio.sleep(0.01)
    async with asyncio.timeout(5):
        await server.close()
    assert blobs.has(other) is ends and blobs.has(file_key(cluster.database.version(run, 1)))


async def test_files_that_a_fold_of_a_deleted_run_leaves_are_named(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, states, deleted = Blobs.put, Database.states, list[str]()

    def then_deleted(self: Blobs, key: str, *content: Any) -> Any:
        put(self, key, *content)
        if "versions/000001" in key:
            cluster.database.delete_run(run)
            deleted.append(key)

    def away(self: Database, runs: list[str]) -> object:
        if deleted:
            raise DatabaseUnavailable("it is away")
        return states(self, runs)

    run = (await cluster.create()).id
    server = await Server.of(cluster.stores[0], run)
    monkeypatch.setattr(Blobs, "put", then_deleted)
    await server.offer("ab")
    await server.receive("a", 1)
    with capture_logs() as lines:
        await server.receive("b", 1)
        monkeypatch.setattr(Database, "states", away)
        async with asyncio.timeout(20):
            while not deleted or not any("stay" in line["event"] for line in lines):
                await asyncio.sleep(0.01)
    (line,) = [line for line in lines if "stay" in line["event"]]
    assert line["files"] == deleted and line["log_level"] == "error"
    await server.close()


async def test_why_a_round_could_not_be_folded_is_not_said_of_the_next_one(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another daemon folded it meanwhile."""
    monkeypatch.setattr(two_servers, "TIMING", replace(TIMING, lease_s=0.2, lease_look_s=0.05, fold_retry_s=1.0))
    fold = aggregation.Folding._fold_round

    async def refused(self: aggregation.Folding, folding: Round) -> Any:
        if self._store is cluster.stores[0]:
            raise StoreUnavailable("the bucket refuses")
        return await fold(self, folding)

    monkeypatch.setattr(aggregation.Folding, "_fold_round", refused)
    run, one, two = await folding_both(cluster)
    async with asyncio.timeout(20):
        while not one.engine.folding.put_off:
            await asyncio.sleep(0.01)
        assert "refuses" in waiting.awaited(one.engine, 0.0, 0, for_operator=True)
        while cluster.database.run(run).version != 1:
            await asyncio.sleep(0.01)
    await one.engine.refresh()
    assert one.engine.round.number == 2 and one.engine.folding.put_off == ""
    await asyncio.gather(one.close(), two.close())


async def test_a_transaction_about_a_run_that_is_deleted_meanwhile_is_made_again(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It had found the run, and was refused by the foreign key: as a fault of the server, which ended that."""
    run, store, select = (await cluster.create()).id, cluster.stores[0], database.run_queries.select_revision

    def then_deleted(connection: Any, of: str) -> int:
        found = select(connection, of)
        monkeypatch.undo()
        cluster.stores[1].db.delete_run(of)
        return found

    monkeypatch.setattr(database.run_queries, "select_revision", then_deleted)
    with pytest.raises(RunNotFound):
        await store.transact(store.db.take_lease, run, 1.0)


async def test_what_was_folded_by_a_lease_that_another_took_is_not_committed(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = (await cluster.create()).id
    one, another = (store.db for store in cluster.stores)
    assert one.take_lease(run, 0.2) == 1
    assert another.take_lease(run, 10.0) is None
    assert one.take_lease(run, 0.0) == 2, "its own it may take again"
    assert another.take_lease(run, 10.0) == 3
    assert not one.prolong_lease(run, 2, 10.0)
    server, transit, epochs = await Server.of(cluster.stores[0], run), one.transit, list[int]()

    def stale(made: Any, *rest: Any) -> None:
        epochs.append(made.epoch)
        transit(replace(made, epoch=2) if made.epoch else made, *rest)

    assert another.prolong_lease(run, 3, 0.0)
    monkeypatch.setattr(one, "transit", stale)
    await server.offer("ab")
    await server.receive("a", 1)
    await server.receive("b", 1)
    async with asyncio.timeout(5):
        while epochs.count(4) + epochs.count(5) < 2:
            await asyncio.sleep(0.01)
    assert cluster.database.run(run).version == 0
    monkeypatch.undo()
    await server.idle()
    assert cluster.database.run(run).version == 1
    await server.close()
