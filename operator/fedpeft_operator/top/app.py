"""The screen of `fedpeft top`."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any, ClassVar

from rich.cells import cell_len
from rich.text import Text
from textual import work
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.events import Resize
from textual.timer import Timer
from textual.widgets import DataTable, Footer, Static

from fedpeft.api import views
from fedpeft.api.operator_client import Connect
from fedpeft.api.round_table import CommittedFigures
from fedpeft.errors import FedpeftError
from fedpeft.v1 import run_pb2
from fedpeft_operator.top import scene
from fedpeft_operator.top.dialogs import Keys, Question
from fedpeft_operator.top.feed import Feed
from fedpeft_operator.top.scene import View

NUMBERS = frozenset(("updates", "examples", "loss", "up", "down", "accuracy", "train", "full", "took", "clients"))
"""Headings of the columns that are aligned to the right."""

DRAW_S = 0.25
"""Shortest time between two drawings of the whole screen that changes of the run ask for."""

WIDE = 130
"""Columns of a terminal from which on the clients have room beside the round."""

STYLES = """
Screen { background: $background; }
#title { height: 1; text-style: reverse; }
#runs { height: auto; max-height: 5; }
#head { height: 5; padding: 0 1; text-wrap: nowrap; text-overflow: ellipsis; }
#views { height: 1; text-style: bold; padding: 0 1; }
#lower { height: 1fr; }
#side { width: 50%; display: none; border-left: solid $foreground 30%; }
#past { display: none; height: 1fr; }
.wide #side, .wide #past { display: block; }
.wide #runs { max-height: 12; }
#side-title { height: 1; text-style: bold; padding: 0 1; }
DataTable { background: $background; overflow-x: hidden; }
#detail { height: 1fr; }
#note { height: auto; max-height: 2; padding: 0 1; }
Question, Keys { align: center middle; }
Question > Vertical, Keys > Vertical {
    width: auto; max-width: 96%; height: auto; border: round $foreground; padding: 1 2; background: $background;
}
Question Static, Keys Static { width: auto; }
"""


class TopApp(App[None]):
    """Runs, one of them in full, and the clients.

    Args:
        connect: Makes a client of the server.
        address: The server's address, for the title.
        may_write: True if this operator may pause, resume and stop runs.
        run: The run to begin with; the newest if none is named.
    """

    TITLE = "fedpeft top"
    CSS = STYLES
    ENABLE_COMMAND_PALETTE = False
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("1", "view('this round')", "Round"),
        Binding("2", "view('all rounds')", "Rounds"),
        Binding("3", "view('clients')", "Clients"),
        Binding("s", "sort", "Sort"),
        Binding("p", "pause", "Pause/resume"),
        Binding("x", "stop", "Stop"),
        Binding("question_mark", "keys", "Keys"),
        Binding("q", "quit", "Quit"),
    ]

    def __init__(self, connect: Connect, address: str, *, may_write: bool = True, run: str = "") -> None:
        super().__init__()
        self._feed = Feed(connect, self._draw_soon)
        self._address = address
        self._may_write = may_write
        self._chosen = run
        self._view = View.ROUND
        self._orders: dict[View, str] = {View.ROUND: "state", View.CLIENTS: "client"}
        self._shown: dict[str, scene.Table] = {}
        self._figures = CommittedFigures()
        self._drawn_at = 0.0
        self._next_draw: Timer | None = None

    def compose(self) -> ComposeResult:
        """Lays the screen out."""
        yield Static(id="title", markup=False)
        yield DataTable[str](id="runs", cursor_type="row", zebra_stripes=False)
        yield Static(id="head", markup=False)
        with Horizontal(id="lower"):
            with Vertical():
                yield Static(id="views", markup=False)
                yield DataTable[str](id="detail", cursor_type="row")
                yield Static(id="note", markup=False)
                yield DataTable[str](id="past", cursor_type="row")
            with Vertical(id="side"):
                yield Static(id="side-title", markup=False)
                yield DataTable[str](id="people", cursor_type="row")
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        """Begins to look."""
        self.run_worker(self._feed.survey(), name="survey")
        if self._chosen:
            self._follow(self._chosen)
        self.set_interval(1.0, self._draw)
        self.query_one("#runs").focus()
        self._draw()

    def on_resize(self, event: Resize) -> None:
        """Makes room for the clients beside the round where there is any."""
        self.screen.set_class(event.size.width >= WIDE, "wide")
        self._draw()

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Takes away what this operator may not do."""
        return self._may_write or action not in ("pause", "stop")

    def on_data_table_row_highlighted(self, event: DataTable.RowHighlighted) -> None:
        """Follows the run that the cursor is on."""
        if event.data_table.id == "runs" and event.row_key.value and event.row_key.value != self._chosen:
            self._follow(event.row_key.value)

    def action_view(self, name: str) -> None:
        """Chooses what the lower table shows."""
        self._view = View(name)
        self._draw()

    def action_sort(self) -> None:
        """Sorts the lower table by the next thing."""
        orders = self._lower(datetime.now(UTC)).orders
        if orders:
            here = orders.index(self._orders[self._view])
            self._orders[self._view] = orders[(here + 1) % len(orders)]
            self._draw()

    def action_keys(self) -> None:
        """Shows the keys."""
        self.push_screen(Keys())

    def action_pause(self) -> None:
        """Pauses the run, or resumes it, once the question is answered."""
        run = self._run
        if run is None or views.state(run) not in ("running", "paused"):
            self.notify("This run has ended.", severity="warning")
        elif views.state(run) == "paused":
            self._steer(f"Resume {run.config.name} ({run.id})?", self._feed.resume, run.id)
        else:
            text = f"Pause {run.config.name} ({run.id})?\nThe open round continues; no new round opens."
            self._steer(text, self._feed.pause, run.id)

    def action_stop(self) -> None:
        """Stops the run, once the question is answered."""
        run = self._run
        if run is None or views.state(run) not in ("running", "paused"):
            self.notify("This run has ended.", severity="warning")
            return
        text = f"Stop {run.config.name} ({run.id})?\nIt cannot be resumed. Committed versions are kept."
        self._steer(text, self._feed.stop, run.id)

    @work(group="steer")
    async def _steer(self, question: str, call: Callable[[str], Awaitable[None]], run: str) -> None:
        if not await self.push_screen_wait(Question(question)):
            return
        try:
            await call(run)
        except FedpeftError as error:
            self.notify(error.message, severity="error", markup=False)

    @property
    def _run(self) -> run_pb2.Run | None:
        """The chosen run, as it was heard of last."""
        snapshot = self._feed.snapshot
        return None if snapshot is None else snapshot.run

    def _follow(self, run: str) -> None:
        self._chosen = run
        self.run_worker(self._feed.watch(run), name=run, group="watch", exclusive=True)

    def _draw_soon(self) -> None:
        """Draws now, or once `DRAW_S` have gone by since it last did: changes may come many times a second."""
        if self._next_draw is None and self.is_running:
            left_s = self._drawn_at + DRAW_S - time.monotonic()
            if left_s <= 0:
                self._draw()
            else:
                self._next_draw = self.set_timer(left_s, self._draw)

    def _draw(self) -> None:
        """Puts what is known on the screen; what has not changed is left alone."""
        if not self.is_running or not self.screen_stack or not self.query("#runs"):
            return
        if self._next_draw is not None:
            self._next_draw.stop()
        self._next_draw, self._drawn_at = None, time.monotonic()
        feed, now = self._feed, datetime.now(UTC)
        if feed.runs and all(run.id != self._chosen for run in feed.runs):  # none is chosen, or that one was deleted
            self._follow(feed.runs[-1].id)
        self._text("title", f" {self._standing(now)}")
        self._fill("runs", scene.runs_table(feed.runs, self._chosen), key=1)
        if feed.snapshot is not None:
            figures = self._figures.of(feed.snapshot.committed, feed.snapshot.run)
            self._text("head", "\n".join(scene.headline(feed.snapshot, figures, now)))
            if self.screen.has_class("wide"):
                self._fill("past", scene.rounds_table(figures))
        elif not feed.answered:
            self._text("head", self._asking)
        elif not feed.lost and not feed.refused and not feed.runs:
            self._text("head", "No runs yet. Create one with: fedpeft run create FILE")
        self._text("views", self._tabs())
        lower = self._lower(now)
        self._fill("detail", lower)
        self._text("note", scene.note(lower, self.query_one("#detail", DataTable).cursor_row))
        self._text("side-title", f"clients: {scene.clients_line(feed.clients)}" if feed.answered else "clients")
        self._fill("people", scene.clients_table(feed.clients, self._run, now, self._orders[View.CLIENTS]))

    def _standing(self, now: datetime) -> str:
        if self._feed.lost:
            return f"NO CONNECTION: {self._feed.lost}; retrying"
        if self._feed.refused:
            return f"NOT LET IN: {self._feed.refused}; retrying"
        if not self._feed.answered:
            return self._asking
        rights = "" if self._may_write else "  read-only"
        clients = scene.clients_line(self._feed.clients)
        return f"fedpeft top  {self._address}  {now:%H:%M:%S} UTC{rights}  clients: {clients}"

    @property
    def _asking(self) -> str:
        """Returns the line that is shown until there was an answer."""
        return f"asking {self._address} ..."

    def _tabs(self) -> str:
        tabs = "  ".join(
            f"[{number} {view}]" if view is self._view else f" {number} {view} "
            for number, view in enumerate(View, start=1)
        )
        order = self._orders.get(self._view)
        return f"{tabs}   by {order}" if order else tabs

    def _lower(self, now: datetime) -> scene.Table:
        feed = self._feed
        if self._view is View.CLIENTS:
            return scene.clients_table(feed.clients, self._run, now, self._orders[View.CLIENTS])
        if feed.snapshot is None:
            return scene.Table(("",), ())
        if self._view is View.ROUND:
            return scene.tickets_table(feed.snapshot, feed.clients, self._orders[View.ROUND])
        return scene.rounds_table(self._figures.of(feed.snapshot.committed, feed.snapshot.run))

    def _text(self, name: str, text: str) -> None:
        self.query_one(f"#{name}", Static).update(text)

    def _fill(self, name: str, table: scene.Table, key: int = 0) -> None:
        """Shows a table; the cursor stays in its row."""
        if self._shown.get(name) == table:
            return
        self._shown[name] = table
        shown: DataTable[Any] = self.query_one(f"#{name}", DataTable)
        place = shown.cursor_row
        with self.prevent(DataTable.RowHighlighted):
            # Widths are given, so that nothing depends on when the widget finds time to measure its cells.
            shown.clear(columns=True)
            for head, *cells in zip(table.heads, *table.rows, strict=True):
                shown.add_column(_cell(head, head), width=max(map(cell_len, (head, *cells))))
            for number, row in enumerate(table.rows):
                shown.add_row(*map(_cell, table.heads, row), key=row[key] if key else str(number))
            if table.rows:
                chosen = [number for number, row in enumerate(table.rows) if key and row[key] == self._chosen]
                shown.move_cursor(row=chosen[0] if chosen else min(place, len(table.rows) - 1))


def _cell(head: str, text: str) -> Text:
    """Returns a cell; Rich would read square brackets in a plain string as its markup."""
    return Text(text, justify="right" if head in NUMBERS else "left", no_wrap=True)
