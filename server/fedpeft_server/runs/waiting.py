"""Sentences on what a run waits for, and from whom; no wait is silent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from types import MappingProxyType

from fedpeft.formatting import counted, duration
from fedpeft.rounds.state_machine import Phase, Round, begins_together, policy_of
from fedpeft.rounds.tickets import Ticket, TicketState, withdrawals
from fedpeft_server.runs.engine import RunEngine
from fedpeft_server.store.rows import RunState

NAMED = 8
"""Clients that are named."""


_NOBODY: Mapping[str, str] = MappingProxyType({})


def awaited(
    engine: RunEngine,
    now: float,
    ready: int,
    declined: int = 0,
    unanswered: Sequence[str] = (),
    ill: Mapping[str, str] = _NOBODY,
    *,
    for_operator: bool = False,
) -> str:
    """Returns a sentence about a run.

    Args:
        engine: The run.
        now: Time on the database's clock.
        ready: Clients that wait and take part in it.
        declined: Clients that declined it; why is for the operator alone.
        unanswered: Clients that have not answered its offer.
        ill: Of awaited clients that hang or are slow, what is known of them, those first that are worst; they are
            named before the others.
        for_operator: True if it is told what the server found, which may name its places.
    """
    run = engine.run if for_operator else engine.run.for_sites
    current, config = engine.round, run.config.rounds
    if run.state is not RunState.RUNNING:
        return f"{run.id} is {run.state}" + (f": {run.reason}" if run.reason else "")
    if (version := engine.actor.status.awaited_version) is not None:
        if version >= config.count:
            return f"{run.id} waits for the last version of the parent's server"
        return f"round {current.number} of {run.id} waits for version {version} of the parent's server"
    if current.phase is Phase.WAITING:
        if not begins_together(current, config):
            return f"round {current.number} of {run.id} waits for a client{_others(declined, unanswered)}"
        there = f"{ready} of {config.available} available"
        if config.available > ready >= config.least_available:
            there += "; it opens without the others if they do not come soon"
        elif current.deadline:
            there += f"; in {duration(max(0.0, current.deadline - now))} the run is paused if no more come"
        return f"round {current.number} of {run.id} waits for clients: {there}{_others(declined, unanswered)}"
    if current.phase is Phase.AGGREGATING:
        put_off, text = engine.folding.put_off, f"round {current.number} of {run.id} is being folded"
        if not put_off:
            return text
        return f"{text}; this server cannot yet, and tries again" + (f": {put_off}" if for_operator else "")
    names = [f"{client} ({words})" for client, words in ill.items()]
    well = (t for t in current.tickets if t.state is TicketState.ISSUED and t.client not in ill)
    names += (_with_version(current, each) for each in islice(well, max(0, NAMED - len(names))))
    out = current.tickets.number(TicketState.ISSUED)
    left = f", {max(0, round(current.deadline - now))} s to the deadline" if current.deadline else ""
    has, free = "", "replacements"
    if not policy_of(config).one_version:
        free = "clients that are free"
        has = f"has {current.tickets.number(TicketState.RECEIVED)} of {counted(config.clients, 'update')} and "
    whom = _some(names, out) if names else free + _others(declined, unanswered)
    return f"round {current.number} of {run.id} {has}awaits {whom}{left}"


def _with_version(current: Round, ticket: Ticket) -> str:
    """Returns the client of a ticket, with the version that it works from if that is not the newest."""
    stale = current.staleness(ticket)
    return f"{ticket.client} (from version {ticket.base_version})" if stale else ticket.client


def withdrawn(engine: RunEngine) -> str:
    """Returns what follows a sentence on a run: whose tickets of the open round were withdrawn, and why; may be empty.

    For operators alone: a client is not told of another's reasons.
    """
    current = engine.round
    if not engine.active or current.phase is not Phase.OPEN:
        return ""
    return withdrawals(current.tickets)


class Reasons:
    """The sentences for those who wait: each is made anew only when its facts are others, or a second is over."""

    def __init__(self) -> None:
        self._made: dict[str, tuple[tuple[object, ...], str]] = {}

    def of(self, engine: RunEngine, now: float, ready: int, declined: int, unanswered: Sequence[str]) -> str:
        """Returns the sentence about a run; the arguments are those of `awaited`."""
        facts = (
            engine.run,
            engine.round,
            ready,
            declined,
            len(unanswered),
            tuple(unanswered[:NAMED]),
            int(now),
        )
        made = self._made.get(engine.run.id)
        if made is None or made[0] != facts:
            made = self._made[engine.run.id] = facts, awaited(engine, now, ready, declined, unanswered)
        return made[1]

    def forget(self, run: str) -> None:
        """Forgets a run that was deleted."""
        self._made.pop(run, None)


def _others(declined: int, unanswered: Sequence[str]) -> str:
    """Returns what is said of the clients that are not there to be sampled."""
    text = f", {declined} declined" if declined else ""
    return text + (f", the answer of {_some(unanswered, len(unanswered))} is awaited" if unanswered else "")


def _some(names: Sequence[str], number: int) -> str:
    """Returns the first names, and how many more there are of `number` in all."""
    more = f" and {number - NAMED} more" if number > NAMED else ""
    return ", ".join(names[:NAMED]) + more
