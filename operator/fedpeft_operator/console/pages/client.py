"""The clients of the federation, and the history of one."""

from __future__ import annotations

from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import Response

from fedpeft.api import views
from fedpeft_operator.console.context import ConsoleContext, context_of
from fedpeft_operator.console.guard import Refused, session_of
from fedpeft_operator.console.live import stream
from fedpeft_operator.console.pages.request_values import page_number, path_id
from fedpeft_operator.console.renderer import Fragments
from fedpeft_operator.console.shown.client import Followed, chart, history, remarks, tiles
from fedpeft_operator.console.shown.pagination import paginate

CLIENTS_A_PAGE = 50
ENTRIES_A_PAGE = 50
RUNS_LOOKED_AT = 12
"""Newest runs whose tickets make a client's history."""


async def clients(request: Request) -> Response:
    """Shows every client that ever registered."""
    context, page = context_of(request), page_number(request)
    await context.directory.refresh()
    return context.renderer.page(
        request,
        "clients.html",
        "Clients",
        fragments=draw_list(context, page),
        events=f"/clients/events?page={page}",
    )


async def clients_events(request: Request) -> Response:
    """Sends what changes of it."""
    context, page = context_of(request), page_number(request)
    return stream(request, lambda: draw_list(context, page), list)


async def client(request: Request) -> Response:
    """Shows what a client did."""
    context, name, page = context_of(request), path_id(request, "client"), page_number(request)
    if not await context.directory.knows_client(name):
        raise Refused(404, f"No client {name} has registered; the list of clients shows all that have.")
    await context.ready(_runs(context))
    return context.renderer.page(
        request,
        "client.html",
        name,
        fragments=draw(context, name, page, session_of(request).may_write),
        client=name,
        events=f"/clients/{quote(name)}/events?page={page}",
    )


async def client_events(request: Request) -> Response:
    """Sends what changes of it."""
    context, name, page = context_of(request), path_id(request, "client"), page_number(request)
    may_write = session_of(request).may_write
    return stream(request, lambda: draw(context, name, page, may_write), lambda: _runs(context))


def draw_list(context: ConsoleContext, page: int) -> Fragments:
    """Returns the fragments of the list of clients."""
    directory = context.directory
    rows = paginate(list(directory.clients.values()), page, CLIENTS_A_PAGE)
    return {
        "connection": context.renderer.fragment("connection.html", lost=directory.lost),
        "clients": context.renderer.fragment(
            "client/list.html",
            clients=[views.client_json(client) for client in rows.items],
            page=rows,
            asked=directory.known,
        ),
    }


def draw(context: ConsoleContext, name: str, page: int, may_write: bool) -> Fragments:
    """Returns the fragments of a client's page."""
    renderer, known = context.renderer, context.directory.clients.get(name)
    connection = {"connection": renderer.fragment("connection.html", lost=context.directory.lost)}
    if known is None:
        return connection
    followed = [_followed(context, run) for run in _runs(context)]
    entries, drawn = history(name, followed), chart(name, followed)
    judges = not entries and views.role(known) == "evaluator"
    return {
        **connection,
        "about": renderer.fragment(
            "client/about.html", client=views.client_json(known), remarks=remarks(name, followed), may_write=may_write
        ),
        "tiles": "" if judges else renderer.fragment("tiles.html", tiles=tiles(entries)),
        "series": renderer.fragment("series.html", series={"norms": drawn[1]} if drawn else {}),
        "said-norms": renderer.fragment("client/norms.html", followed=drawn[0] if drawn else None, judges=judges),
        "history": renderer.fragment(
            "client/history.html", page=paginate(entries, page, ENTRIES_A_PAGE), client=name, judges=judges
        ),
    }


def _runs(context: ConsoleContext) -> list[str]:
    """Returns the runs that are looked at, newest first."""
    return list(reversed(context.directory.runs))[:RUNS_LOOKED_AT]


def _followed(context: ConsoleContext, run: str) -> Followed:
    feed = context.feeds.of(run)
    return feed.cached("followed", lambda: Followed(run, context.directory.runs[run].config.name, feed.rounds))
