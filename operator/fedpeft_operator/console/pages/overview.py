"""The first page: every run at a glance."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from fedpeft.v1 import run_pb2
from fedpeft_operator.console.context import Desk, desk_of
from fedpeft_operator.console.guard import session_of
from fedpeft_operator.console.live import stream
from fedpeft_operator.console.pages.request_values import page_number
from fedpeft_operator.console.renderer import Fragments
from fedpeft_operator.console.shown.overview import Card, card, tiles
from fedpeft_operator.console.shown.pagination import leaf

RUNS_A_PAGE = 12


async def overview(request: Request) -> Response:
    """Shows the runs, newest first."""
    desk, page = desk_of(request), page_number(request)
    await desk.directory.look()
    await desk.looked(_runs(desk, page))
    fragments = draw(desk, page, session_of(request).may_write)
    return desk.paper.page(request, "overview.html", "Overview", fragments=fragments, events=f"/events?page={page}")


async def events(request: Request) -> Response:
    """Sends what changes of it."""
    desk, page, may_write = desk_of(request), page_number(request), session_of(request).may_write
    return stream(request, lambda: draw(desk, page, may_write), lambda: _runs(desk, page))


def draw(desk: Desk, page: int, may_write: bool) -> Fragments:
    """Returns the fragments of the page."""
    directory = desk.directory
    shown = leaf(list(reversed(directory.runs.values())), page, RUNS_A_PAGE)
    cards = [_card(desk, run) for run in shown.items]
    return {
        "connection": desk.paper.fragment("connection.html", lost=directory.lost),
        "tiles": desk.paper.fragment("tiles.html", tiles=tiles(directory.runs.values(), directory.clients)),
        "runs": desk.paper.fragment(
            "cards.html", cards=cards, leaf=shown, may_write=may_write, asked=directory.looked_at
        ),
    }


def _card(desk: Desk, run: run_pb2.Run) -> Card:
    feed = desk.feeds.of(run.id)
    if feed.picture is None:
        return card(run, None, ())
    return feed.made("card", lambda: card(run, feed.picture, feed.rounds))


def _runs(desk: Desk, page: int) -> list[str]:
    return list(leaf(list(reversed(desk.directory.runs)), page, RUNS_A_PAGE).items)
