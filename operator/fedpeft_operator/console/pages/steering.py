"""Operations on a run: pause, resume, stop, roll back; and readmitting a client that is set aside."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from fedpeft.api.operator_client import OperatorClient
from fedpeft.v1 import run_pb2
from fedpeft_operator.console.context import context_of
from fedpeft_operator.console.guard import Refused
from fedpeft_operator.console.pages.forms import form_of
from fedpeft_operator.console.pages.request_values import path_id

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
        context, form, run = context_of(request), await form_of(request), path_id(request, "run")
        reason = str(form.get("reason", "")).strip()[:MOST_REASON]
        async with context.connection.connect() as server:
            await VERBS[verb](server, run, reason)
        return RedirectResponse(f"/runs/{run}", 303)

    return steer


async def rollback(request: Request) -> Response:
    """Rolls a run back to an earlier version; the form repeats the run's id.

    Raises:
        Refused: If it does not, or names no version.
    """
    context, form, run = context_of(request), await form_of(request), path_id(request, "run")
    version, reason = str(form.get("version", "")).strip(), str(form.get("reason", "")).strip()[:MOST_REASON]
    if str(form.get("confirmation", "")).strip() != run:
        raise Refused(400, f"The run was not rolled back. To confirm, type its id: {run}.")
    if not re.fullmatch(r"[0-9]{1,9}", version):
        raise Refused(400, "The run was not rolled back. The version must be a whole number.")
    async with context.connection.connect() as server:
        await server.roll_back(run, int(version), reason)
    return RedirectResponse(f"/runs/{run}", 303)


async def readmit(request: Request) -> Response:
    """Readmits a client that is set aside in a run, and shows the page that asked for it: the run's or its own."""
    context, form, run = context_of(request), await form_of(request), path_id(request, "run")
    client = str(form.get("client", ""))
    async with context.connection.connect() as server:
        await server.readmit(client, run)
    await context.directory.refresh(force=True)  # the list of clients says so too
    back = f"/clients/{quote(client, safe='')}" if form.get("back") == "client" else f"/runs/{run}"
    return RedirectResponse(back, 303)
