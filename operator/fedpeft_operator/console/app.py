"""The console's composition: every part is made here, and every page has its address here."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from fedpeft.api.operator_client import Connect, for_looking
from fedpeft.errors import FedpeftError
from fedpeft_operator.console import error_pages
from fedpeft_operator.console.context import ConsoleContext
from fedpeft_operator.console.feeds.audit_log import AuditLog
from fedpeft_operator.console.feeds.change_signal import ChangeSignal
from fedpeft_operator.console.feeds.directory import Directory
from fedpeft_operator.console.feeds.run_feeds import Feeds
from fedpeft_operator.console.feeds.server_connection import ServerConnection
from fedpeft_operator.console.guard import Guard, Refused
from fedpeft_operator.console.pages import audit, client, creation, downloads, login, overview, run, steering
from fedpeft_operator.console.renderer import Renderer
from fedpeft_operator.console.session_store import SessionStore
from fedpeft_operator.console.settings import Settings

Page = Callable[[Request], Awaitable[Response]]

LOOKED_AT: tuple[tuple[str, Page], ...] = (
    ("/", overview.overview),
    ("/events", overview.events),
    ("/runs/{run}", run.run),
    ("/runs/{run}/events", run.events),
    ("/runs/{run}/rounds/{number}", run.round_),
    ("/runs/{run}/versions/{version}", downloads.adapter),
    ("/clients", client.clients),
    ("/clients/events", client.clients_events),
    ("/clients/{client}", client.client),
    ("/clients/{client}/events", client.client_events),
    ("/audit", audit.audit),
    ("/new", creation.blank),
    ("/access", login.access),
    ("/login", login.login),
)
SENT: tuple[tuple[str, Page], ...] = (
    *((f"/runs/{{run}}/{verb}", steering.steering(verb)) for verb in steering.VERBS),
    ("/runs/{run}/rollback", steering.rollback),
    ("/runs/{run}/readmit", steering.readmit),
    ("/new", creation.create),
    ("/access", login.new_link),
    ("/logout", login.logout),
)


def console(settings: Settings, connect: Connect, sessions: SessionStore) -> Starlette:
    """Returns a console as an ASGI application.

    Args:
        settings: Its address, and the rights of its users.
        connect: Makes a client of the server, with the identity of whoever started the console.
        sessions: Login keys and sessions.
    """
    signal, connect = ChangeSignal(), for_looking(connect)
    connection, feeds = ServerConnection(connect), Feeds(connect, signal)
    context = ConsoleContext(
        settings=settings,
        sessions=sessions,
        renderer=Renderer(settings.server, settings.secured),
        signal=signal,
        connection=connection,
        feeds=feeds,
        directory=Directory(connection, signal, feeds.reconnect),
        audit=AuditLog(connection),
        building=asyncio.Lock(),
    )

    @asynccontextmanager
    async def life(_: Starlette) -> AsyncIterator[None]:
        looking = asyncio.create_task(context.directory.run())
        try:
            yield
        finally:
            looking.cancel()
            context.feeds.close()
            await connection.close()

    app = Starlette(
        routes=[
            *(Route(path, page, methods=["GET"]) for path, page in LOOKED_AT),
            *(Route(path, page, methods=["POST"]) for path, page in SENT),
            Mount("/static", StaticFiles(directory=Path(__file__).parent / "static")),
        ],
        middleware=[Middleware(Guard, settings=settings, sessions=sessions, refusal=error_pages.error_page)],
        exception_handlers={
            Refused: error_pages.refused,
            FedpeftError: error_pages.failed,
            HTTPException: error_pages.unknown,
            Exception: error_pages.unexpected,
        },
        lifespan=life,
    )
    app.state.context = context
    return app
