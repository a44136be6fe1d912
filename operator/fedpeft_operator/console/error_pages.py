"""Error pages: one table from errors to HTTP statuses, and one layout for all of them."""

from __future__ import annotations

from http import HTTPStatus

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from fedpeft import errors
from fedpeft_operator.console.context import desk_of
from fedpeft_operator.console.guard import Refused
from fedpeft_operator.console.sentences import sentence

_STATUSES: tuple[tuple[type[errors.FedpeftError], int], ...] = (
    (errors.NotFound, 404),
    (errors.PermissionDenied, 403),
    (errors.Unauthenticated, 403),
    (errors.Unavailable, 503),
    (errors.FailedPrecondition, 409),
    (errors.AlreadyExists, 409),
    (errors.InvalidArgument, 400),
    (errors.LocalError, 400),
    (errors.ResourceExhausted, 503),
)


def status_of(error: errors.FedpeftError) -> int:
    """Returns the HTTP status of an error."""
    return next((status for cls, status in _STATUSES if isinstance(error, cls)), 500)


async def refused(request: Request, error: Exception) -> Response:
    """Says what the console itself refuses."""
    assert isinstance(error, Refused)
    return said(request, error)


async def failed(request: Request, error: Exception) -> Response:
    """Says what the server refused, or that it is not there."""
    assert isinstance(error, errors.FedpeftError)
    return said(request, Refused(status_of(error), sentence(error.message)))


async def unknown(request: Request, error: Exception) -> Response:
    """Says that there is no such page."""
    assert isinstance(error, HTTPException)
    message = "There is no such page." if error.status_code == 404 else f"{HTTPStatus(error.status_code).phrase}."
    return said(request, Refused(error.status_code, message))


async def unexpected(request: Request, error: Exception) -> Response:
    """Says that the console has a fault; its traceback goes to standard error."""
    return said(
        request, Refused(500, f"Unexpected {type(error).__name__}; the console's standard error has the details.")
    )


def said(request: Request, refusal: Refused) -> Response:
    """Returns the page that says a refusal."""
    title = {401: "Not logged in", 404: "Not found", 500: "Internal error", 503: "Not available"}.get(
        refusal.status, "Refused"
    )
    return desk_of(request).paper.page(
        request, "mishap.html", title, status=refusal.status, message=refusal.message, code=refusal.status
    )
