"""A new run, from a run file that is typed or uploaded."""

from __future__ import annotations

import secrets
from collections.abc import Sequence, Set

from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from fedpeft import ids, text_files
from fedpeft.config import RunConfig
from fedpeft_operator.console import run_file
from fedpeft_operator.console.context import context_of
from fedpeft_operator.console.examples import EXAMPLES
from fedpeft_operator.console.guard import Refused, check_writer, session_of
from fedpeft_operator.console.pages.forms import form_of
from fedpeft_operator.console.run_file import LineFault, RunFileInvalid
from fedpeft_operator.console.shown.configuration import whole

BUILDING = "another run is being built here; try again once it is created, or restart the console if it never is"
AROUND = 2
"""Lines shown before and after a faulty one."""


async def blank(request: Request) -> Response:
    """Shows the form: empty, or with an example or the configuration of a run, by name in the query."""
    check_writer(session_of(request))
    example, run = request.query_params.get("example", ""), request.query_params.get("run", "")
    if run:
        return _form(request, await _of_run(request, run), start=run)
    if example and example not in EXAMPLES:
        raise Refused(404, f"There is no example {example[:40]!r}; there are {', '.join(EXAMPLES)}.")
    return _form(request, EXAMPLES[example].text if example else "", start=example)


async def _of_run(request: Request, run: str) -> str:
    """Returns the run file of a run.

    Raises:
        Refused: If there is no such run.
        FedpeftError: If it cannot be read.
    """
    context = context_of(request)
    if not ids.RUN.fullmatch(run) or not await context.directory.knows_run(run):
        raise Refused(404, f"Run {run[:80]} does not exist; the overview lists all runs.")
    async with context.connection.connect() as server:
        return whole((await server.run(run))[0])


async def create(request: Request) -> Response:
    """Checks a run file, or creates its run."""
    form = await form_of(request)
    text, upload = str(form.get("text", "")), form.get("file")
    if isinstance(upload, UploadFile) and upload.filename:
        try:
            text = text_files.decode(await upload.read())
        except text_files.NotText as error:
            return _form(request, text, faults=[LineFault(0, "", f"{upload.filename} is not a text file: {error}")])
    text = text.replace("\r\n", "\n")
    try:
        if form.get("action") != "create":
            return _form(request, text, valid=run_file.read(text))
        context = context_of(request)
        if context.building.locked():
            return _form(request, text, status=503, faults=[LineFault(0, "", BUILDING)])
        async with context.building:
            made = await run_file.create(text, str(form.get("request_id", ""))[:64], context.connection.connect)
    except RunFileInvalid as invalid:
        return _form(request, text, faults=invalid.faults)
    return RedirectResponse(f"/runs/{made.id}", 303)


def excerpts(text: str, wrong: Set[int]) -> list[list[tuple[int, str]]]:
    """Returns the lines around some lines of a text, numbered, in pieces without a gap."""
    pieces: list[list[tuple[int, str]]] = []
    for number, line in enumerate(text.split("\n"), 1):
        if any(abs(number - at) <= AROUND for at in wrong if at):
            if not pieces or pieces[-1][-1][0] < number - 1:
                pieces.append([])
            pieces[-1].append((number, line))
    return pieces


def _form(
    request: Request,
    text: str,
    *,
    start: str | None = None,
    status: int = 422,
    faults: Sequence[LineFault] = (),
    valid: RunConfig | None = None,
) -> Response:
    return context_of(request).renderer.page(
        request,
        "new.html",
        "New run",
        status=status if faults else 200,
        text=text,
        start=start,
        examples=EXAMPLES,
        excerpts=excerpts(text, {fault.line for fault in faults}),
        wrong={fault.line for fault in faults},
        faults=faults,
        valid=valid,
        request_id=secrets.token_hex(16),
        missing=run_file.missing_part(),
    )
