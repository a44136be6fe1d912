"""Text files as editors leave them: UTF-8 with or without a byte order mark, or UTF-16 and UTF-32 with one.

Every text file that a person may have written is read here, so that none is refused for a mark that nobody sees.
"""

from __future__ import annotations

import codecs
import json
import os
import stat
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)

_OF_MARK = {mark: "utf-8-sig" if name == "utf-8" else name[:6] for mark, name in _MARKS}
"""Python's encodings that take the mark away: utf-16 and utf-32 tell the order of bytes by it."""


MOST_BYTES = 1024 * 1024
"""Most bytes of a file that a person writes: a run file, a policy, settings, a certificate."""
MOST_LISTED_BYTES = 256 * MOST_BYTES
"""Most bytes of a file that lists what data have many of: rows, clients, classes."""


class NotText(ValueError):
    """The file is no text that is read here; the message says why, and where, as a clause."""


def read(path: Path, most: int = MOST_BYTES) -> str:
    r"""Returns the text of a file, line ends as `\n`.

    Args:
        path: The file.
        most: Most bytes that it may have.

    Raises:
        OSError: If it cannot be read.
        NotText: If it is no text, or as `read_bytes`.
    """
    return decode(read_bytes(path, most))


def read_bytes(path: Path, most: int = MOST_BYTES) -> bytes:
    """Returns the bytes of a file, without waiting: what is no file, such as a pipe, may never end or never begin.

    Args:
        path: The file.
        most: Most bytes that it may have.

    Raises:
        OSError: If it cannot be read.
        NotText: If it is no regular file, or has more bytes.
    """
    data = _head(path, most + 1)
    if len(data) > most:
        raise NotText(f"it has more than {most:,} bytes, the most that such a file may have")
    return data


def _head(path: Path, most: int = 4) -> bytes:
    """Returns the first bytes of a regular file."""
    with open(path, "rb", opener=_without_waiting) as file:  # Path.open takes no opener
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise NotText("it is a device or a pipe; name a regular file")
        return file.read(most)


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def opened(path: Path) -> TextIO:
    """Opens a file of any size for reading line by line; what is no text becomes replacement characters.

    Raises:
        OSError: If it cannot be read.
        NotText: If it is no regular file.
    """
    head = _head(path)
    mark = next((mark for mark, _ in _MARKS if head.startswith(mark)), b"")
    return path.open(encoding=_OF_MARK.get(mark, "utf-8"), errors="replace")


def decode(data: bytes) -> str:
    r"""Returns bytes as text, without a byte order mark and with line ends as `\n`.

    Raises:
        NotText: If they are no text.
    """
    mark, encoding = next((each for each in _MARKS if data.startswith(each[0])), (b"", "utf-8"))
    try:
        text = data[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, len(mark) + error.start) + 1
        wrong = data[len(mark) + error.start]
        raise NotText(f"byte 0x{wrong:02x} in line {line} is not {encoding.upper()}; save it as UTF-8") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


class TooDeep(ValueError):
    """The tables or arrays of a text are nested deeper than the parser goes."""

    def __init__(self) -> None:
        super().__init__("its brackets are nested hundreds deep, which no such file needs")


def toml(text: str) -> dict[str, Any]:
    """Returns what a TOML text says.

    Raises:
        ValueError: If it is not TOML, has a number of thousands of digits, or nested brackets without end (`TooDeep`).
    """
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise TooDeep from None


def json_of(text: str, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """Returns what a JSON text says.

    Args:
        text: The text.
        pairs: Makes the value of an object of its names and values; a dict if absent.

    Raises:
        ValueError: As `toml`.
    """
    try:
        return json.loads(text, object_pairs_hook=pairs)
    except RecursionError:
        raise TooDeep from None
