"""The live table of a run on a terminal."""

from __future__ import annotations

from datetime import UTC, datetime
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fedpeft import formatting
from fedpeft.api import views
from fedpeft.api.following import RunSnapshot
from fedpeft.api.narration import MOST_NAMES, decline_line, headline, names
from fedpeft.api.round_table import of_message
from fedpeft.v1 import run_pb2
from fedpeft_operator.cli.round_rows import COLUMNS

REFRESH_PER_S = 4
ROOM_BESIDE_ROWS = 10
"""Lines of the terminal that are not rounds."""


class LiveView:
    """Draws the newest snapshot, several times a second so that the deadline counts down; a context manager."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console()
        self._snapshot: RunSnapshot | None = None
        self._live = Live(
            get_renderable=self._render, console=self._console, refresh_per_second=REFRESH_PER_S, transient=False
        )

    def __enter__(self) -> Self:
        self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.__exit__(kind, error, trace)

    def show(self, snapshot: RunSnapshot) -> None:
        """Draws a snapshot from now on."""
        self._snapshot = snapshot
        self._live.refresh()

    def _render(self) -> RenderableType:
        if self._snapshot is None:
            return Text("asking the server ...")
        rows = max(3, self._console.size.height - ROOM_BESIDE_ROWS)
        return render(self._snapshot, datetime.now(UTC), rows)


def render(snapshot: RunSnapshot, now: datetime, rows: int) -> RenderableType:
    """Returns what stands on the terminal.

    Args:
        snapshot: The run as it is known.
        now: The time, for the deadline.
        rows: Most rounds shown; older ones give way.
    """
    parts: list[RenderableType] = [Text(headline(snapshot.run), style="bold"), _table(snapshot, rows)]
    parts += [Text(line) for line in _sums(snapshot)]
    declines = snapshot.run.declines
    parts += [Text(decline_line(d), style="yellow", overflow="ellipsis", no_wrap=True) for d in declines[:MOST_NAMES]]
    parts.append(_status(snapshot, now))
    return Group(*parts)


def _table(snapshot: RunSnapshot, rows: int) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in COLUMNS:
        table.add_column(column, justify="right")
    final = snapshot.committed
    if len(final) > rows:
        table.add_row("...")
    elif "accuracy" in snapshot.run.initial_metrics:
        table.add_row("0", "", formatting.percent(snapshot.run.initial_metrics["accuracy"]), style="dim")
    for round_ in final[-rows:]:
        table.add_row(*of_message(round_, snapshot.run).cells(COLUMNS))
    if (current := snapshot.current) is not None:
        received, sampled = len(views.counted(current)), views.goal(current, snapshot.run)
        up, down = formatting.size(current.wire_bytes_up), formatting.size(current.wire_bytes_down)
        table.add_row(str(current.number), f"{received}/{sampled}", "", "", up, down, "", "", style="cyan")
    return table


def _sums(snapshot: RunSnapshot) -> list[str]:
    """Returns the bytes of all committed rounds beside those of full fine-tuning."""
    final = snapshot.committed
    if not final:
        return []
    up, down = sum(r.wire_bytes_up for r in final), sum(r.wire_bytes_down for r in final)
    full = sum(views.full_bytes(snapshot.run, len(views.counted(r))) for r in final)
    line = f"sent: up {formatting.size(up)}, down {formatting.size(down)}"
    return [line + (f"; full fine-tuning: {formatting.size(full)} each way" if full else "")]


def _status(snapshot: RunSnapshot, now: datetime) -> Text:
    """Returns the last line: what is going on, and who is awaited."""
    run, current = snapshot.run, snapshot.current
    if snapshot.lost:
        return Text(f"{snapshot.lost}; retrying until it answers", style="red")
    if snapshot.waiting:
        return Text(snapshot.waiting, style="yellow")
    if run.state != run_pb2.RUN_STATE_RUNNING:
        done = run.state == run_pb2.RUN_STATE_COMPLETED
        return Text(
            f"{views.state(run)}" + (f": {run.reason}" if run.reason else ""), style="green" if done else "yellow"
        )
    if current is None or views.phase(current) == "waiting":
        return Text(run.reason or "waiting for enough clients", style="yellow")
    if views.phase(current) != "open":
        return Text(f"round {current.number} is {views.phase(current)}")
    left = views.remaining_s(current, now)
    until = "" if left is None else f", {max(0, round(left))} s left"
    return Text(f"round {current.number} is open, waiting for {names(views.awaited_from(current)) or 'nobody'}{until}")
