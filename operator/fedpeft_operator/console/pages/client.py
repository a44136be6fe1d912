"""The clients of the federation, and the history of one."""

from __future__ import annotations

from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import Response

from fedpeft.api import views
from fedpeft_operator.console.context import Desk, desk_of
from fedpeft_operator.console.guard import Refused, session_of
from fedpeft_operator.console.live import stream
from fedpeft_operator.console.pages.request_values import page_number, path_id
from fedpeft_operator.console.renderer import Fragments
from fedpeft_operator.console.shown.client import Followed, chart, history, remarks, tiles
from fedpeft_operator.console.shown.pagination import leaf

CLIENTS_A_PAGE = 50
ENTRIES_A_PAGE = 50
RUNS_LOOKED_AT = 12
"""Newest runs whose tickets make a client's history."""


async def clients(request: Request) -> Response:
    """Shows every client that ever registered."""
    desk, page = desk_of(request), page_number(request)
    await desk.directory.look()
    return desk.paper.page(
        request,
        "clients.html",
        "Clients",
        fragments=draw_list(desk, page),
        events=f"/clients/events?page={page}",
    )


async def clients_events(request: Request) -> Response:
    """Sends what changes of it."""
    desk, page = desk_of(request), page_number(request)
    return stream(request, lambda: draw_list(desk, page), list)


async def client(request: Request) -> Response:
    """Shows what a client did."""
    desk, name, page = desk_of(request), path_id(request, "client"), page_number(request)
    if not await desk.directory.knows_client(name):
        raise Refused(404, f"No client {name} has registered; the list of clients shows all that have.")
    await desk.looked(_runs(desk))
    return desk.paper.page(
        request,
        "client.html",
        name,
        fragments=draw(desk, name, page, session_of(request).may_write),
        client=name,
        events=f"/clients/{quote(name)}/events?page={page}",
    )


async def client_events(request: Request) -> Response:
    """Sends what changes of it."""
    desk, name, page = desk_of(request), path_id(request, "client"), page_number(request)
    may_write = session_of(request).may_write
    return stream(request, lambda: draw(desk, name, page, may_write), lambda: _runs(desk))


def draw_list(desk: Desk, page: int) -> Fragments:
    """Returns the fragments of the list of clients."""
    directory = desk.directory
    rows = leaf(list(directory.clients.values()), page, CLIENTS_A_PAGE)
    return {
        "connection": desk.paper.fragment("connection.html", lost=directory.lost),
        "clients": desk.paper.fragment(
            "client/list.html",
            clients=[views.client_json(client) for client in rows.items],
            leaf=rows,
            asked=directory.looked_at,
        ),
    }


def draw(desk: Desk, name: str, page: int, may_write: bool) -> Fragments:
    """Returns the fragments of a client's page."""
    paper, known = desk.paper, desk.directory.clients.get(name)
    connection = {"connection": paper.fragment("connection.html", lost=desk.directory.lost)}
    if known is None:
        return connection
    followed = [_followed(desk, run) for run in _runs(desk)]
    entries, drawn = history(name, followed), chart(name, followed)
    judges = not entries and views.role(known) == "evaluator"
    return {
        **connection,
        "about": paper.fragment(
            "client/about.html", client=views.client_json(known), remarks=remarks(name, followed), may_write=may_write
        ),
        "tiles": "" if judges else paper.fragment("tiles.html", tiles=tiles(entries)),
        "series": paper.fragment("series.html", series={"norms": drawn[1]} if drawn else {}),
        "said-norms": paper.fragment("client/norms.html", followed=drawn[0] if drawn else None, judges=judges),
        "history": paper.fragment(
            "client/history.html", leaf=leaf(entries, page, ENTRIES_A_PAGE), client=name, judges=judges
        ),
    }


def _runs(desk: Desk) -> list[str]:
    """Returns the runs that are looked at, newest first."""
    return list(reversed(desk.directory.runs))[:RUNS_LOOKED_AT]


def _followed(desk: Desk, run: str) -> Followed:
    feed = desk.feeds.of(run)
    return feed.made("followed", lambda: Followed(run, desk.directory.runs[run].config.name, feed.rounds))
