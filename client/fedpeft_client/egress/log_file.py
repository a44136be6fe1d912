"""A file of lines of JSON to which lines are added, each durable before it is returned from; none is ever changed.

A line that was cut off by a crash or a full disk stays as it is, and the next one begins behind it.

A file that has become large is set aside under a number, and another one begins: `ledger.jsonl` is the newest, and
`ledger-000001.jsonl`, `ledger-000002.jsonl`... are what came before it, whole and never changed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedpeft.errors import StateInvalid
from fedpeft.process import durable


def archives(path: Path) -> list[Path]:
    """Returns the files of a ledger that were set aside, the oldest first."""
    found = path.parent.glob(f"{path.stem}-*{path.suffix}")
    return sorted(each for each in found if each.stem.rpartition("-")[2].isdecimal())


def _next(path: Path) -> Path:
    """Returns where the beginning of the next file is made."""
    return path.with_name(path.name + ".next")


def _bytes(line: Mapping[str, Any]) -> bytes:
    return json.dumps(line, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


class EgressLogFile:
    """The file of a ledger, open for writing.

    Attributes:
        size_bytes: Its size.

    Args:
        path: The file; made if absent, readable by its owner only.

    Raises:
        StateInvalid: If it cannot be written: nothing leaves without it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._writing():
            self._put_in_place()
            new = not path.exists()
            self._take_up(self._opened(path))
            if new:
                durable.sync(path.parent)

    def begin_another(self, line: Mapping[str, Any]) -> None:
        """Sets the file aside under the next number, and goes on in another one that begins with a line.

        Raises:
            StateInvalid: If it cannot be written. Then this one goes on, or the other one if this one has its number
                already; the next call of a method puts that in its place.
        """
        with self._writing():
            self._put_in_place()
            durable.write(_next(self.path), _bytes(line))
            before = archives(self.path)
            number = int(before[-1].stem.rpartition("-")[2]) + 1 if before else 1
            aside = self.path.with_name(f"{self.path.stem}-{number:06}{self.path.suffix}")
            following = self._opened(_next(self.path))  # before the renames: nothing may be added to what is set aside
            try:
                durable.move(self.path, aside)
                durable.move(_next(self.path), self.path)
            finally:
                if aside.exists():
                    os.close(self._file)
                    self._take_up(following)
                else:
                    os.close(following)

    def _put_in_place(self) -> None:
        """Does the second of the two renames, where the first was the last thing that was done."""
        if not self.path.exists() and _next(self.path).exists():
            durable.move(_next(self.path), self.path)

    @staticmethod
    def _opened(path: Path) -> int:
        return os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)

    def _take_up(self, file: int) -> None:
        """Goes on in an open file."""
        self._file = file
        self.size_bytes = os.fstat(file).st_size
        self._torn = self.size_bytes > 0 and os.pread(file, 1, self.size_bytes - 1) != b"\n"

    def add(self, line: Mapping[str, Any]) -> None:
        """Adds a line.

        Raises:
            StateInvalid: If it cannot be written.
        """
        data = _bytes(line)
        with self._writing():
            self._put_in_place()
            if self._torn:
                data = b"\n" + data
            self._torn = True  # until it is whole: a full disk may take half of it
            done = 0
            while done < len(data):
                done += os.write(self._file, data[done:])
            self._torn = False
            os.fsync(self._file)
            self.size_bytes += len(data)

    def close(self) -> None:
        """Closes the file; every line is durable already."""
        os.close(self._file)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StateInvalid(
                f"cannot write the ledger {self.path}: {error.strerror}; nothing leaves this device without it"
            ) from None
