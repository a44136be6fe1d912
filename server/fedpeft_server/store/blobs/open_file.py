"""A file that is open for reading from any thread, so that it can be read though its name is removed."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from io import FileIO
from pathlib import Path

from fedpeft.adapters.payload import Selection


class OpenFile:
    """An open file, or the part of it from a byte on. Each method may wait for the disk and belongs in a thread.

    Args:
        path: The file.
        start: Begin of the part.
        selection: The bytes of the part that are read, as if there were no others; None: all.

    Raises:
        OSError: If it cannot be opened.
    """

    def __init__(self, path: Path, start: int = 0, selection: Selection | None = None) -> None:
        self._file = FileIO(path)
        self._start = start
        self._selection = selection
        self._lock = threading.Lock()

    def read(self, offset: int, length: int) -> bytes:
        """Returns so many bytes, less at the end of the file.

        Raises:
            ValueError: If it was closed.
        """
        pieces = self._selection.pieces(offset, length) if self._selection else [(offset, length)]
        with self._lock:
            return b"".join(os.pread(self._file.fileno(), size, self._start + at) for at, size in pieces)

    def close(self) -> None:
        """Closes it, once nobody is in the middle of a read."""
        with self._lock:
            self._file.close()


class LateFile:
    """A file that is opened with the first read of it, and so never where another reader's bytes serve.

    Args:
        opening: Opens it.
    """

    def __init__(self, opening: Callable[[], OpenFile]) -> None:
        self._opening = opening
        self._lock = threading.Lock()
        self._file: OpenFile | None = None
        self._used = self._left = False

    @property
    def is_open(self) -> bool:
        """True once it was opened."""
        return self._file is not None

    def open(self) -> OpenFile:
        """Opens it if nobody did; belongs in a thread, for as long as the opening may take.

        Raises:
            ValueError: If it was left.
        """
        self._used = True  # before the next line: then either this raises, or `leave` asks for `close`
        if self._left:
            raise ValueError("the file was left")
        with self._lock:
            if self._file is None:
                self._file = self._opening()
            return self._file

    def read(self, offset: int, length: int) -> bytes:
        """Returns so many bytes, less at the end of the file, and opens it before the first; belongs in a thread.

        Raises:
            ValueError: If it was left or closed.
        """
        return self.open().read(offset, length)

    def leave(self) -> bool:
        """Takes no more reads; waits for nothing. Returns whether `close` is to follow."""
        self._left = True
        return self._used

    def close(self) -> None:
        """Closes it, once nobody is in the middle of a read; belongs in a thread."""
        with self._lock:
            if self._file is not None:
                self._file.close()
