"""Checks that every request must pass before a page sees it, and headers that every answer carries.

A console on the loopback interface is reached by every web page in the same browser and by every user of the machine.
So: the Host must be one of ours (DNS rebinding), a POST must come from our own pages (Origin, and a token in the
form), and everything but the login and the style sheets needs the cookie of a session.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from http.cookies import CookieError, SimpleCookie
from secrets import compare_digest

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fedpeft import text_files
from fedpeft_operator.console.session_store import NOBODY, Session, SessionStore
from fedpeft_operator.console.settings import Settings

FIELD = "csrf"
"""The form field that holds the session's token."""
OPEN_PATHS = ("/login", "/static/")
MOST_BYTES = text_files.MOST_BYTES
"""Longest body of a request: a form with a run file."""

_SAFE = ("GET", "HEAD")
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; form-action 'self'; "
        "frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Refused(Exception):
    """A request that no page answers.

    Attributes:
        status: HTTP status.
        message: The message, a sentence.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


Refusal = Callable[[Request, Refused], Response]
"""Says to a browser that it was refused."""


class Guard:
    """The outermost layer: refuses what is not ours, finds the session, adds the headers.

    Args:
        app: The guarded application; it finds the session in `request.state.session`.
        settings: Of the console.
        sessions: The sessions.
        refusal: Renders a refusal.
    """

    def __init__(self, app: ASGIApp, settings: Settings, sessions: SessionStore, refusal: Refusal) -> None:
        self._app, self._settings, self._sessions, self._refusal = app, settings, sessions, refusal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
                if not scope["path"].startswith("/static/"):
                    headers.setdefault("Cache-Control", "no-store")
            await send(message)

        headers = Headers(scope=scope)
        session = self._sessions.get(_cookie(headers, cookie_name(self._settings.listen.port)))
        scope.setdefault("state", {})["session"] = session
        try:
            self._check(scope, headers, session)
        except Refused as refused:
            await self._refusal(Request(scope, receive), refused)(scope, receive, with_headers)
            return
        await self._app(scope, receive, with_headers)

    def _check(self, scope: Scope, headers: Headers, session: Session | None) -> None:
        host = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[^:/@\s]+)(?::[0-9]{1,5})?", headers.get("host", ""))
        if host is None or not self._settings.is_ours(host[1]):
            raise Refused(421, "The console is not available under this host name; open the address that it printed.")
        if scope["method"] not in _SAFE and headers.get("origin") != f"{self._settings.scheme}://{headers['host']}":
            raise Refused(403, "The request was not sent from a page of the console.")
        if scope["method"] not in _SAFE and not _is_short(headers):
            raise Refused(413, f"A form of the console has at most {MOST_BYTES:,} bytes, and says how many.")
        if session is None and not scope["path"].startswith(OPEN_PATHS):
            raise Refused(
                401,
                "You are not logged in. Open the link that `fedpeft console` printed; it works once. For another link, "
                "use the Access page of a browser that is logged in, or restart the console.",
            )


def check_token(session: Session, token: object) -> None:
    """Checks that a form came from a page of this session.

    Raises:
        Refused: If it did not.
    """
    if not isinstance(token, str) or not compare_digest(token.encode(), session.token.encode()):
        raise Refused(403, "The form belongs to another session; reload the page and try again.")


def check_writer(session: Session) -> None:
    """Checks that a session may steer.

    Raises:
        Refused: If it may only look.
    """
    if not session.may_write:
        raise Refused(403, "This session is read-only; only an operator may create or change runs and readmit clients.")


def cookie_name(port: int) -> str:
    """Returns the name of our cookie. Cookies do not know ports, and consoles on several are one host to a browser."""
    return f"fedpeft-console-{port}"


def session_of(request: Request) -> Session:
    """Returns the session of a request; that of nobody on the few pages that need none."""
    session: Session | None = request.state.session
    return session or NOBODY


def _is_short(headers: Headers) -> bool:
    """Returns True if a body says how long it is, and may be so long; one in chunks is longer than it says."""
    length = "" if "transfer-encoding" in headers else headers.get("content-length", "")
    return re.fullmatch(r"[0-9]{1,10}", length) is not None and int(length) <= MOST_BYTES


def _cookie(headers: Headers, name: str) -> str:
    try:
        found = SimpleCookie(headers.get("cookie", "")).get(name)
    except CookieError:
        return ""
    return found.value if found is not None else ""
