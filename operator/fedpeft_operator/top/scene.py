"""Text of `fedpeft top`: lines and rows made from the known state, nothing else.

Whatever a colour could say is a word too, so that a terminal without colours shows all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum

from fedpeft.api import views
from fedpeft.api.following import RunSnapshot
from fedpeft.api.narration import names
from fedpeft.api.round_table import RoundFigures
from fedpeft.formatting import counted, percent, size
from fedpeft.v1 import operator_service_pb2, run_pb2

MOST_ROWS = 500
"""Rows of a table; of more, those that come first in its order."""

BARS = "▁▂▃▄▅▆▇█"
PHASES = ("waiting", "open", "aggregating", "committed")
_TICKETS = {
    run_pb2.TICKET_STATE_REFUSED: "refused",
    run_pb2.TICKET_STATE_LATE: "late",
    run_pb2.TICKET_STATE_WITHDRAWN: "withdrawn",
    run_pb2.TICKET_STATE_ISSUED: "awaited",
    run_pb2.TICKET_STATE_RECEIVED: "received",
}
"""The states of a ticket, those that want attention first."""

Row = tuple[str, ...]


class View(StrEnum):
    """Contents of the lower table."""

    ROUND = "this round"
    ROUNDS = "all rounds"
    CLIENTS = "clients"


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        heads: The headings.
        rows: As many cells a row as there are headings.
        orders: By what it can be sorted.
    """

    heads: Row
    rows: tuple[Row, ...]
    orders: tuple[str, ...] = ()


def runs_table(runs: Iterable[run_pb2.Run], chosen: str) -> Table:
    """Returns all runs, the newest first; the chosen one is marked."""
    rows = [
        (
            ">" if run.id == chosen else " ",
            run.id,
            run.config.name[:18],
            views.state(run),
            f"{run.version}/{run.config.rounds.count}",
            run.reason.replace(f" of {run.id}", ""),
        )
        for run in runs
    ]
    return Table(("", "run", "name", "state", "version", "reason"), tuple(reversed(rows)))


def headline(snapshot: RunSnapshot, figures: Sequence[RoundFigures], now: datetime) -> list[str]:
    """Returns what is to be known of a run at a glance: what it is, where it is, how good, how many bytes."""
    run = snapshot.run
    tuned = views.adapter_parameters(run.spec)
    whole = run.model_parameters
    share = f" of {whole:,} parameters ({100 * tuned / whole:.2f} %)" if whole else " parameters"
    return [
        f"{run.config.name}: {run.spec.method} on {run.config.model.name}, {tuned:,}{share}",
        progress_line(snapshot),
        waiting_line(snapshot, now),
        scores_line(snapshot, figures),
        bytes_line(figures),
    ]


def progress_line(snapshot: RunSnapshot) -> str:
    """Returns where the run is: the round in progress with its phase in capitals among all phases."""
    run, current = snapshot.run, snapshot.current
    if current is None or snapshot.finished:
        return f"{views.state(run).upper()} at version {run.version} of {run.config.rounds.count}"
    now = views.phase(current)
    steps = " > ".join(phase.upper() if phase == now else phase for phase in PHASES)
    paused = "PAUSED; " if run.state == run_pb2.RUN_STATE_PAUSED else ""
    return f"{paused}round {current.number} of {run.config.rounds.count}: {steps}"


def waiting_line(snapshot: RunSnapshot, now: datetime) -> str:
    """Returns whom or what the run waits for, and until when."""
    run, current = snapshot.run, snapshot.current
    if snapshot.waiting:
        return snapshot.waiting
    if current is None or views.phase(current) != "open":
        return run.reason.replace(f" of {run.id}", "")
    awaited, rounds = views.awaited_words(run, current), run.config.rounds
    enough = f", quorum {views.quorum(rounds)}" if views.quorum(rounds) < rounds.clients else ""
    done = f"{len(views.counted(current))} of {rounds.clients} received{enough}"
    left = views.remaining_s(current, now)
    until = "" if left is None else f", {span(left)} left"
    again = f", extended {counted(current.extensions, 'time')}" if current.extensions else ""
    return f"{done}{until}{again}; waiting for {names(awaited)}" if awaited else f"{done}{until}{again}"


def scores_line(snapshot: RunSnapshot, figures: Sequence[RoundFigures]) -> str:
    """Returns accuracy and loss from the first version to the newest, and the accuracy's curve."""
    scored = [snapshot.run.initial_metrics, *(each.metrics for each in figures)]
    losses = [metrics["loss"] for metrics in scored if "loss" in metrics]
    scored = [metrics for metrics in scored if "accuracy" in metrics]
    trained = [each.metrics["train_loss"] for each in figures if "train_loss" in each.metrics]
    parts = []
    if scored:
        first, last = scored[0], scored[-1]
        curve = sparkline([metrics["accuracy"] for metrics in scored])
        parts.append(f"accuracy {percent(first['accuracy'])} {curve} {percent(last['accuracy'])}")
        if "loss" in last:
            parts.append(f"loss {last['loss']:.3f}")
    elif losses:
        parts.append(f"loss {losses[0]:.3f} {sparkline(losses)} {losses[-1]:.3f}")
    else:
        parts.append("accuracy: no version is scored yet")
    if trained:
        parts.append(f"training loss {trained[-1]:.3f}")
    return "   ".join(parts)


def bytes_line(figures: Sequence[RoundFigures]) -> str:
    """Returns the bytes of the committed rounds beside those of full fine-tuning."""
    up, down, full = (sum(getattr(each, kind) for each in figures) for kind in ("up", "down", "full"))
    line = f"sent up {size(up)}, down {size(down)}"
    if full and up:
        return f"{line}; full fine-tuning {size(full)} each way ({full / up:,.0f}x)"
    return line


