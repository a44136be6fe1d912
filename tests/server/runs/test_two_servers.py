"""Two engines drive one run on one database: each transition happens once, whoever tries."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from fedpeft.errors import RoundClosed, UpdateDiffers
from fedpeft.rounds.events import Event
from fedpeft.rounds.state_machine import Phase, Round
from fedpeft.rounds.tickets import TicketState
from fedpeft.rounds.transitions import Changes, RunStatus
from fedpeft_server.runs import aggregation
from fedpeft_server.sharing.fold_lease import FoldLease
from fedpeft_server.store.rows import RunState, Transition

from .two_servers import Cluster, Server, check, shown


async def test_both_receive_both_see_the_deadline_and_both_fold_and_commit(cluster: Cluster) -> None:
    """Everything is tried by both servers at the same time, until the run is over."""
    run = (await cluster.create()).id
    one, two = [await Server.of(store, run) for store in cluster.stores]
    receipts: list[tuple[str, str]] = []
    for number in (1, 2, 3):
        await asyncio.gather(one.offer("ab"), two.offer("ab"))
        tickets = [one.ticket(client, number) for client in "ab"]
        updates = [server.receive("a", number, 0.5) for server in (one, two)]
        answers = await asyncio.gather(*updates, two.receive("b", number) if number == 3 else one.deadline())
        receipts += [(tickets[0], answers[0]), (tickets[0], answers[1])]
        if number < 3:
            cluster.clock.now += 1001.0
            await asyncio.gather(one.deadline(), two.deadline())
        await asyncio.gather(one.idle(), two.idle())
        await asyncio.gather(one.engine.refresh(), two.engine.refresh())
        assert {server.engine.run.version for server in (one, two)} == {number}
        assert one.engine.actor.status == two.engine.actor.status
    assert one.engine.run.state is RunState.COMPLETED
    await asyncio.gather(one.close(), two.close())
    check(cluster.stores[1], run, receipts)
    states = [[t.ticket.state for t in r.tickets] for r in shown(cluster.stores[0], run)]
    assert states == [[TicketState.RECEIVED, TicketState.LATE]] * 2 + [[TicketState.RECEIVED] * 2]


async def test_a_round_is_committed_once_where_both_fold_it_at_the_same_time(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slower one folds all of it, of files that the other may have removed, and finds that it is done."""

    async def without(self: FoldLease) -> int:
        return 0

    monkeypatch.setattr(FoldLease, "take", without)
    run = (await cluster.create()).id
    one, two = [await Server.of(store, run) for store in cluster.stores]
    folds, both, fold = list[str](), asyncio.Barrier(2), aggregation.Folding._fold_round

    async def together(self: aggregation.Folding, folding: Round) -> Any:
        await both.wait()
        found = await fold(self, folding)
        folds.append(found.outcome.record_sha256)
        await both.wait()
        return found

    monkeypatch.setattr(aggregation.Folding, "_fold_round", together)
    await one.offer("ab")
    await two.engine.refresh()
    await one.receive("a", 1)
    await two.receive("b", 1)
    await one.engine.refresh()
    async with asyncio.timeout(20):
        await asyncio.gather(one.idle(), two.idle())
    assert len(folds) == 2 and len(set(folds)) == 1, "both folded, to the same bits"
    await asyncio.gather(one.close(), two.close())
    check(cluster.stores[0], run, [])
    counted = [server.engine._metrics.rounds.labels(run, "committed")._value.get() for server in (one, two)]
    assert sorted(counted) == [0.0, 1.0], "the one that committed it counts it"
    assert cluster.database.run(run).state is RunState.RUNNING, "the other one did not pause the run"


