"""The forms that change something: only those of a session that may, from a page of ours."""

from __future__ import annotations

from starlette.datastructures import FormData
from starlette.requests import Request

from fedpeft_operator.console.guard import FIELD, check_token, check_writer, session_of


async def form_of(request: Request, *, writes: bool = True) -> FormData:
    """Returns the form that was sent.

    Args:
        request: Of the browser.
        writes: True if only a session that may steer may send it.

    Raises:
        Refused: If it came from elsewhere, or the session may not send it.
    """
    session = session_of(request)
    form = await request.form(max_files=1, max_fields=20)
    check_token(session, form.get(FIELD))
    if writes:
        check_writer(session)
    return form