def sparkline(values: Sequence[float], width: int = 24) -> str:
    """Returns a curve of bars, one a value, of the last `width` values."""
    values = values[-width:]
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    return "".join(BARS[round((value - low) / span * (len(BARS) - 1))] for value in values)


def tickets_table(snapshot: RunSnapshot, clients: Iterable[operator_service_pb2.Client], order: str) -> Table:
    """Returns who was sampled in the newest round, and what became of it."""
    known = {client.id: client for client in clients}
    current = snapshot.current or (snapshot.committed[-1] if snapshot.committed else None)
    tickets = list(current.tickets) if current is not None else []
    rank = {state: number for number, state in enumerate(_TICKETS)}
    keys: dict[str, Callable[[run_pb2.Ticket], object]] = {
        "state": lambda t: (rank.get(t.state, -1), t.client),
        "client": lambda t: t.client,
        "examples": lambda t: (-t.examples, t.client),
        "up": lambda t: (-t.wire_bytes_up, t.client),
    }
    tickets.sort(key=keys.get(order, keys["state"]))  # type: ignore[arg-type]  # each key is of one type
    rows = [_ticket(ticket, known.get(ticket.client)) for ticket in tickets[:MOST_ROWS]]
    heads = ("client", "state", "now", "loss", "up", "down", "examples", "reason")
    return Table(heads, (*rows, *_rest(len(tickets), len(heads))), tuple(keys))


def _ticket(ticket: run_pb2.Ticket, client: operator_service_pb2.Client | None) -> Row:
    loss = ticket.metrics.get("loss")
    awaited = client is not None and ticket.state == run_pb2.TICKET_STATE_ISSUED
    return (
        ticket.client,
        _TICKETS.get(ticket.state, "unknown"),
        "" if client is None else _doing(client),
        "" if loss is None else f"{loss:.3f}",
        size(ticket.wire_bytes_up),
        size(ticket.wire_bytes_down),
        f"{ticket.examples:,}" if ticket.examples else "",
        client.progress.description if client and awaited else ticket.reason,
    )


def _doing(client: operator_service_pb2.Client) -> str:
    """Returns what a client is doing in very few words; the last column has more of them."""
    if client.HasField("scoring"):
        return f"{client.activity} v{client.scoring.version}"
    if not client.HasField("progress"):
        return client.activity
    far = client.progress
    if not views.is_well(far):
        return views.progress_state(far)
    return f"{client.activity} {far.step}/{far.steps}" if far.steps else client.activity


def rounds_table(figures: Sequence[RoundFigures]) -> Table:
    """Returns every committed round, the newest first."""
    rows = [each.cells() for each in reversed(figures[-MOST_ROWS:])]
    heads = ("round", "clients", "accuracy", "loss", "train", "up", "down", "full", "took")
    return Table(heads, (*rows, *_rest(len(figures), len(heads))))


def clients_table(
    clients: Iterable[operator_service_pb2.Client], run: run_pb2.Run | None, now: datetime, order: str
) -> Table:
    """Returns every client; those that declined the run say why."""
    found = list(clients)
    keys: dict[str, Callable[[operator_service_pb2.Client], object]] = {
        "client": lambda c: c.id,
        "activity": lambda c: (c.activity, c.id),
        "updates": lambda c: (-c.updates, c.id),
        "last seen": lambda c: (-c.last_seen.ToNanoseconds(), c.id),
    }
    found.sort(key=keys.get(order, keys["client"]))  # type: ignore[arg-type]  # each key is of one type
    declined = {} if run is None else {decline.client: "; ".join(decline.reasons) for decline in run.declines}
    rows = [
        (
            client.id,
            views.role(client),
            _doing(client),
            f"{client.updates:,}",
            ago((now - client.last_seen.ToDatetime(UTC)).total_seconds()),
            f"declined: {declined[client.id]}" if client.id in declined else _trouble(client),
        )
        for client in found[:MOST_ROWS]
    ]
    heads = ("client", "role", "activity", "updates", "last seen", "note")
    return Table(heads, (*rows, *_rest(len(found), len(heads))), tuple(keys))


def _trouble(client: operator_service_pb2.Client) -> str:
    return client.progress.description if client.HasField("progress") and not views.is_well(client.progress) else ""


def clients_line(clients: Iterable[operator_service_pb2.Client]) -> str:
    """Returns how many clients do what."""
    count: dict[str, int] = {}
    for client in clients:
        count[client.activity] = count.get(client.activity, 0) + 1
    return ", ".join(f"{number:,} {doing}" for doing, number in sorted(count.items())) or "none yet"


def note(table: Table, row: int) -> str:
    """Returns what the last cell of a row says, as a narrow terminal cuts it; else of the first that has one."""
    rows = [table.rows[row]] if row < len(table.rows) and table.rows[row][-1] else table.rows
    found = next((cells for cells in rows if cells[-1]), None)
    return f"{found[0]}: {found[-1]}" if found and table.heads[-1] in ("reason", "note") else ""


def span(seconds: float) -> str:
    """Returns a time to come in its two largest units."""
    left = max(0, round(seconds))
    for unit, length, smaller, of_it in (("d", 86_400, "h", 3_600), ("h", 3_600, "min", 60), ("min", 60, "s", 1)):
        if left >= length:
            return f"{left // length} {unit} {left % length // of_it} {smaller}"
    return f"{left} s"


def ago(seconds: float) -> str:
    """Returns how long something is past, short."""
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length:.0f} {unit} ago"
    return f"{max(0.0, seconds):.0f} s ago"


def _rest(total: int, columns: int) -> list[Row]:
    """Returns a row that says how many are not shown, if any are not."""
    return [(f"and {total - MOST_ROWS:,} more", *[""] * (columns - 1))] if total > MOST_ROWS else []