async def test_a_fold_that_finds_its_updates_removed_finds_that_it_is_done(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = (await cluster.create()).id
    one, two = [await Server.of(store, run) for store in cluster.stores]
    begun, known, done, fold = asyncio.Event(), asyncio.Event(), asyncio.Event(), aggregation.Folding._fold_round

    async def late(self: aggregation.Folding, folding: Round) -> Any:
        begun.set()
        await (done if self is two.engine.folding else known).wait()
        return await fold(self, folding)

    monkeypatch.setattr(aggregation.Folding, "_fold_round", late)
    await one.offer("ab")
    await one.receive("a", 1)
    await one.receive("b", 1)
    await begun.wait()  # it has the lease: the other would keep it from the fold that this one waits for
    await two.engine.refresh()
    assert two.engine.round.phase is Phase.AGGREGATING
    known.set()
    await one.idle()
    tickets = [ticket.id for ticket in two.engine.round.tickets]
    assert not any(cluster.stores[0].places[-1].has_any(f"updates/{ticket}") for ticket in tickets)
    done.set()
    await two.idle()
    assert two.engine.run.state is RunState.RUNNING and two.engine.run.version == 1
    await asyncio.gather(one.close(), two.close())
    check(cluster.stores[0], run, [])


async def test_a_rollback_ends_a_round_that_another_server_folds(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The version stays what the rollback made, though the fold writes its own file afterwards."""
    run = (await cluster.create()).id
    one, two = [await Server.of(store, run) for store in cluster.stores]
    await one.offer("ab")
    await one.receive("a", 1)
    await one.receive("b", 1)
    await one.idle()
    begun, go, fold = asyncio.Event(), asyncio.Event(), aggregation.Folding._fold_round

    async def late(self: aggregation.Folding, folding: Round) -> Any:
        begun.set()
        await go.wait()
        return await fold(self, folding)

    monkeypatch.setattr(aggregation.Folding, "_fold_round", late)
    await one.offer("ab")
    await one.receive("a", 2)
    await one.receive("b", 2)
    await begun.wait()
    assert await two.command("roll_back", 0, "poisoned") == ""
    go.set()
    await one.idle()
    assert (one.engine.run.version, one.engine.run.state, one.engine.round.number) == (2, RunState.RUNNING, 3)
    await asyncio.gather(one.close(), two.close())
    check(cluster.stores[0], run, [])
    assert cluster.database.version(run, 2).source == 0


async def test_of_two_updates_of_one_ticket_one_counts_and_the_other_is_told(cluster: Cluster) -> None:
    run = (await cluster.create()).id
    one, two = [await Server.of(store, run) for store in cluster.stores]
    await one.offer("ab")
    answers = await asyncio.gather(one.receive("a", 1, 1.0), two.receive("a", 1, 2.0))
    assert UpdateDiffers.reason in answers
    (receipt,) = [answer for answer in answers if answer != UpdateDiffers.reason]
    await asyncio.gather(one.idle(), two.idle(), one.close(), two.close())
    check(cluster.stores[0], run, [(one.ticket("a", 1), receipt)])


async def test_nothing_is_refused_by_what_one_server_remembers(cluster: Cluster) -> None:
    """The second one knows the first round alone, and neither its end nor the next one."""
    run = (await cluster.create()).id
    one, two = [await Server.of(store, run) for store in cluster.stores]
    await one.offer("ab")
    await two.engine.refresh()
    await one.receive("a", 1)
    await one.receive("b", 1)
    await one.idle()
    await one.offer("ab")
    assert (one.engine.round.number, two.engine.round.number) == (2, 1)
    assert len(await two.receive("a", 2)) == 64, "it is counted"
    assert two.engine.round.number == 2
    assert await two.receive("c", 1) == RoundClosed.reason
    assert await two.command("pause", "a while") == ""
    assert await one.command("resume") == ""
    assert await two.command("roll_back", 0, "poisoned") == ""
    assert await one.command("roll_back", 0, "poisoned") == "", "a repetition, which changes nothing"
    await asyncio.gather(one.engine.refresh(), two.engine.refresh())
    assert one.engine.actor.status == two.engine.actor.status
    assert (one.engine.run.version, one.engine.run.state) == (2, RunState.RUNNING)
    await asyncio.gather(one.close(), two.close())
    check(cluster.stores[0], run, [])


async def test_two_servers_pause_a_run_at_once_that_went_back(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = (await cluster.create()).id
    one = await Server.of(cluster.stores[0], run)
    await one.offer("ab")
    with cluster.database.transactions.begin() as connection:
        connection.exec_driver_sql("UPDATE runs SET revision = revision - 1")
    actor = one.engine.actor
    changes, first = actor.changes, [True]

    def late(status: RunStatus, *events: Event) -> Changes | None:
        found = changes(status, *events)
        if found and first and first.pop():
            cluster.database.transit(Transition(found))  # as the other does at this moment
        return found

    monkeypatch.setattr(actor, "changes", late)
    assert await actor.call(actor.pause_older) and not first
    assert cluster.database.run(run).state is RunState.PAUSED
    await one.close()


async def test_every_server_finds_out_that_a_run_went_back(cluster: Cluster) -> None:
    run = (await cluster.create()).id
    one, two = [await Server.of(store, run) for store in cluster.stores]
    await one.offer("ab")
    await one.receive("a", 1)
    await two.engine.refresh()
    with cluster.database.transactions.begin() as connection:
        connection.exec_driver_sql("UPDATE runs SET revision = revision - 2")
    for server in (one, two, two):
        assert await server.engine.actor.call(server.engine.actor.pause_older)
    await asyncio.gather(one.close(), two.close())


async def test_a_run_that_went_back_by_one_step_is_paused_for_every_server(cluster: Cluster) -> None:
    run = (await cluster.create()).id
    one, two = [await Server.of(store, run) for store in cluster.stores]
    await one.offer("ab")
    await two.engine.refresh()
    with cluster.database.transactions.begin() as connection:
        connection.exec_driver_sql("UPDATE runs SET revision = revision - 1")
    assert await one.engine.actor.call(one.engine.actor.pause_older)
    await two.engine.refresh()
    assert two.engine.run.state is RunState.PAUSED
    await asyncio.gather(one.close(), two.close())
