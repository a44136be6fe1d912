"""Each thing of a round is said once, and counted once."""

from __future__ import annotations

import asyncio

from structlog.testing import capture_logs

from fedpeft.errors import PayloadInvalid
from fedpeft.rounds.events import Event, Excluded, Received, Waiting
from fedpeft.rounds.state_machine import Phase, Round, advance
from fedpeft.rounds.tickets import TicketState
from fedpeft_server.metrics import Metrics
from fedpeft_server.runs.round_log import RoundLog

from ..conftest import Daemon, config
from ..rows import CONFIG, RUN, opened

RULES = CONFIG.rounds.model_copy(update={"clients": 2})


class Driven:
    """A round and the log that is told of it."""

    def __init__(self, clients: int) -> None:
        self.metrics = Metrics()
        self.log = RoundLog(RUN, self.metrics)
        self.round: Round = opened(clients=clients)
        self.now = 2000.0

    def take(self, event: Event) -> None:
        self.now += 1.0
        new, _ = advance(self.round, event, RULES, self.now)
        self.log.entered(self.round, new, self.now)
        self.round = new

    def receive_two(self) -> None:
        for ticket in self.round.in_state(TicketState.ISSUED)[:2]:
            self.take(Received(ticket.id))

    def sample(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(name, {"run": RUN, **labels}) or 0.0

    def late(self) -> float:
        return self.sample("fedpeft_updates_total", outcome="late")


def test_an_update_is_late_once_though_its_round_is_folded_twice() -> None:
    driven = Driven(clients=5)
    driven.receive_two()
    assert (driven.round.phase, driven.late()) == (Phase.AGGREGATING, 3)
    driven.take(Excluded({t.id: "too large" for t in driven.round.in_state(TicketState.RECEIVED)}))
    assert driven.round.phase is Phase.OPEN
    driven.take(Waiting(frozenset({"new-1", "new-2", "new-3"})))
    added = len(driven.round.in_state(TicketState.ISSUED))
    assert added >= 2
    driven.receive_two()
    assert driven.round.phase is Phase.AGGREGATING
    assert driven.late() == 3 + added - 2
    assert driven.late() == len(driven.round.in_state(TicketState.LATE))


def test_time_in_which_a_round_was_open_is_counted_once_though_it_opens_twice() -> None:
    driven = Driven(clients=2)
    driven.receive_two()
    first = driven.sample("fedpeft_round_seconds_sum", phase="open")
    assert first > 0
    driven.take(Excluded({t.id: "too large" for t in driven.round.in_state(TicketState.RECEIVED)}))
    driven.take(Waiting(frozenset({"new-1", "new-2"})))
    driven.receive_two()
    assert driven.sample("fedpeft_round_seconds_count", phase="open") == 2
    assert driven.sample("fedpeft_round_seconds_sum", phase="open") < 1.5 * first, "it opened in the year 1970"


async def test_what_changes_nothing_is_neither_logged_nor_counted(daemon: Daemon) -> None:
    """A ticket is withdrawn once, whatever the client repeats; and what was withdrawn is not refused as well."""
    run = await daemon.create(config(rounds={"count": 1, "clients": 2}))
    a, b = await daemon.clients("a", "b")
    tasks = await asyncio.gather(a.task(), b.task())
    engine = daemon.server.runs.get(run.id)
    with capture_logs() as lines:
        for _ in range(3):
            await a.withdraw(tasks[0].ticket)
        for name in ("a", "b", "b"):
            ticket = engine.round.ticket_of(name)
            assert ticket is not None
            await engine.refuse(ticket, PayloadInvalid("a value is not finite"), name)
    said = [
        (line["event"], line["client"]) for line in lines if line["event"] in ("ticket withdrawn", "update refused")
    ]
    assert said == [("ticket withdrawn", "a"), ("update refused", "b")]
    counted = daemon.server.metrics.registry.get_sample_value(
        "fedpeft_updates_total", {"run": run.id, "outcome": "refused"}
    )
    assert counted == 1
