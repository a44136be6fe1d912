"""A file of lines of JSON to which lines are added, each durable before it is returned from; none is ever changed.

A line that was cut off by a crash or a full disk stays as it is, and the next one begins behind it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedpeft import durable
from fedpeft.errors import StateInvalid


class LedgerFile:
    """The file of a ledger, open for writing.

    Args:
        path: Where it is; made if absent, readable by its owner only.

    Raises:
        StateInvalid: If it cannot be written: nothing leaves without it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._writing():
            new = not path.exists()
            self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
            if new:
                durable.sync(path.parent)
            size = os.fstat(self._file).st_size
            self._torn = size > 0 and os.pread(self._file, 1, size - 1) != b"\n"

    def add(self, line: Mapping[str, Any]) -> None:
        """Adds a line.

        Raises:
            StateInvalid: If it cannot be written.
        """
        data = json.dumps(line, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        if self._torn:
            data = b"\n" + data
        self._torn = True  # until it is whole: a full disk may take half of it
        with self._writing():
            done = 0
            while done < len(data):
                done += os.write(self._file, data[done:])
            self._torn = False
            os.fsync(self._file)

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
