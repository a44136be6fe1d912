"""Paths for pyarrow, which takes those that are UTF-8 only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Literal


@contextmanager
def arrow_path(path: Path, mode: Literal["rb", "wb"] = "rb") -> Iterator[Path | BinaryIO]:
    """Yields what pyarrow opens for a path: the path, or where its name is not UTF-8, the opened file.

    Raises:
        OSError: If that file cannot be opened.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        with path.open(mode) as file:
            yield file
    else:
        yield path
