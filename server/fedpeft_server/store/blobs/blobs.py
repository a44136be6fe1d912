"""Blobs: adapter versions and the strategies' states that belong to them, in a folder or an object store.

Keys are paths such as `runs/RUN/versions/000012.safetensors`; what is under a key stays while anything refers to it.
"""

from __future__ import annotations

import errno
import hashlib
import secrets
import shutil
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import obstore
import structlog
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import LocalStore

from fedpeft.errors import BlobCorrupt, DiskFull, FedpeftError, StateInvalid, StoreUnavailable
from fedpeft.process.addresses import folder_of
from fedpeft.process.durable import make_folder, refusals, sync
from fedpeft_server.store.blobs import integrity, object_store
from fedpeft_server.store.blobs.cache import BlobCache
from fedpeft_server.store.blobs.integrity import Corruption, Integrity, Kind
from fedpeft_server.store.blobs.open_file import OpenFile
from fedpeft_server.store.refusals import store_refusals

log = structlog.get_logger()

PLACE_KEY = "place"
"""Key of what tells a place from all others."""
CHUNK_BYTES = 1024 * 1024
"""Bytes that are copied from an object store at once."""


class Blobs:
    """A place for blobs.

    Its methods may be called from any thread. Each may raise DiskFull if there is no room, StoreUnavailable if the
    place refuses, and those that read BlobCorrupt if nothing is under the key.

    Args:
        url: A folder, which is made if it does not exist, or a URL: file://, s3://, gs:// or az://.
        cache: Folder of `local` for blobs of an object store, emptied at first; a temporary one if not given.
        flag: Flag that names the place on the command line, for messages.
        files: Files known to be verified, and the reports of those that are corrupt.

    Attributes:
        name: The flag and the place.

    Raises:
        StateInvalid: If the URL is none of these, or the folder cannot be used.
        DiskFull: If there is no room for the folder.
    """

    def __init__(
        self, url: str, cache: Path | None = None, flag: str = "blob store", files: Integrity | None = None
    ) -> None:
        self._url = url
        self._files = files or Integrity()
        self.name = f"{flag} {url}"
        self._root = folder_of(url)
        self._cache = BlobCache(cache)
        self._lock = threading.Lock()
        self._durable: set[Path] = set()
        """Folders whose name is known to be durable."""
        if self._root is not None:
            with refusals(f"opening {self.name}"):
                make_folder(self._root)
            self._store: Any = LocalStore(self._root)
        else:
            try:
                self._store = object_store.opened(url)
            except ValueError as error:
                raise StateInvalid(f"{self.name}: {error}") from None
            except BaseError as error:
                words = str(error).splitlines()[0]
                if words.startswith("Generic URL error"):
                    raise StateInvalid(f"{flag} {url!r} is not a folder, file://, s3://, gs:// or az://") from None
                raise StateInvalid(f"{self.name}: {words}; check its variables in the environment") from None

    @property
    def is_folder(self) -> bool:
        """True for a folder of this machine, False for an object store."""
        return self._root is not None

    @property
    def folder(self) -> Path | None:
        """The folder; None for an object store."""
        return self._root

    def try_writing(self) -> None:
        """Writes an empty blob under a key of its own and removes it."""
        key = f"trial-{secrets.token_hex(8)}"
        self.put(key, b"")
        with self._translated("deleting", key):
            obstore.delete(self._store, key)

    def identity(self) -> str:
        """Returns what tells this place from all others, however it is named: 32 hexadecimal digits.

        It is drawn by who asks first, and kept under the key `place`.
        """
        with self._translated("writing", PLACE_KEY), suppress(AlreadyExistsError):
            obstore.put(self._store, PLACE_KEY, secrets.token_hex(16).encode(), mode="create")
            if self._root is not None:
                self._sync(self._root, self._root / PLACE_KEY)
        return hashlib.sha256(b"".join(self.pieces(PLACE_KEY))).hexdigest()[:32]

    def put(self, key: str, data: bytes | Iterable[bytes] | Path, sha256: str = "") -> None:
        """Writes a blob, in place of any under the key; readers see the old one or the new one. Durable on return.

        Args:
            key: Its key.
            data: The bytes, pieces of them, or a file that holds them, which a store that is a folder moves.
            sha256: Digest with which the file was just written, hexadecimal: it need not be read again at once.
        """
        with self._translated("writing", key):
            if not (isinstance(data, Path) and self._root is not None and self._moved(data, self._root / key)):
                obstore.put(self._store, key, data if isinstance(data, bytes | Path) else iter(data))
            if self._root is not None:
                self._sync(self._root, self._root / key)
                if sha256:
                    self._files.note(self._root / key, sha256)
        if self._root is None:
            self._cache.forget(key)

    def _moved(self, source: Path, path: Path) -> bool:
        """Moves a file into the folder; False if it lies on another file system."""
        path.parent.mkdir(parents=True, exist_ok=True)
        sync(source)
        try:
            source.replace(path)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            return False
        return True

    def _sync(self, root: Path, path: Path) -> None:
        # The local store renames a finished file into place but syncs neither the file nor its folders (`strace`).
        sync(path)
        sync(path.parent)
        for folder in path.parents:
            if folder == root or folder in self._durable:
                break
            sync(folder.parent)
            with self._lock:
                self._durable.add(folder)

    @contextmanager
    def local(self, key: str) -> Iterator[Path]:
        """Gives a file that holds the blob, which stays for as long as the block lasts."""
        if self._root is not None:
            yield self._own(key)
            return
        with self._cache.held(key, partial(self.pieces, key)) as path:
            yield path

    @contextmanager
    def verified(self, key: str, sha256: str, kind: Kind) -> Iterator[Path]:
        """Gives a file that holds the blob and has the digest that is recorded for it, hexadecimal.

        A copy of an object that has another is fetched again. A blob that has another is reported and set aside.

        Raises:
            BlobCorrupt: If the blob is missing or has another digest; it says how to go on.
        """
        with ExitStack() as stack:
            try:
                path = stack.enter_context(self.local(key))
            except BlobCorrupt:
                self._files.report(Corruption(kind, key, sha256, integrity.MISSING))
                raise
            yield self._checked(key, path, sha256, kind)

    def open(self, key: str, sha256: str, kind: Kind) -> OpenFile:
        """Opens a blob that has the digest which is recorded for it; raises as `verified`."""
        with self.verified(key, sha256, kind) as path:
            return OpenFile(path)

    def _checked(self, key: str, path: Path, sha256: str, kind: Kind) -> Path:
        with store_refusals(f"reading blob {key} in {self.name}"):
            fault = self._files.fault(path, sha256)
            if fault and self._root is None:
                self._files.report(Corruption(Kind.COPY, key, sha256, fault))
                path = self._cache.renew(key, partial(self.pieces, key))
                fault = self._files.fault(path, sha256)
        if not fault:
            return path
        found = Corruption(kind, key, sha256, fault, self._set_aside(key))
        self._files.report(found)
        raise BlobCorrupt(f"blob {found.words}; restore it to {self._url} from a backup")

    def distrust(self, key: str) -> None:
        """Has a blob verified when it is next read, though it was verified before."""
        self._files.distrust(self._root / key if self._root is not None else self._cache.place(key))

    def _set_aside(self, key: str) -> str:
        """Renames a corrupt blob to `corrupt/KEY...`, where nothing removes it; returns its name, "" if it stays."""
        aside = f"{integrity.SUFFIX}/{key}.{secrets.token_hex(4)}"
        try:
            with self._translated("setting aside", key):
                obstore.rename(self._store, key, aside)
        except FedpeftError as error:
            log.error("a corrupt blob stays where it is", key=key, message=error.message)
            return ""
        if self._root is None:
            self._cache.forget(key)
        return aside

    def _own(self, key: str) -> Path:
        assert self._root is not None
        path = self._root / key
        if not path.is_file():
            raise self._missing(key)
        return path

    def has(self, key: str) -> bool:
        """Returns True if a blob is under a key, without reading it."""
        if self._root is not None:
            return (self._root / key).is_file()
        with self._translated("looking for", key):
            try:
                obstore.head(self._store, key)
            except FileNotFoundError:
                return False
        return True

    def digest(self, key: str) -> str:
        """Reads a blob whole and returns its SHA-256, hexadecimal; nothing is cached, trusted or set aside."""
        digest = hashlib.sha256()
        for piece in self.pieces(key):
            digest.update(piece)
        return digest.hexdigest()

    def keys(self, folder: str) -> Iterator[str]:
        """Yields the keys of the blobs in a folder, such as `runs`, with their parts before it."""
        with self._translated("looking for", folder):
            for batch in obstore.list(self._store, folder):
                yield from (found["path"] for found in batch)

    def has_any(self, folder: str) -> bool:
        """Returns True if a blob is in a folder, such as `runs`."""
        with self._translated("looking for", folder):
            return any(len(batch) > 0 for batch in obstore.list(self._store, folder, chunk_size=1))

    def pieces(self, key: str) -> Iterator[bytes]:
        """Yields the bytes of a blob as they are stored."""
        with self._translated("reading", key):
            if self._root is not None:
                self._own(key)  # what is no file, a pipe for example, may never end
            yield from map(bytes, obstore.get(self._store, key).stream(CHUNK_BYTES))

    def delete(self, keys: Sequence[str]) -> None:
        """Deletes blobs; those there are none of included."""
        if self._root is not None:
            for key in keys:
                with store_refusals(f"deleting {self._root / key}"):
                    (self._root / key).unlink(missing_ok=True)
            return
        self._delete_objects(keys, keys[0] if keys else "")

    def delete_prefix(self, prefix: str) -> None:
        """Deletes every blob whose key begins with a folder, such as `runs/RUN/`; those there are none of included."""
        if self._root is not None:
            self._delete_folder(self._root / prefix)
            return
        with self._translated("deleting", prefix):
            keys = [found["path"] for batch in obstore.list(self._store, prefix.rstrip("/")) for found in batch]
        self._delete_objects(keys, prefix)

    def keep_only(self, key: str, beginning: str) -> None:
        """Deletes the blobs beside one, whose keys have the same beginning, such as `runs/RUN/versions/000012`."""
        folder = beginning.rpartition("/")[0]
        with self._translated("deleting", beginning):
            later = obstore.list(self._store, folder, offset=beginning)  # so that a long run's are not all looked at
            found = [each["path"] for batch in later for each in batch]
        self._delete_objects([path for path in found if path.startswith(beginning) and path != key], beginning)

    def _delete_objects(self, keys: Sequence[str], place: str) -> None:
        """Deletes objects; those there are none of included, which is an error to some stores (gs://, az://)."""
        with self._translated("deleting", place):
            try:
                obstore.delete(self._store, list(keys))
            except FileNotFoundError:
                for key in keys:  # others may have been left after the first that is missing
                    with suppress(FileNotFoundError):
                        obstore.delete(self._store, key)
        for key in keys:
            self._cache.forget(key)

    def _delete_folder(self, folder: Path) -> None:
        # The whole folder, because a process that dies while writing leaves a file that the store does not list.
        with self._lock:
            self._durable = {known for known in self._durable if folder not in (known, *known.parents)}
        with store_refusals(f"deleting {folder}"):
            if folder.exists():
                shutil.rmtree(folder)

    def _missing(self, key: str) -> BlobCorrupt:
        return BlobCorrupt(f"blob {key} is not in {self._url}; restore it from a backup")

    @contextmanager
    def _translated(self, doing: str, key: str) -> Iterator[None]:
        try:
            with store_refusals(f"{doing} blob {key} in {self.name}"):
                try:
                    with object_store.panics():
                        yield
                except (FileNotFoundError, NotADirectoryError) as error:
                    if doing == "reading" and not object_store.lacks_bucket(error):
                        raise self._missing(key) from None
                    if self._root is None:
                        raise self._refused(doing, key, error) from error
                    raise
        except (BaseError, object_store.StorePanicked) as error:
            raise self._refused(doing, key, error) from error

    def _refused(self, doing: str, key: str, error: Exception) -> DiskFull | StoreUnavailable:
        # obstore gives the system's error only in its text.
        if f"os error {errno.ENOSPC}" in str(error) or f"os error {errno.EDQUOT}" in str(error):
            return DiskFull(f"{doing} blob {key} in {self.name} failed: there is no room left; free some space")
        if self._root is None:
            said = object_store.sentence(self._url, error)
        else:
            said = f"{str(error).splitlines()[0]}; check the place and the permissions"
        return StoreUnavailable(f"{doing} blob {key} in {self.name} failed: {said}")
