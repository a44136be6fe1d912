"""The first page: every run at a glance."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from fedpeft.v1 import run_pb2
from fedpeft_operator.console.context import ConsoleContext, context_of
from fedpeft_operator.console.guard import session_of
from fedpeft_operator.console.live import stream
from fedpeft_operator.console.pages.request_values import page_number
from fedpeft_operator.console.renderer import Fragments
from fedpeft_operator.console.shown.overview import Card, card, tiles
from fedpeft_operator.console.shown.pagination import paginate

RUNS_A_PAGE = 12


async def overview(request: Request) -> Response:
    """Shows the runs, newest first."""
    context, page = context_of(request), page_number(request)
    await context.directory.refresh()
    await context.ready(_runs(context, page))
    fragments = draw(context, page, session_of(request).may_write)
    return context.renderer.page(
        request, "overview.html", "Overview", fragments=fragments, events=f"/events?page={page}"
    )


async def events(request: Request) -> Response:
    """Sends what changes of it."""
    context, page, may_write = context_of(request), page_number(request), session_of(request).may_write
    return stream(request, lambda: draw(context, page, may_write), lambda: _runs(context, page))


def draw(context: ConsoleContext, page: int, may_write: bool) -> Fragments:
    """Returns the fragments of the page."""
    directory = context.directory
    shown = paginate(list(reversed(directory.runs.values())), page, RUNS_A_PAGE)
    cards = [_card(context, run) for run in shown.items]
    figures = tiles(directory.runs.values(), directory.clients, directory.disks)
    return {
        "connection": context.renderer.fragment("connection.html", lost=directory.lost),
        "tiles": context.renderer.fragment("tiles.html", tiles=figures),
        "runs": context.renderer.fragment(
            "cards.html", cards=cards, page=shown, may_write=may_write, asked=directory.known
        ),
    }


def _card(context: ConsoleContext, run: run_pb2.Run) -> Card:
    feed = context.feeds.of(run.id)
    if feed.snapshot is None:
        return card(run, None, ())
    return feed.cached("card", lambda: card(run, feed.snapshot, feed.rounds))


def _runs(context: ConsoleContext, page: int) -> list[str]:
    return list(paginate(list(reversed(context.directory.runs)), page, RUNS_A_PAGE).items)
