"""Error pages: one table from errors to HTTP statuses, and one layout for all of them."""

from __future__ import annotations

from http import HTTPStatus

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from fedpeft import errors
from fedpeft_operator.console.context import context_of
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
    """Answers a request that the console itself refuses."""
    assert isinstance(error, Refused)
    return error_page(request, error)


async def failed(request: Request, error: Exception) -> Response:
    """Answers a request that the server refused or that could not reach it."""
    assert isinstance(error, errors.FedpeftError)
    return error_page(request, Refused(status_of(error), sentence(error.message)))


async def unknown(request: Request, error: Exception) -> Response:
    """Answers a request for a page that does not exist."""
    assert isinstance(error, HTTPException)
    message = "There is no such page." if error.status_code == 404 else f"{HTTPStatus(error.status_code).phrase}."
    return error_page(request, Refused(error.status_code, message))


async def unexpected(request: Request, error: Exception) -> Response:
    """Answers a request that met an error of the console; the traceback goes to standard error."""
    return error_page(
        request, Refused(500, f"Unexpected {type(error).__name__}; the console's standard error has the details.")
    )


def error_page(request: Request, refusal: Refused) -> Response:
    """Returns the error page of a refusal."""
    title = {401: "Not logged in", 404: "Not found", 500: "Internal error", 503: "Not available"}.get(
        refusal.status, "Refused"
    )
    return context_of(request).renderer.page(
        request, "error.html", title, status=refusal.status, message=refusal.message, code=refusal.status
    )
