"""The parts of the console that its pages use, in one frozen value."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

from starlette.requests import Request

from fedpeft_operator.console.feeds.audit_log import AuditLog
from fedpeft_operator.console.feeds.change_signal import ChangeSignal
from fedpeft_operator.console.feeds.directory import Directory
from fedpeft_operator.console.feeds.run_feeds import Feeds
from fedpeft_operator.console.feeds.server_connection import ServerConnection
from fedpeft_operator.console.renderer import Renderer
from fedpeft_operator.console.session_store import SessionStore
from fedpeft_operator.console.settings import Settings


@dataclass(frozen=True)
class ConsoleContext:
    """The parts of a console, made once in `app`.

    Attributes:
        settings: Its address, and the rights of its users.
        sessions: Login keys and sessions.
        renderer: Makes pages of templates.
        signal: Tells open pages of changes.
        connection: To the server.
        feeds: The runs that are watched.
        directory: All runs and clients.
        audit: The audit log.
        building: Held while a model is built: one at a time, for each takes memory and all the processor.
    """

    settings: Settings
    sessions: SessionStore
    renderer: Renderer
    signal: ChangeSignal
    connection: ServerConnection
    feeds: Feeds
    directory: Directory
    audit: AuditLog
    building: asyncio.Lock

    async def ready(self, runs: Iterable[str]) -> None:
        """Waits for the first snapshot of each run, unless the server is known to be unreachable."""
        if not self.directory.lost:
            await asyncio.gather(*(self.feeds.of(run).ready() for run in runs))


def context_of(request: Request) -> ConsoleContext:
    """Returns the context of the console that serves a request."""
    return cast(ConsoleContext, request.app.state.context)
