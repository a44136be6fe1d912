"""Narration of a run in lines: each event once, when it becomes known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from fedpeft import formatting
from fedpeft.api import views
from fedpeft.rounds.metric_values import ROLLED_BACK_TO
from fedpeft.v1 import run_pb2

if TYPE_CHECKING:
    from fedpeft.api.following import RunSnapshot

MOST_NAMES = 8
"""Clients named in one line."""


class Narrator:
    """Turns snapshots of a run into lines, none of them twice."""

    def __init__(self) -> None:
        self._said: set[str] = set()
        self._state = ""
        self._lost = False
        self._ill: dict[str, str] = {}

    def lines(self, snapshot: RunSnapshot) -> list[str]:
        """Returns what is new in a snapshot."""
        if snapshot.lost:
            lines = [] if self._lost else [f"{snapshot.lost}; retrying until it answers"]
            self._lost = True
            return lines
        lines = ["the server is back"] if self._lost else []
        self._lost = False
        lines += self._once(headline(snapshot.run))
        lines += self._once(scored_line(0, snapshot.run.initial_metrics))
        for round_ in views.committed(snapshot.rounds[number] for number in snapshot.changed):
            # Once a commit: bytes of calls that were still open then are added to the round later.
            key = f"{round_.number} committed {round_.committed_at.ToJsonString()}"
            lines += self._once(committed_line(round_, snapshot.run), key)
            lines += self._once(scored_line(round_.number, round_.metrics))
        if (current := snapshot.current) is not None:
            # Once a phase: the reason of a long wait changes with every client that comes.
            key = f"{current.number} {current.phase} {current.extensions}"
            lines += self._once(phase_line(current, snapshot.run), key)
            for ticket in views.withdrawn(current):
                lines += self._once(withdrawn_line(ticket, current.number), f"{ticket.id} {ticket.reason}")
            lines += self._hanging(snapshot.run, current.number)
        elif views.state(snapshot.run) == "running":  # an edge's, after its last round
            lines += self._once(snapshot.run.reason)
        for decline in snapshot.run.declines:
            lines += self._once(decline_line(decline))
        for row in views.evaluators(snapshot.run):
            for line in views.failed_lines(row):
                lines += self._once(line)
        lines += self._state_lines(snapshot.run)
        return lines + self._once(snapshot.waiting)

    def _once(self, line: str, key: str = "") -> list[str]:
        if not line or (key or line) in self._said:
            return []
        self._said.add(key or line)
        return [line]

    def _hanging(self, run: run_pb2.Run, number: int) -> list[str]:
        """Returns a line for each client that was not known to hang or to be slow, and for each that is back."""
        ill = {each.client: views.progress_state(each) for each in run.awaited if not views.is_well(each)}
        awaited = {each.client for each in run.awaited}
        lines = [
            f"round {number}: {each.client}: {each.description}"
            for each in run.awaited
            if each.client in ill and self._ill.get(each.client) != ill[each.client]
        ]
        lines += [
            f"round {number}: {client} goes on" for client in self._ill if client in awaited and client not in ill
        ]
        self._ill = ill
        return lines

    def _state_lines(self, run: run_pb2.Run) -> list[str]:
        """Returns a line when the run's state or its reason has changed; a run that merely runs needs none."""
        now = views.state(run) + (f": {run.reason}" if run.reason and views.state(run) != "running" else "")
        before, self._state = self._state, now
        if now == before or (now == "running" and not before):
            return []
        return [f"the run is {now}"]


def names(clients: list[str]) -> str:
    """Returns client ids as a list for people, the end of a long one as a number."""
    shown = ", ".join(clients[:MOST_NAMES])
    return shown if len(clients) <= MOST_NAMES else f"{shown} and {len(clients) - MOST_NAMES:,} more"


