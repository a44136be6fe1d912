"""Files that hold what was read of an object store, within a bound."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fedpeft_server.store.refusals import store_refusals

CACHE_BYTES = 1024**3
"""Most that is kept; a blob that is in use stays though it is more."""


class BlobCache:
    """Copies of blobs in a folder; those read longest ago go first.

    Its methods may be called from any thread.

    Args:
        folder: Emptied at first, because nobody knows how much a process that was killed left there; a temporary
            folder if not given.
        most_bytes: Most that is kept.
    """

    def __init__(self, folder: Path | None = None, most_bytes: int = CACHE_BYTES) -> None:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        self._folder = folder
        self._most_bytes = most_bytes
        self._lock = threading.Lock()
        self._sizes: OrderedDict[str, int] = OrderedDict()
        self._held: Counter[str] = Counter()

    def path(self, key: str, read: Callable[[], Iterable[bytes]]) -> Path:
        """Returns a copy of a blob, made from what `read` gives if there is none; it may go once others are read.

        Raises:
            DiskFull: If there is no room for it; StoreUnavailable if the folder refuses; whatever `read` raises.
        """
        with self._lock:
            copy = self.place(key)
            if key in self._sizes and copy.is_file():
                self._sizes.move_to_end(key)
                return copy
        size = self._fetch(key, copy, read)
        with self._lock:
            self._sizes[key] = size
            self._sizes.move_to_end(key)
            self._evict(key)
        return copy

    @contextmanager
    def held(self, key: str, read: Callable[[], Iterable[bytes]]) -> Iterator[Path]:
        """Gives a copy of a blob that stays for as long as the block lasts; else as `path`."""
        with self._lock:
            self._held[key] += 1
        try:
            yield self.path(key, read)
        finally:
            with self._lock:
                self._held[key] -= 1
                if not self._held[key]:
                    del self._held[key]

    def renew(self, key: str, read: Callable[[], Iterable[bytes]]) -> Path:
        """Makes the copy of a blob anew, in place of the one there is; raises as `path`."""
        with self._lock:
            self._sizes.pop(key, None)
        return self.path(key, read)

    def forget(self, key: str) -> None:
        """Removes the copy of a blob, if there is one."""
        with self._lock:
            self._sizes.pop(key, None)
            if self._folder is not None:
                self.place(key).unlink(missing_ok=True)

    def _fetch(self, key: str, copy: Path, read: Callable[[], Iterable[bytes]]) -> int:
        with store_refusals(f"caching blob {key}"):
            copy.parent.mkdir(parents=True, exist_ok=True)
            descriptor, partial = tempfile.mkstemp(dir=copy.parent)
        try:
            with store_refusals(f"caching blob {key}"), os.fdopen(descriptor, "wb") as file:
                file.writelines(read())
                size = file.tell()
            Path(partial).replace(copy)
        finally:
            Path(partial).unlink(missing_ok=True)
        return size

    def _evict(self, newest: str) -> None:
        for key in list(self._sizes):
            if sum(self._sizes.values()) <= self._most_bytes:
                return
            if key != newest and key not in self._held:
                del self._sizes[key]
                self.place(key).unlink(missing_ok=True)

    def place(self, key: str) -> Path:
        """Returns where the copy of a blob is, or would be."""
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="fedpeft-blobs-"))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        return self._folder / key
