"""Digests of data by content: equal bytes have equal digests, wherever they lie."""

from __future__ import annotations

import hashlib
import os
import weakref
from collections.abc import Iterable, Iterator
from glob import glob
from pathlib import Path

from fedpeft.data.sources.file_names import PARQUET_SUFFIXES, suffix_of
from fedpeft.data.sources.interface import ImageUnreadable, Source
from fedpeft.data.sources.parquet_files import beside
from fedpeft.errors import DataInvalid

_images: weakref.WeakKeyDictionary[Source, str] = weakref.WeakKeyDictionary()


def digest_of(path: Path) -> str:
    """Returns a SHA-256 of a file, or of all files of a folder, or of a pattern's, with their names, hexadecimal.

    With a parquet file go the files apart from it that its rows name, and the description of its columns.

    Raises:
        DataInvalid: If it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        root, files = _files_at(path)
        for file in files:
            digest.update(os.fsencode(f"{file.relative_to(root)}\0{file.stat().st_size}\0"))
            digest.update(_sha256(file))
            if suffix_of(file.name) in PARQUET_SUFFIXES:
                for other in beside(file):
                    inside = path.is_dir() and Path(os.path.normpath(other)).is_relative_to(os.path.normpath(root))
                    if not inside:  # that is one of the folder's files
                        digest.update(os.fsencode(f"{os.path.relpath(other, file.parent)}\0"))
                        digest.update(_sha256(other) if other.is_file() else b"")
    except OSError as error:
        raise DataInvalid(f"cannot read {error.filename or path}: {error.strerror}") from None
    return digest.hexdigest()


def _sha256(file: Path) -> bytes:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


def images_digest(source: Source) -> str:
    """Returns a SHA-256 of a source's images, in the order of its rows, hexadecimal; read once in a process.

    Raises:
        DataInvalid: If they went away.
    """
    if source not in _images:
        _images[source] = rows_digest(source, range(len(source)))
    return _images[source]


def rows_digest(source: Source, rows: Iterable[int]) -> str:
    """Returns a SHA-256 of the images in some rows of a source, in their order, hexadecimal.

    Raises:
        DataInvalid: If they went away.
    """
    digest = hashlib.sha256()
    for row in rows:
        try:
            data = source.image_bytes(row)
        except ImageUnreadable:
            data = b""  # as an image of no bytes: it has no pixels either
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def known_digests(sources: Iterable[Source]) -> list[tuple[Source, str]]:
    """Returns the digests of images that this process has found, of some sources, each once; for `take_digests`."""
    each = {id(source): source for source in sources}
    return [(source, _images[source]) for source in each.values() if source in _images]


def take_digests(found: Iterable[tuple[Source, str]]) -> None:
    """Takes digests that another process of this machine has found of the same files: `images_digest` knows them."""
    _images.update(found)


def _files_at(path: Path) -> tuple[Path, list[Path]]:
    """Returns the files that a path means, in their order, and where their names begin.

    Raises:
        OSError: If there are none that can be listed.
    """
    if path.is_dir():
        return path, sorted(_files(path))
    if not path.exists() and (matches := sorted(glob(str(path)))):
        return path.parent, [Path(match) for match in matches]
    path.stat()  # one that is not there
    return path, [path]


def _files(folder: Path) -> Iterator[Path]:
    """Yields all files below a folder; linked folders are walked as sources do, each once.

    Raises:
        OSError: If a folder cannot be listed.
    """
    seen = set[tuple[int, int]]()
    for place, folders, names in os.walk(folder, onerror=_raise, followlinks=True):
        folders[:] = [name for name in sorted(folders) if not _is_known(Path(place, name), seen)]
        for name in names:
            yield Path(place, name)


def _is_known(folder: Path, seen: set[tuple[int, int]]) -> bool:
    """Returns True if a folder was met before, by a link or by its name."""
    status = folder.stat()
    identity = status.st_dev, status.st_ino
    known = identity in seen
    seen.add(identity)
    return known


def _raise(error: OSError) -> None:
    raise error
