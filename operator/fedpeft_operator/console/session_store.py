"""Login keys that work once, and the sessions, read-only or read-write, that they open.

Notable: a key is random, is known only to whoever reads the console's standard output or asked for it on a page, and is
spent by its first use; nothing is kept on disk, so every session ends with the process. A viewer's links, and the
sessions that they open, count as that viewer's, and never take the place of an operator's or of another viewer's.
"""

from __future__ import annotations

import secrets
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

MOST_SESSIONS = 64
"""Sessions that may steer, and as many that may look; the oldest of the same kind gives way."""
MOST_KEYS = 16
"""Keys that wait for their use, of operators together and of each viewer; the oldest of the same gives way."""
MOST_PAGES = 64
"""Pages that keep themselves fresh, of operators together, and as many of viewers."""
MOST_PAGES_OF_A_VIEWER = 16
"""Such pages of one viewer, and of whom it let in."""
MOST_GUESTS = 8
"""Sessions opened by one viewer's links, and by those of whom it let in; the oldest of them gives way."""


Held = TypeVar("Held")


@dataclass(frozen=True, slots=True)
class Session:
    """The session of one logged-in browser.

    Attributes:
        id: Content of its cookie.
        token: Value that every form of it carries, so that no other page can send one in its name.
        may_write: True if it may create, pause, resume and stop runs.
        host: The viewer from whose link it comes, directly or by others; empty if from an operator's.
    """

    id: str
    token: str
    may_write: bool
    host: str = ""

    @property
    def viewer(self) -> str:
        """The viewer whose limits the session counts against; empty for an operator's session."""
        return "" if self.may_write else self.host or self.id


@dataclass(frozen=True, slots=True)
class _Key:
    """A login key: whether its session may write, and the viewer it counts against; empty for an operator's."""

    may_write: bool
    host: str


NOBODY = Session("", "", may_write=False)
"""The session of a browser that is not logged in."""


class SessionStore:
    """Issues login keys and opens a session for each.

    Args:
        may_write: True if any session of this console may steer.
    """

    def __init__(self, may_write: bool) -> None:
        self.may_write = may_write
        self._keys: OrderedDict[str, _Key] = OrderedDict()
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        self._pages: Counter[str] = Counter()

    def new_key(self, *, may_write: bool, maker: Session | None = None) -> str:
        """Returns a login key that works once.

        Args:
            may_write: True if its session may steer.
            maker: The session that asks for it; None for the console itself.
        """
        key, host = secrets.token_urlsafe(32), ""
        if maker and not maker.may_write:
            may_write, host = False, maker.viewer
        self._keys[key] = _Key(may_write and self.may_write, host)
        _make_room(self._keys, MOST_KEYS, lambda other: other.host == host)
        return key

    def redeem(self, key: str) -> Session | None:
        """Spends a key; returns its session, or None for a key that is wrong or was spent."""
        found = [known for known in self._keys if secrets.compare_digest(known.encode(), key.encode())]
        if not found:
            return None
        key_found = self._keys.pop(found[0])
        session = Session(secrets.token_urlsafe(32), secrets.token_urlsafe(32), key_found.may_write, key_found.host)
        self._sessions[session.id] = session
        if session.host:
            _make_room(self._sessions, MOST_GUESTS, lambda other: other.host == session.host)
        else:
            same = session.may_write
            _make_room(self._sessions, MOST_SESSIONS, lambda other: other.may_write is same and not other.host)
        return session

    def get(self, cookie: str) -> Session | None:
        """Returns the session of a cookie, or None."""
        return self._sessions.get(cookie)

    def may_open(self, session: Session) -> bool:
        """Returns True if a session may have one more page that keeps itself fresh."""
        if session.may_write:
            return self._pages[""] < MOST_PAGES
        theirs = self._pages.total() - self._pages[""]
        return theirs < MOST_PAGES and self._pages[session.viewer] < MOST_PAGES_OF_A_VIEWER

    @contextmanager
    def page_open(self, session: Session) -> Iterator[None]:
        """Counts a page for as long as the block lasts."""
        self._pages[session.viewer] += 1
        try:
            yield
        finally:
            self._pages[session.viewer] -= 1
            if not self._pages[session.viewer]:
                del self._pages[session.viewer]

    def end(self, session: Session) -> None:
        """Ends a session."""
        self._sessions.pop(session.id, None)


def _make_room(held: OrderedDict[str, Held], most: int, alike: Callable[[Held], bool]) -> None:
    """Removes the oldest of what is alike, beyond so many."""
    those = [key for key, each in held.items() if alike(each)]
    for key in those[: max(0, len(those) - most)]:
        del held[key]
