"""Letting browsers in, giving out links for others, and letting them go."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from fedpeft_operator.console.context import context_of
from fedpeft_operator.console.guard import Refused, check_writer, cookie_name, session_of
from fedpeft_operator.console.pages.forms import form_of


async def login(request: Request) -> Response:
    """Spends a login key for a session."""
    context = context_of(request)
    # What only looks a link over, as chat programs do, asks for its head, and must not spend it.
    session = context.sessions.redeem(request.query_params.get("key", "")) if request.method == "GET" else None
    if session is None:
        raise Refused(
            403,
            "This link has already been used, or belongs to another console. For a new one, use the Access page of a "
            "browser that is logged in, or restart the console.",
        )
    answer = RedirectResponse("/", 303)
    answer.set_cookie(
        cookie_name(context.settings.listen.port),
        session.id,
        httponly=True,
        samesite="strict",
        secure=context.settings.scheme == "https",
    )
    return answer


async def access(request: Request) -> Response:
    """Shows who this browser is, and the form for another's link."""
    return context_of(request).renderer.page(request, "access.html", "Access", link="", may_write=False)


async def new_link(request: Request) -> Response:
    """Makes a login link for another browser; it may do at most what this one may."""
    context, form = context_of(request), await form_of(request, writes=False)
    may_write = form.get("role") == "operator"
    if may_write:
        check_writer(session_of(request))
    key = context.sessions.new_key(may_write=may_write, maker=session_of(request))
    link = f"{context.settings.scheme}://{request.headers['host']}/login?key={key}"
    return context.renderer.page(request, "access.html", "Access", link=link, may_write=may_write)


async def logout(request: Request) -> Response:
    """Ends this browser's session."""
    context = context_of(request)
    await form_of(request, writes=False)
    context.sessions.end(session_of(request))
    return RedirectResponse("/", 303)
