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
from fedpeft.api.following import Picture
from fedpeft.api.narration import MOST_NAMES, decline_line, headline, names
from fedpeft.v1 import run_pb2

REFRESH_PER_S = 4
ROOM_BESIDE_ROWS = 10
"""Lines of the terminal that are not rounds."""


class LiveView:
    """Draws the newest picture, several times a second so that the deadline counts down; a context manager."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console()
        self._picture: Picture | None = None
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

    def show(self, picture: Picture) -> None:
        """Draws a picture from now on."""
        self._picture = picture
        self._live.refresh()

    def _render(self) -> RenderableType:
        if self._picture is None:
            return Text("asking the server ...")
        rows = max(3, self._console.size.height - ROOM_BESIDE_ROWS)
        return render(self._picture, datetime.now(UTC), rows)


def render(picture: Picture, now: datetime, rows: int) -> RenderableType:
    """Returns what stands on the terminal.

    Args:
        picture: The run as it is known.
        now: The time, for the deadline.
        rows: Most rounds shown; older ones give way.
    """
    parts: list[RenderableType] = [Text(headline(picture.run), style="bold"), _table(picture, rows)]
    parts += [Text(line) for line in _sums(picture)]
    declines = picture.run.declines
    parts += [Text(decline_line(d), style="yellow", overflow="ellipsis", no_wrap=True) for d in declines[:MOST_NAMES]]
    parts.append(_status(picture, now))
    return Group(*parts)


def _table(picture: Picture, rows: int) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("round", "clients", "accuracy", "train loss", "up", "down", "full fine-tuning", "seconds"):
        table.add_column(column, justify="right")
    final = picture.committed
    if len(final) > rows:
        table.add_row("...")
    elif "accuracy" in picture.run.initial_metrics:
        table.add_row("0", "", formatting.percent(picture.run.initial_metrics["accuracy"]), style="dim")
    for round_ in final[-rows:]:
        clients, took = len(views.counted(round_)), views.seconds(round_)
        loss = round_.metrics.get("train_loss")
        table.add_row(
            str(round_.number),
            str(clients),
            formatting.percent(round_.metrics.get("accuracy")),
            "-" if loss is None else f"{loss:.3f}",
            formatting.size(round_.wire_bytes_up),
            formatting.size(round_.wire_bytes_down),
            formatting.size(views.full_bytes(picture.run, clients)) if picture.run.model_parameters else "-",
            "-" if took is None else f"{took:.1f}",
        )
    if (current := picture.current) is not None:
        received, sampled = len(views.counted(current)), len(current.tickets)
        up, down = formatting.size(current.wire_bytes_up), formatting.size(current.wire_bytes_down)
        table.add_row(str(current.number), f"{received}/{sampled}", "", "", up, down, "", "", style="cyan")
    return table


def _sums(picture: Picture) -> list[str]:
    """Returns the bytes of all committed rounds beside those of full fine-tuning."""
    final = picture.committed
    if not final:
        return []
    up, down = sum(r.wire_bytes_up for r in final), sum(r.wire_bytes_down for r in final)
    full = sum(views.full_bytes(picture.run, len(views.counted(r))) for r in final)
    line = f"sent: up {formatting.size(up)}, down {formatting.size(down)}"
    return [line + (f"; full fine-tuning: {formatting.size(full)} each way" if full else "")]


def _status(picture: Picture, now: datetime) -> Text:
    """Returns the last line: what is going on, and who is awaited."""
    run, current = picture.run, picture.current
    if picture.lost:
        return Text(f"{picture.lost}; retrying until it answers", style="red")
    if picture.waiting:
        return Text(picture.waiting, style="yellow")
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
    return Text(f"round {current.number} is open, waiting for {names(views.awaited(current)) or 'nobody'}{until}")
