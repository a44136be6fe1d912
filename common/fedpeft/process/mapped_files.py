"""Files mapped into memory, read-only, and their pages given back once they were read.

A mapping made here holds no descriptor, unlike one of Python's `mmap`: a fold maps every update of its round at once,
and would otherwise end at the limit on open files (often 1,024). Linux allows 65,530 mappings a process by default.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_FAILED = ctypes.c_void_p(-1).value


class _Mapping:
    """The pages of a file; unmapped when nothing views them any more.

    Args:
        descriptor: Of the file, which may be closed afterwards.
        size: Bytes to map, at least 1.

    Raises:
        OSError: If the system refuses.
    """

    _address: int | None = None  # also of one that was interrupted while it was made

    def __init__(self, descriptor: int, size: int) -> None:
        self._size = size
        self._address = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
        if self._address == _FAILED:
            self._address = None
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error))

    @property
    def __array_interface__(self) -> dict[str, Any]:
        """NumPy's protocol for memory of another owner, which the array then keeps alive."""
        return {"version": 3, "shape": (self._size,), "typestr": "|u1", "data": (self._address, True)}

    def release(self) -> None:
        """Gives the pages back; they are read from the file again when they are next needed."""
        _libc.madvise(self._address, self._size, mmap.MADV_DONTNEED)

    def __del__(self, unmap: Callable[[int, int], int] = _libc.munmap) -> None:
        if self._address is not None:
            unmap(self._address, self._size)


def mapped(path: Path) -> memoryview:
    """Maps a file into memory, read-only; it stays mapped for as long as something views it.

    Raises:
        OSError: If it cannot be opened or mapped.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size == 0:
            return memoryview(b"")
        return np.asarray(_Mapping(file.fileno(), size)).data


def releaser(view: memoryview) -> Callable[[], object] | None:
    """Returns what gives the pages of a mapped file back; None for other memory.

    Without it every update that is read counts as the process's memory until it is unmapped.
    """
    mapping = view.obj.base if isinstance(view.obj, np.ndarray) else None
    return mapping.release if isinstance(mapping, _Mapping) else None
