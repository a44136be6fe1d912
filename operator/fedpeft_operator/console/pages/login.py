"""Letting browsers in, giving out links for others, and letting them go."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from fedpeft_operator.console.context import desk_of
from fedpeft_operator.console.guard import Refused, check_writer, cookie_name, session_of
from fedpeft_operator.console.pages.forms import form_of


async def login(request: Request) -> Response:
    """Spends a login key for a session."""
    desk = desk_of(request)
    # What only looks a link over, as chat programs do, asks for its head, and must not spend it.
    session = desk.door.enter(request.query_params.get("key", "")) if request.method == "GET" else None
    if session is None:
        raise Refused(
            403,
            "This link has already been used, or belongs to another console. For a new one, use the Access page of a "
            "browser that is logged in, or restart the console.",
        )
    answer = RedirectResponse("/", 303)
    answer.set_cookie(
        cookie_name(desk.settings.listen.port),
        session.id,
        httponly=True,
        samesite="strict",
        secure=desk.settings.scheme == "https",
    )
    return answer


async def access(request: Request) -> Response:
    """Shows who this browser is, and the form for another's link."""
    return desk_of(request).paper.page(request, "access.html", "Access", link="", may_write=False)


async def new_link(request: Request) -> Response:
    """Makes a login link for another browser; it may do at most what this one may."""
    desk, form = desk_of(request), await form_of(request, writes=False)
    may_write = form.get("role") == "operator"
    if may_write:
        check_writer(session_of(request))
    key = desk.door.new_key(may_write=may_write, maker=session_of(request))
    link = f"{desk.settings.scheme}://{request.headers['host']}/login?key={key}"
    return desk.paper.page(request, "access.html", "Access", link=link, may_write=may_write)


async def logout(request: Request) -> Response:
    """Ends this browser's session."""
    desk = desk_of(request)
    await form_of(request, writes=False)
    desk.door.leave(session_of(request))
    return RedirectResponse("/", 303)
