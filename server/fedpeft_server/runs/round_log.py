"""Log lines, metrics and traces of the rounds of one run: what is said once a transition is in the database."""

from __future__ import annotations

from collections.abc import Mapping

import structlog

from fedpeft.process import tracing
from fedpeft.rounds.commit import Outcome
from fedpeft.rounds.state_machine import Phase, Round
from fedpeft.rounds.tickets import TicketState
from fedpeft_server.metrics import Metrics

log = structlog.get_logger()


class RoundLog:
    """Logs the events of the rounds of one run.

    Args:
        run: Its id.
        metrics: Metrics in which rounds are counted.
    """

    def __init__(self, run: str, metrics: Metrics) -> None:
        self._run = run
        self._metrics = metrics
        self._log = log.bind(run=run)
        self._reopened = 0, 0.0
        """Number of the last round that opened again, because none of its updates could be folded, and when."""

    def entered(self, before: Round, new: Round, now: float) -> None:
        """Says, and counts, that a round is open, is being folded, or has a later deadline, since now."""
        if new.phase is not before.phase and new.phase in (Phase.OPEN, Phase.AGGREGATING):
            self._log.info(f"round {new.phase}", round=new.number, clients=[t.client for t in new.tickets])
            if new.phase is Phase.AGGREGATING:
                self._closed(before, new, now)
            elif before.phase is Phase.AGGREGATING:
                self._reopened = new.number, now
        elif new.extensions > before.extensions:
            awaited = [t.client for t in new.in_state(TicketState.ISSUED)]
            self._metrics.rounds.labels(self._run, "extended").inc()
            self._log.warning("round extended", round=new.number, extensions=new.extensions, awaited=awaited)

    def _closed(self, before: Round, new: Round, now: float) -> None:
        """Counts the tickets that are late since now, and the time since the round opened, or opened again."""
        late = new.tickets.number(TicketState.LATE) - before.tickets.number(TicketState.LATE)
        self._metrics.updates.labels(self._run, "late").inc(late)
        number, at = self._reopened
        since = at if number == new.number else new.opened_at
        if since:
            self._metrics.round_seconds.labels(self._run, "open").observe(now - since)
            tracing.past("open", self._run, new.number, since, now, sampled=[t.client for t in new.tickets])

    def excluded(self, folded: Round, reasons: Mapping[str, str]) -> None:
        """Logs the updates that were not folded; `reasons` are by ticket."""
        self._metrics.updates.labels(self._run, "excluded").inc(len(reasons))
        for ticket in folded.tickets:
            if ticket.id in reasons:
                self._log.warning(
                    "update excluded", round=folded.number, client=ticket.client, cause=reasons[ticket.id]
                )

    def lost(self, folded: Round, reasons: Mapping[str, str]) -> None:
        """Logs the updates whose bytes are not there any more; `reasons` are by ticket."""
        self._metrics.updates.labels(self._run, "lost").inc(len(reasons))
        for ticket in folded.tickets:
            if ticket.id in reasons:
                self._log.error(
                    "update lost on the server; its client is asked for it again",
                    round=folded.number,
                    client=ticket.client,
                    cause=reasons[ticket.id],
                )

    def committed(self, done: Round, outcome: Outcome, at: float, seconds: float) -> None:
        """Logs that a round was committed at a time, seconds since the epoch, and the seconds of its fold."""
        self._metrics.rounds.labels(self._run, "committed").inc()
        self._metrics.round_seconds.labels(self._run, "aggregating").observe(seconds)
        self._metrics.committed(self._run, outcome.metrics)
        tracing.round_over(self._run, done.number, done.opened_at or at, at, updates=len(outcome.weights))
        self._log.info("round committed", round=done.number, updates=len(outcome.weights), seconds=round(seconds, 3))
