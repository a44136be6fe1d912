"""Messages that carry a chunk, as bytes: written and read without the copies that protobuf makes of what it holds.

Every stream of a payload has messages with a `Chunk chunk = 2`, whose bytes are these (`tensor.proto`):

    12 LENGTH      the message's field `chunk`, its length as a varint
    08 OFFSET      its field `offset`, a varint; absent if that is 0
    12 LENGTH      its field `data`
    ...            the data, to the end

Protobuf copies a chunk's data twice when it parses a message and they are asked for, and twice or more when it writes
one. Whatever is written otherwise, as other implementations may, is protobuf's to parse.
"""

from __future__ import annotations

from dataclasses import dataclass

_CHUNK, _OFFSET, _DATA = 0x12, 0x08, 0x12
_MOST_OFFSET = 2**64 - 1


@dataclass(frozen=True, slots=True)
class ChunkView:
    """A chunk in the bytes of its message.

    Attributes:
        offset: Position of its first byte in the payload.
        data: Its bytes, not copied.
    """

    offset: int
    data: memoryview


@dataclass(frozen=True, slots=True)
class WrittenChunk:
    """A message that carries a chunk, written.

    Attributes:
        message: Its bytes.
        data_bytes: Size of the data in them.
    """

    message: bytes
    data_bytes: int


def write(offset: int, data: bytes) -> bytes:
    """Returns the bytes of a message whose field `chunk` has this offset and data: as protobuf writes it."""
    head = (bytes((_OFFSET,)) + _varint(offset) if offset else b"") + bytes((_DATA,)) + _varint(len(data))
    return b"".join((bytes((_CHUNK,)), _varint(len(head) + len(data)), head, data))


def read(message: bytes) -> ChunkView | None:
    """Returns the chunk of a message that is written as above; None for any other, which may be one all the same."""
    end = len(message)
    if end < 2 or message[0] != _CHUNK:
        return None
    length, at = _number(message, 1)
    if at < 0 or at + length != end:
        return None
    offset = 0
    if message[at : at + 1] == b"\x08":
        offset, at = _number(message, at + 1)
        if at < 0 or offset > _MOST_OFFSET:
            return None
    if message[at : at + 1] != b"\x12":
        return None
    length, at = _number(message, at + 1)
    if at < 0 or at + length != end:
        return None
    return ChunkView(offset, memoryview(message)[at:])


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _number(message: bytes, at: int) -> tuple[int, int]:
    """Returns the varint at a place, and the place after it; -1 for that if it has no end within ten bytes."""
    number = 0
    for shift, byte in enumerate(message[at : at + 10]):
        number |= (byte & 0x7F) << (7 * shift)
        if byte < 0x80:
            return number, at + shift + 1
    return 0, -1
