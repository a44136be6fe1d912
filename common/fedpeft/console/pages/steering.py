"""Pausing, resuming and stopping a run."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from fedpeft.console.desk import desk_of
from fedpeft.console.pages.asked import path_id
from fedpeft.console.pages.forms import form_of
from fedpeft.operator_client import OperatorClient
from fedpeft.v1 import run_pb2

MOST_REASON = 500
"""Characters of a reason that are kept."""

Steer = Callable[[OperatorClient, str, str], Awaitable[run_pb2.Run]]

VERBS: dict[str, Steer] = {
    "pause": lambda server, run, reason: server.pause(run, reason),
    "resume": lambda server, run, _: server.resume(run),
    "stop": lambda server, run, reason: server.stop(run, reason),
}


def steering(verb: str) -> Callable[[Request], Awaitable[Response]]:
    """Returns the page that does one of `VERBS`."""

    async def steer(request: Request) -> Response:
        desk, form, run = desk_of(request), await form_of(request), path_id(request, "run")
        reason = str(form.get("reason", "")).strip()[:MOST_REASON]
        async with desk.line.connect() as server:
            await VERBS[verb](server, run, reason)
        return RedirectResponse(f"/runs/{run}", 303)

    return steer
