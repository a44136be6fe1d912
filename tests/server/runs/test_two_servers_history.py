"""A server that dies at any transition, and any history of events, end for two servers as for one."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedpeft.config import RunConfig
from fedpeft.rounds.tickets import TicketState
from fedpeft_server.store.rows import (
    RunState,
    Transition,
)
from fedpeft_server.store.store import Store

from .two_servers import BUFFERED, CLIENTS, CONFIG, Cluster, Server, check, shown


class Died(BaseException):
    """The end of a process in the middle of an instruction: nothing of it handles this."""


def dying(store: Store, at: int, *, written: bool) -> Callable[..., None]:
    """Returns a `transit` in whose call number `at` the process dies, before the transaction or right after it."""
    transit, calls = store.db.transit, iter(range(at + 1))

    def call(made: Transition, *rest: Any) -> None:
        last = next(calls, None) in (at, None)  # a process that is dead writes nothing more
        if not last or written:
            transit(made, *rest)
        if last:
            raise Died

    return call


@pytest.mark.parametrize("written", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("at", range(5))
@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
async def test_a_server_that_dies_at_any_transition_is_followed_by_another(
    cluster: Cluster, at: int, written: bool
) -> None:
    """The clients repeat to the second server what the first one did not answer."""
    run = (await cluster.create()).id
    first, receipts = await Server.of(cluster.stores[0], run), list[tuple[str, str]]()
    cluster.stores[0].db.transit = dying(cluster.stores[0], at, written=written)  # type: ignore[method-assign]
    try:
        for number in (1, 2, 3):
            await first.offer("ab")
            for client in "ab":
                receipts.append((first.ticket(client, number), await first.receive(client, number)))
            await first.idle()
            if first.faults:  # its fold died
                break
    except (Died, asyncio.CancelledError):
        pass  # the caller of a command that died is told nothing, or that it is over
    first.engine._disarm_timer()
    cluster.clock.now += 1.0
    second = await Server.of(cluster.stores[1], run)
    for number in range(second.engine.round.number, 4):
        await second.idle()
        await second.offer("ab")
        for client in "ab":
            answer = await second.receive(client, number)
            receipts += [(second.ticket(client, number), answer)] if len(answer) == 64 else []
        await second.idle()
    await second.close()
    assert cluster.database.run(run).state is RunState.COMPLETED
    check(cluster.stores[1], run, [(ticket, answer) for ticket, answer in receipts if len(answer) == 64])
    assert [[t.ticket.state for t in r.tickets] for r in shown(cluster.stores[1], run)] == [
        [TicketState.RECEIVED] * 2
    ] * 3


@pytest.mark.parametrize("written", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("at", range(10))
@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
async def test_tickets_that_outlive_their_rounds_outlive_a_server_that_dies_at_any_transition(
    cluster: Cluster, at: int, written: bool
) -> None:
    run = (await cluster.create(BUFFERED)).id
    first, receipts = await Server.of(cluster.stores[0], run), dict[str, str]()
    cluster.stores[0].db.transit = dying(cluster.stores[0], at, written=written)  # type: ignore[method-assign]
    versions = [("a", 1), ("b", 1)], [("c", 1), ("a", 2)], [("b", 2), ("c", 3)], [("a", 3), ("b", 4)]

    async def hold(server: Server) -> None:
        for version in versions:
            await server.idle()
            if server.faults:  # its fold died
                return
            await server.offer("abc")
            for client, number in version:
                answer = await server.receive(client, number, number + 0.5)
                if len(answer) == 64:
                    assert receipts.setdefault(server.ticket(client, number), answer) == answer
            await server.idle()

    with suppress(Died, asyncio.CancelledError):
        await hold(first)
    first.engine._disarm_timer()
    cluster.clock.now += 1.0
    second = await Server.of(cluster.stores[1], run)
    await hold(second)
    await second.close()
    assert cluster.database.run(run).state is RunState.COMPLETED
    check(cluster.stores[1], run, list(receipts.items()))
    made = [
        [(c["client"], c.get("staleness", 0)) for c in json.loads(each.record)["contributions"]]
        for each in shown(cluster.stores[1], run)
    ]
    assert made == [[("a", 0), ("b", 0)], [("a", 0), ("c", 1)], [("b", 1), ("c", 0)], [("a", 1), ("b", 0)]]


# A random history, told to one server, or to two of which each hears some events, some both, at once or one after
# the other.

Step = tuple[str, str, int]
"""Event, client, and the server that hears it: 0 or 1, 2 for both one after the other, 3 for both at once."""
STEPS = st.lists(
    st.tuples(
        st.sampled_from(("offer", "receive", "receive", "all", "withdraw", "refuse", "deadline", "pause", "resume")),
        st.sampled_from(CLIENTS),
        st.integers(0, 3),
    ),
    max_size=25,
)


async def happen(server: Server, event: str, client: str, number: int) -> str:
    """Tells a server an event of a round; returns what it answers."""
    match event:
        case "offer":
            await server.offer("".join(CLIENTS))
        case "receive":
            return await server.receive(client, number, 1.0 + CLIENTS.index(client))
        case "all":
            await server.offer("".join(CLIENTS))
            for each in server.engine.round.tickets:
                await server.receive(each.client, each.issued_in, 1.0 + CLIENTS.index(each.client))
        case "withdraw":
            return await server.withdraw(client, number)
        case "refuse":
            await server.refuse(client, number)
        case "deadline":
            await server.deadline()
        case "pause":
            return await server.command("pause", "a while")
        case "resume":
            return await server.command("resume")
    return ""


async def history(
    cluster: Cluster, config: RunConfig, steps: Sequence[Step], hearing: Callable[[int], Sequence[int]]
) -> dict[str, Any]:
    """Drives a run through a history; returns what became of it."""
    run = (await cluster.create(config)).id
    servers = [await Server.of(store, run) for store in cluster.stores]
    receipts: list[tuple[str, str]] = []
    for event, client, who in steps:
        current = cluster.database.standings(run)[0][1]
        held = current.ticket_of(client)
        number = held.issued_in if held else current.number
        if event == "deadline":
            cluster.clock.now += 1001.0
        # Several events in a row are no event of one round: the other server might go on to the next one meanwhile.
        hear = [servers[index] for index in hearing(who % 2 if event == "all" else who)]
        if len(hear) == 2 and who == 3:
            answers = list(await asyncio.gather(*(happen(server, event, client, number) for server in hear)))
        else:
            answers = [await happen(server, event, client, number) for server in hear]
        if event == "receive":
            receipts += [(servers[0].ticket(client, number), answer) for answer in answers if len(answer) == 64]
        await asyncio.gather(*(server.idle() for server in servers))
    await asyncio.gather(*(server.close() for server in servers))
    check(cluster.stores[0], run, receipts)
    ((row, current),) = cluster.database.standings(run)
    return {
        "run": (row.state, row.reason, row.version),
        "round": (current.number, current.phase, current.extensions, current.deadline),
        "tickets": [
            [
                (t.ticket.client, t.ticket.issued_in, t.ticket.state, t.ticket.reason, t.weight, t.payload_sha256)
                for t in shown_round.tickets
            ]
            for shown_round in shown(cluster.stores[0], run)
        ],
        "conducts": {a.client: a.conduct for a in cluster.database.answers() if a.run == run},
    }


@given(steps=STEPS)
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@pytest.mark.parametrize("config", [CONFIG, BUFFERED], ids=["synchronous", "buffered"])
@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
def test_any_history_ends_for_two_servers_as_for_one(cluster: Cluster, config: RunConfig, steps: list[Step]) -> None:
    async def compared() -> tuple[dict[str, Any], dict[str, Any]]:
        alone = await history(cluster, config, [(event, client, 0) for event, client, _ in steps], lambda _: (0,))
        return alone, await history(cluster, config, steps, lambda who: (who,) if who < 2 else (0, 1))

    alone, together = asyncio.run(compared())
    assert together == alone
