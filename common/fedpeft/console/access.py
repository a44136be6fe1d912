"""Who may look, and who may steer: login keys that work once, and the sessions they open.

Notable: a key is random, is known only to whoever reads the console's standard output or asked for it on a page, and is
spent by its first use; nothing is kept on disk, so every session ends with the process.
"""

from __future__ import annotations

import secrets
from collections import OrderedDict
from dataclasses import dataclass

MOST_SESSIONS = 64
MOST_KEYS = 16
"""Keys that wait for their use; the oldest gives way."""


@dataclass(frozen=True, slots=True)
class Session:
    """One browser that was let in.

    Attributes:
        id: What its cookie holds.
        token: What every form of it carries, so that no other page can send one in its name.
        may_write: Whether it may create, pause, resume and stop runs.
    """

    id: str
    token: str
    may_write: bool


NOBODY = Session("", "", may_write=False)
"""A browser that was not let in."""


class Doorkeeper:
    """Gives out login keys and opens a session for each.

    Args:
        may_write: Whether any session of this console may steer.
    """

    def __init__(self, may_write: bool) -> None:
        self.may_write = may_write
        self._keys: OrderedDict[str, bool] = OrderedDict()
        self._sessions: OrderedDict[str, Session] = OrderedDict()

    def new_key(self, *, may_write: bool) -> str:
        """Returns a login key that works once."""
        key = secrets.token_urlsafe(32)
        self._keys[key] = may_write and self.may_write
        while len(self._keys) > MOST_KEYS:
            self._keys.popitem(last=False)
        return key

    def enter(self, key: str) -> Session | None:
        """Spends a key; returns its session, or None for a key that is wrong or was spent."""
        found = [known for known in self._keys if secrets.compare_digest(known.encode(), key.encode())]
        if not found:
            return None
        session = Session(secrets.token_urlsafe(32), secrets.token_urlsafe(32), self._keys.pop(found[0]))
        self._sessions[session.id] = session
        while len(self._sessions) > MOST_SESSIONS:
            self._sessions.popitem(last=False)
        return session

    def session(self, cookie: str) -> Session | None:
        """Returns the session of a cookie, or None."""
        return self._sessions.get(cookie)

    def leave(self, session: Session) -> None:
        """Ends a session."""
        self._sessions.pop(session.id, None)
