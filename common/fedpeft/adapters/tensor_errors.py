"""Errors of the safetensors package that are the operating system's: a full disk, a file that may not be written."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError

_NUMBER = re.compile(r"\(os error (\d+)\)")


@contextmanager
def as_os_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Raises OSError for what the operating system refused, as the package's own error has its number in the text only.

    Args:
        path: The file that is written in the block; the error names it.

    Raises:
        OSError: With number and file name; every other SafetensorError stays as it is.
    """
    try:
        yield
    except SafetensorError as error:
        found = _NUMBER.search(str(error))
        if found is None:
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number), os.fspath(path)) from error
