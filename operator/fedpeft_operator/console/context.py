"""Everything a page needs, in one value."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

from starlette.requests import Request

from fedpeft_operator.console.audit_log import AuditLog
from fedpeft_operator.console.change_signal import Bell
from fedpeft_operator.console.directory import Directory
from fedpeft_operator.console.feeds import Feeds
from fedpeft_operator.console.renderer import Paper
from fedpeft_operator.console.server_connection import Line
from fedpeft_operator.console.session_store import Doorkeeper
from fedpeft_operator.console.settings import Settings


@dataclass(frozen=True)
class Desk:
    """The parts of a console, made once in `app`."""

    settings: Settings
    door: Doorkeeper
    paper: Paper
    bell: Bell
    line: Line
    feeds: Feeds
    directory: Directory
    audit: AuditLog

    async def looked(self, runs: Iterable[str]) -> None:
        """Waits for the first picture of some runs; not of a server that is known to be away."""
        if not self.directory.lost:
            await asyncio.gather(*(self.feeds.of(run).looked() for run in runs))


def desk_of(request: Request) -> Desk:
    """Returns the parts of the console that a request came to."""
    return cast(Desk, request.app.state.desk)