def headline(run: run_pb2.Run) -> str:
    """Returns what a run is."""
    tuned = views.adapter_parameters(run.spec)
    share = f" of {run.model_parameters:,}" if run.model_parameters else ""
    rounds = run.config.rounds
    of_each = formatting.counted(rounds.clients, "update" if views.is_buffered(run) else "client")
    return (
        f"{run.id} {run.config.name!r}: {run.spec.method} on {run.config.model.name}, {tuned:,}{share} parameters, "
        f"{formatting.counted(rounds.count, 'round')} of {of_each}"
    )


def phase_line(round_: run_pb2.Round, run: run_pb2.Run) -> str:
    """Returns what a round in progress waits for."""
    phase = views.phase(round_)
    start = f"round {round_.number} {phase}"
    if round_.extensions:
        start += f", extended {formatting.counted(round_.extensions, 'time')}"
    if phase == "waiting":
        return run.reason or f"{start} for enough clients"
    if phase == "open":
        awaited, sampled = views.awaited_from(round_), views.goal(round_, run)
        if len(awaited) == len(round_.tickets):
            return f"{start}: {names(awaited)}"
        received = formatting.counted(len(views.counted(round_)), "update")
        return f"{start}: {received} of {sampled} received, awaited: {names(awaited) or 'nobody'}"
    return start


def withdrawn_line(ticket: run_pb2.Ticket, number: int) -> str:
    """Returns whose ticket of a round was withdrawn, and why."""
    return f"round {number}: the ticket of {ticket.client} was withdrawn: {ticket.reason or 'no reason given'}"


def decline_line(decline: run_pb2.Decline) -> str:
    """Returns who does not take part in a run, and why."""
    return f"{decline.client} declined: {'; '.join(decline.reasons)}"


def committed_line(round_: run_pb2.Round, run: run_pb2.Run) -> str:
    """Returns what came of a round, and what it cost."""
    if (to := round_.metrics.get(ROLLED_BACK_TO)) is not None:
        return f"round {round_.number} rolled the run back to version {to:.0f}; no update was folded"
    clients, seconds = views.counted(round_), views.seconds(round_)
    full = views.full_bytes(run, len(clients))
    took = "" if seconds is None else f" in {seconds:.1f} s"
    beside = f" (full fine-tuning: {formatting.size(full)} each way)" if full else ""
    return (
        f"round {round_.number} committed{took}: {formatting.counted(len(clients), 'client')}{_stale(round_)}, "
        f"up {formatting.size(round_.wire_bytes_up)}, down {formatting.size(round_.wire_bytes_down)}{beside}"
    )


def _stale(round_: run_pb2.Round) -> str:
    """Returns how many counted updates started from earlier versions than the round's, and how much earlier."""
    counted = (t for t in round_.tickets if t.state == run_pb2.TICKET_STATE_RECEIVED)
    stale = [age for ticket in counted if (age := views.staleness(ticket, round_))]
    if not stale:
        return ""
    return f" ({len(stale)} of them up to {formatting.counted(max(stale), 'version')} behind)"


def scored_line(version: int, metrics: Mapping[str, float]) -> str:
    """Returns a version's figures on held-out data, or nothing while there are none."""
    figures = [f"accuracy {formatting.percent(metrics['accuracy'])}"] if "accuracy" in metrics else []
    figures += [f"loss {metrics['loss']:.3f}"] if "loss" in metrics else []
    return f"version {version} scored: {', '.join(figures)}" if figures else ""


def summary(snapshot: RunSnapshot) -> list[str]:
    """Returns the sums over a run that has ended."""
    final, run = snapshot.committed, snapshot.run
    up, down = sum(r.wire_bytes_up for r in final), sum(r.wire_bytes_down for r in final)
    full = sum(views.full_bytes(run, len(views.counted(r))) for r in final)
    lines = [
        f"{run.id} is {views.state(run)} at version {run.version}: "
        f"up {formatting.size(up)}, down {formatting.size(down)}"
    ]
    if full and up:
        lines.append(
            f"full fine-tuning would have sent {formatting.size(full)} each way, {formatting.as_much(full / up)} up"
        )
    return lines
