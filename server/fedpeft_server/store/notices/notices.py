"""Notices: what a transaction changed, told to the other daemons on the same database as it commits.

A notice names what changed, and a daemon that hears it reads that from the database: so it may be told twice, or come
late. PostgreSQL passes them on (`NOTIFY`), in the order of the commits; one that is undone tells nothing. SQLite has
nobody to tell: one daemon uses the file.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from sqlalchemy import Connection, text

PAYLOAD_BYTES = 7900
"""Longest payload; PostgreSQL takes less than 8000 bytes."""
CHANNEL = "fedpeft_"
"""Name of the channel, before that of the schema: two federations may share a database."""

_TELL = text(f"SELECT pg_notify('{CHANNEL}' || current_schema(), :payload)")


class Topic(StrEnum):
    """Subjects of notices, with the form of their keys."""

    RUN = "run"
    """A run was made, changed or deleted: its id."""
    CLIENT = "client"
    """A client registered: its id."""
    ANSWER = "answer"
    """A client answered the offer of a run: [run, client]."""
    IDENTITY = "identity"
    """An identity was enrolled, revoked or restored: [role, name]."""
    SCORED = "scored"
    """An evaluator scored a version: [run, version, evaluator, split]."""
    EVALUATOR = "evaluator"
    """An evaluator cannot score a version: the evaluator's id."""
    REMOVED = "removed"
    """The files of a version are about to be removed: [run, version]."""
    HELLO = "hello"
    """A daemon wants to know who waits with the one whose id this is."""
    ALIVE = "alive"
    """A daemon is there, and updates of these clients are arriving."""
    PROGRESS = "progress"
    """A client said how far the training for its ticket is: [ticket, step, steps, updates, wanted]."""
    SEATS = "seats"
    """A client waits with the daemon: [client, run, runs left out]; or no more: [client]."""
    ALL_SEATS = "all seats"
    """The same, and nobody waits there who was not told of since: the first of several may have none."""
    BYE = "bye"
    """A daemon shuts down."""


@dataclass(frozen=True, slots=True)
class Notice:
    """News from one daemon to the others.

    Attributes:
        sender: Id of the daemon.
        topic: Subject of it.
        keys: Names of it, in the form that the topic says.
    """

    sender: str
    topic: Topic
    keys: tuple[Any, ...]

    def payloads(self) -> Iterator[str]:
        """Yields it as texts that PostgreSQL takes."""
        room = PAYLOAD_BYTES - len(_text(self.sender, self.topic, []))
        some: list[Any] = []
        taken = 0
        for key in self.keys:
            size = len(json.dumps(key, separators=(",", ":"))) + 1  # JSON's escapes leave only ASCII
            if some and taken + size > room:
                yield _text(self.sender, self.topic, some)
                some, taken = [], 0
            some.append(key)
            taken += size
        yield _text(self.sender, self.topic, some)

    @classmethod
    def parse(cls, payload: str) -> Notice | None:
        """Returns the notice of a text; None if it is none that this release knows."""
        try:
            sender, topic, keys = json.loads(payload)
            return cls(str(sender), Topic(topic), tuple(keys))
        except (ValueError, TypeError):
            return None


class Notices:
    """Tells the other daemons what transactions of this one change.

    Args:
        dialect: Name of the database's kind.

    Attributes:
        sender: Id of this daemon, drawn for the life of the process.
        are_heard: True if other daemons may use the database.
    """

    def __init__(self, dialect: str) -> None:
        self.sender = secrets.token_hex(6)
        self.are_heard = dialect == "postgresql"

    def tell(self, connection: Connection, topic: Topic, keys: Iterable[Any]) -> None:
        """Has the others told once the transaction commits."""
        if self.are_heard:
            for payload in Notice(self.sender, topic, tuple(keys)).payloads():
                connection.execute(_TELL, {"payload": payload})


def _text(sender: str, topic: Topic, keys: Sequence[Any]) -> str:
    return json.dumps([sender, topic, keys], separators=(",", ":"))
