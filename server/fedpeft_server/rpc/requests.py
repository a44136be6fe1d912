"""Requests: a caller's message is measured before it is parsed, and parsed only if it is within its method's bounds.

Notable: a message of protobuf can take a thousand times the memory of its bytes once it is parsed, because an empty
message or string in a list takes two bytes. So the fields are counted in the bytes first, by the same descriptors that
the parser uses, and the counting ends at the bound.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message

from fedpeft.errors import MessageInvalid, MessageTooLarge
from fedpeft.rpc import chunk_messages
from fedpeft_server.access import bounds
from fedpeft_server.access.bounds import CallBound

Parse = Callable[[bytes], Any]
Descriptor = Any
"""A message's description; upb has classes of its own for the same."""

_GROWING = (FieldDescriptor.TYPE_MESSAGE, FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES)
_FIXED = {1: 8, 5: 4}
_LEAST_FIELD_BYTES = 2


@dataclass
class Requests:
    """The messages of one call from its caller.

    Attributes:
        method: The call's short name.
        bound: The bounds on each message.
        kind: Class of the messages; None if that is not known, so that nothing can be counted in them.
        parse: Makes one of its bytes.
        count: Messages so far.
        total_bytes: Their bytes.
    """

    method: str
    bound: CallBound
    kind: type[Message] | None
    parse: Parse
    count: int = 0
    total_bytes: int = 0

    def take(self, data: bytes) -> Any:
        """Returns the next message; one that carries a chunk, and is written as usual, as a `ChunkView`.

        Raises:
            MessageTooLarge: If it has more bytes or fields than its method takes, or the messages are many and small.
            MessageInvalid: If it is not a message of the kind.
        """
        self.count += 1
        self.total_bytes += len(data)
        if len(data) > self.bound.message_bytes:
            raise MessageTooLarge(
                f"a message to {self.method} has {len(data)} bytes; at most {self.bound.message_bytes} are taken"
            )
        if self.count > bounds.STREAM_MESSAGES + self.total_bytes // bounds.CHUNK_BYTES:
            raise MessageTooLarge(
                f"{self.count} messages to {self.method} have {self.total_bytes} bytes together; send chunks of at "
                f"least {bounds.CHUNK_BYTES} bytes, better of 1 MiB"
            )
        if self.kind is not None and _has_chunks(self.kind.DESCRIPTOR) and (chunk := chunk_messages.read(data)):
            return chunk
        try:
            if self.kind is not None and len(data) > self.bound.elements * _LEAST_FIELD_BYTES:
                _Count(self.method, self.bound.elements).fields(data, 0, len(data), self.kind.DESCRIPTOR, 0)
            return self.parse(data)
        except (DecodeError, _Malformed) as error:
            name = self.kind.DESCRIPTOR.name if self.kind else "message"
            text = f"the message to {self.method} is not a {name} of protobuf: {error}"
            raise MessageInvalid(text, ((name, "is malformed"),)) from None


@cache
def _has_chunks(kind: Descriptor) -> bool:
    """Returns True for the messages of a stream of chunks."""
    return "chunk" in kind.fields_by_name


class _Malformed(Exception):
    """Bytes that are no message."""


@dataclass
class _Count:
    """Counts the fields of a message until there are too many."""

    method: str
    most: int
    found: int = 0

    def fields(self, data: bytes, at: int, end: int, kind: Descriptor, depth: int) -> None:
        """Counts what is between two bytes of a message, and in the messages there that can grow."""
        if depth > bounds.MOST_DEPTH:
            raise _Malformed(f"it has messages {depth} deep")
        growing = _growing(kind)
        while at < end:
            self.found += 1
            if self.found > self.most:
                raise MessageTooLarge(f"a message to {self.method} has more than {self.most} fields, the most it takes")
            tag, at = _varint(data, at, end)
            wire = tag & 7
            if wire == 0:
                _, at = _varint(data, at, end)
            elif wire in _FIXED:
                at += _FIXED[wire]
            elif wire == 2:
                length, at = _varint(data, at, end)
                inner = growing.get(tag >> 3)
                if inner is not None and at + length <= end:
                    self.fields(data, at, at + length, inner, depth + 1)
                at += length
            else:
                raise _Malformed(f"a field has wire type {wire}")
        if at > end:
            raise _Malformed("a field goes beyond its end")


@lru_cache(maxsize=256)
def _growing(kind: Descriptor) -> dict[int, Descriptor]:
    """Returns the fields of a message that hold messages in which lists of messages or texts can be, by number."""
    return {
        field.number: field.message_type
        for field in kind.fields
        if field.type == FieldDescriptor.TYPE_MESSAGE and _can_grow(field.message_type)
    }


def _can_grow(kind: Descriptor) -> bool:
    return any(
        field.type == FieldDescriptor.TYPE_MESSAGE or (field.is_repeated and field.type in _GROWING)
        for field in kind.fields
    )


def _varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    """Returns the number at a place, and the place after it."""
    value = shift = 0
    while at < end and shift < 70:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise _Malformed("a number has no end")
