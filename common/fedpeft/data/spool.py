"""A temporary file without a name: rows unpacked once, mapped into memory, gone with the last process that has them.

Notable: the file has no name from the start (or loses it before a byte is written), so that a process that is killed
leaves no images behind. Other processes of the same user open it by the descriptor of the process that made it.
"""

from __future__ import annotations

import errno
import os
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from fedpeft.errors import DataInvalid, DiskFull


class Spool:
    """Arrow record batches in a temporary file. Picklable: another process maps the same file while its maker lives.

    Args:
        batches: The batches, of one schema; each is written before the next is asked for.
        schema: That schema.

    Raises:
        DiskFull: If the temporary folder has no room; it is named, with the variable that names another.
        DataInvalid: If it cannot be used otherwise.
    """

    def __init__(self, batches: Iterator[pa.RecordBatch], schema: pa.Schema) -> None:
        size_bytes = 0
        try:
            with tempfile.TemporaryFile(prefix="fedpeft-") as file:
                with pa.ipc.new_file(pa.PythonFile(file, "w"), schema) as writer:
                    for batch in batches:
                        size_bytes += batch.nbytes
                        writer.write_batch(batch)
                file.flush()
                descriptor = os.dup(file.fileno())
            pa.default_memory_pool().release_unused()
        except OSError as error:
            if isinstance(error, pa.ArrowException):
                raise
            raise _refused(error, size_bytes) from None
        weakref.finalize(self, os.close, descriptor)
        found = os.fstat(descriptor)
        self._file = found.st_dev, found.st_ino, found.st_size
        self._path = Path("/proc", str(os.getpid()), "fd", str(descriptor))

    @property
    def is_here(self) -> bool:
        """True if the file can be mapped: not once its maker is gone, nor on another machine."""
        try:
            found = self._path.stat()
        except OSError:
            return False
        return (found.st_dev, found.st_ino, found.st_size) == self._file  # a process there may have the same id

    def batches(self) -> list[pa.RecordBatch]:
        """Maps the file; the batches view it.

        Raises:
            DataInvalid: If the process that made it is gone.
        """
        try:
            mapped = pa.ipc.open_file(pa.memory_map(str(self._path)))
        except OSError:
            raise DataInvalid("the process that unpacked the data is gone, and the unpacked images with it") from None
        return [mapped.get_batch(i) for i in range(mapped.num_record_batches)]

    def __getstate__(self) -> dict[str, Any]:
        return {"_path": self._path, "_file": self._file}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def _refused(error: OSError, size_bytes: int) -> DiskFull | DataInvalid:
    place = _place()
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return DiskFull(
            f"there is no room in the temporary folder {place} for the unpacked images, {size_bytes:,} bytes so far; "
            "free some space, or name another folder with the variable TMPDIR"
        )
    return DataInvalid(
        f"cannot unpack the images in the temporary folder {place}: {error.strerror or error}; name another folder "
        "with the variable TMPDIR"
    )


def _place() -> str:
    try:
        return tempfile.gettempdir()
    except OSError:  # not one of the usual folders can be written
        return os.environ.get("TMPDIR", "/tmp")
