"""Pages of a list, as AIP-158 has them: a bounded size, and an opaque token that only fits the list that gave it."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Generic, TypeVar, cast

from google.protobuf.message import Message

from fedpeft.errors import PageInvalid

MOST = 1000
"""Most items of a page, and how many it has where the caller does not say."""
PAGE_BYTES = 1024 * 1024
"""A page ends before it is larger, unless it would be empty; a quarter of the largest message leaves room for a run."""
_DIGEST_BYTES = 6

NUMBERS = 2**63
"""Numbers of positions are below it: more would not fit the database's."""

M = TypeVar("M", bound=Message)
Position = Sequence[str | int | float]
P = TypeVar("P", bound=tuple[str | int | float, ...])


def size(asked: int) -> int:
    """Returns how many items a page may have.

    Raises:
        PageInvalid: If a negative number was asked for.
    """
    if asked < 0:
        fault = "must be 0, for the server's own choice, or more"
        raise PageInvalid(f"page_size is {asked}; it {fault}", (("page_size", fault),))
    return min(asked or MOST, MOST)


def token(position: Position, *, of: Position) -> str:
    """Returns the token for going on at a position of a list; `of` is what the list was asked for."""
    body = json.dumps(list(position)).encode()
    digest = hashlib.sha256(json.dumps(list(of)).encode() + b"\0" + body).digest()[:_DIGEST_BYTES]
    return base64.urlsafe_b64encode(digest + body).decode().rstrip("=")


def position(given: str, *, of: Position, first: P) -> P:
    """Returns the position that a token stands for, of the same form as the list's beginning.

    The digest in a token tells it from one of another list; it has no key, so anybody can make one. What is in it is
    therefore checked like all that comes from outside: a forged one is refused, or a place that its caller may ask for.

    Args:
        given: The token; empty for the beginning.
        of: Parameters of the list.
        first: The beginning: whole numbers, numbers and texts, as in every position of this list.

    Raises:
        PageInvalid: If it is not a token of this list.
    """
    if not given:
        return first
    try:
        found = json.loads(base64.urlsafe_b64decode(given + "=" * (-len(given) % 4))[_DIGEST_BYTES:])
        ours = _has_the_form(found, first) and token(found, of=of) == given
    except (ValueError, RecursionError):  # no base64, no JSON, or JSON without end: no list gave that
        ours = False
    if not ours:
        fault = "is not a token that this list gave when it was asked for the same"
        raise PageInvalid(f"page_token {fault}; begin again without one", (("page_token", fault),))
    return cast(P, tuple(found))


def _has_the_form(found: object, first: Position) -> bool:
    return (
        isinstance(found, list)
        and [type(each) for each in found] == [type(each) for each in first]
        and all(_is_plain(each) if isinstance(each, str) else 0 <= each < NUMBERS for each in found)
    )


def _is_plain(text: str) -> bool:
    return text.isascii() and text.isprintable()


class Filling(Generic[M]):
    """A page that is being filled: so many bytes, and at least one message.

    Attributes:
        taken: The messages in it.
    """

    def __init__(self, room: int = PAGE_BYTES) -> None:
        self.taken: list[M] = []
        self._room = room

    def takes(self, message: M) -> bool:
        """Takes a message if it fits; says whether it did."""
        self._room -= message.ByteSize()
        if self.taken and self._room < 0:
            return False
        self.taken.append(message)
        return True


def fitting(messages: Iterable[M], room: int | None = None) -> list[M]:
    """Returns as many messages, from the first on, as fit into a page, or `room` bytes; at least one."""
    page = Filling[M](PAGE_BYTES if room is None else room)
    for message in messages:
        if not page.takes(message):
            break
    return page.taken
