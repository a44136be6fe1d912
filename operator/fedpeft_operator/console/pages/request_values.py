"""Parameters of a request, read from its address."""

from __future__ import annotations

import re

from starlette.requests import Request

from fedpeft_operator.console.guard import Refused


def page_number(request: Request, name: str = "page") -> int:
    """Returns the page of a list, 1 if none is named."""
    return _whole(request.query_params.get(name, "1"))


def path_number(request: Request, name: str) -> int:
    """Returns a number out of the path."""
    return _whole(request.path_params[name])


def path_id(request: Request, name: str) -> str:
    """Returns an id out of the path."""
    return str(request.path_params[name])


def _whole(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise Refused(404, f"{text!r} is not the number of a page, round or version.")
    return int(text)
