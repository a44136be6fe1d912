"""Decoded pixels of a data set's images, kept between processes: a file for a data set and the way it is decoded.

A simulation, and each cell of a study, decodes the same images to the same pixels again. The first one writes them here
as it decodes them; others read them, also while the first one is at work.

Notable: every image has its record, with a checksum: one that is half written, or damaged, does not match and is
decoded anew, so writers need no lock and a kill at any moment harms nothing. The file's name is a digest of the
images' bytes, in their order, and of all that decides their pixels.
"""

from __future__ import annotations

import errno
import hashlib
import os
import struct
import weakref
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import PIL
import structlog
from PIL import features

from fedpeft.data.contents import images_digest
from fedpeft.data.sources.folders import FolderSource
from fedpeft.data.sources.interface import Source
from fedpeft.data.sources.parquet import ParquetSource
from fedpeft.data.transforms import Pixels, Preprocessing

VARIABLE = "FEDPEFT_PIXEL_CACHE"
"""Environment variable: the folder; `off` for none."""
OFF = "off"
LIMIT_BYTES = 8 * 1024**3
"""Size of the folder; files used longest ago go before a new one is made. A data set beyond it has none."""
DECODING = 1
"""Version of the decoding, part of the files' names: raised when `fedpeft.data` makes other pixels of an image."""

_SUFFIX = ".pixels"
_CHECKSUM = struct.Struct("<II")
"""Before the pixels of a record: 1 and their CRC-32; zeros where the image was not decoded yet."""

_log = structlog.get_logger(__name__)
_files: weakref.WeakKeyDictionary[Source, dict[tuple[Path, Preprocessing], PixelFile]] = weakref.WeakKeyDictionary()


def folder_here() -> Path | None:
    """Returns the folder that the environment names, else that in the user's cache; None if there shall be none."""
    named = os.environ.get(VARIABLE, "")
    if named == OFF:
        return None
    if named:
        return Path(named)
    if cache := os.environ.get("XDG_CACHE_HOME"):
        return Path(cache, "fedpeft", "pixels")
    with suppress(RuntimeError):  # of a user without a home
        return Path.home() / ".cache" / "fedpeft" / "pixels"
    return None


def opened(folder: Path, source: Source, preprocessing: Preprocessing) -> PixelFile | None:
    """Returns the file of a whole data set, opened once in a process: the clients of a data set share it.

    A data set that is no files has none: to ask it for its images may cost what decoding does, and draw at random.
    """
    if not isinstance(source, ParquetSource | FolderSource):
        return None
    files = _files.setdefault(source, {})
    if (folder, preprocessing) not in files:
        files[folder, preprocessing] = PixelFile(folder, source, preprocessing)
    return files[folder, preprocessing]


class PixelFile:
    """The records of one data set, opened for reading and writing.

    Args:
        folder: The folder; made if it is not there.
        source: The whole data set.
        preprocessing: The decoding; `bits` are not known.
    """

    def __init__(self, folder: Path, source: Source, preprocessing: Preprocessing) -> None:
        side = preprocessing.image_size
        self._shape = 3, side, side
        self._record = _CHECKSUM.size + 3 * side * side
        self._descriptor: int | None = None
        self._is_damaged = False
        size = len(source) * self._record
        if size > LIMIT_BYTES:  # before all of its images are read for a name
            _log.info("decoded pixels are not kept: too many", images=len(source), bytes=size, most=LIMIT_BYTES)
            return
        self._path = folder / f"{_name(source, preprocessing)}{_SUFFIX}"
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._open(size)
        except OSError as error:
            self._give_up(error)

    def get(self, rows: Sequence[int]) -> list[Pixels | None]:
        """Returns the pixels of images, uint8[3, side, side] each; None for those to decode."""
        return [self._get(row) for row in rows]

    def put(self, rows: Sequence[int], pixels: Pixels) -> None:
        """Keeps the pixels of images, uint8[n, 3, side, side]."""
        for row, image in zip(rows, pixels, strict=True):
            if self._descriptor is None:
                return
            if not os.fstat(self._descriptor).st_nlink:  # what is written to it takes room that no folder shows
                _log.info("decoded pixels are kept no more: their file made room for others", file=str(self._path))
                self._descriptor = None
                return
            data = image.tobytes()
            record = _CHECKSUM.pack(1, zlib.crc32(data)) + data
            try:
                if os.pwrite(self._descriptor, record, row * self._record) < len(record):
                    os.pwrite(self._descriptor, bytes(_CHECKSUM.size), row * self._record)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
            except OSError as error:
                self._give_up(error)

    def _get(self, row: int) -> Pixels | None:
        if self._descriptor is None:
            return None
        try:
            record = os.pread(self._descriptor, self._record, row * self._record)
        except OSError as error:
            self._give_up(error)
            return None
        if not any(record[: _CHECKSUM.size]):
            return None
        data = memoryview(record)[_CHECKSUM.size :]
        if record[: _CHECKSUM.size] != _CHECKSUM.pack(1, zlib.crc32(data)):
            self._say_damaged()
            return None
        return np.frombuffer(data, np.uint8).reshape(self._shape)

    def _open(self, size: int) -> None:
        if self._path.exists() and self._path.stat().st_size not in (0, size):
            self._say_damaged()
            self._path.unlink(missing_ok=True)
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        weakref.finalize(self, os.close, descriptor)
        os.truncate(descriptor, size)  # of one that another process has just made, to the same size
        os.utime(descriptor)  # used now
        _make_room(self._path)  # with its size in the folder: two that are made at once both see the other
        self._descriptor = descriptor

    def _say_damaged(self) -> None:
        if not self._is_damaged:
            self._is_damaged = True
            _log.warning("kept pixels are damaged, and the images are decoded anew", file=str(self._path))

    def _give_up(self, error: OSError) -> None:
        """Goes on without the file: pixels are decoded, as they were before there was one."""
        self._descriptor = None
        _log.warning(f"decoded pixels are not kept; {VARIABLE} names another folder, or {OFF}", cause=str(error))


def _name(source: Source, preprocessing: Preprocessing) -> str:
    """Returns a digest of the images and of all that decides their pixels."""
    wanted = preprocessing.image_size, preprocessing.interpolation, preprocessing.max_pixels
    libraries = PIL.__version__, *(features.version(each) for each in ("jpg", "webp", "zlib", "libtiff", "jpg_2000"))
    return hashlib.sha256(repr((DECODING, images_digest(source), wanted, libraries)).encode()).hexdigest()


def _make_room(new: Path) -> None:
    """Removes the files that were used longest ago, until those that are left fit, a new one among them.

    A file counts as what it may come to hold: those of few clients have holes, which fill.
    """
    known = sorted(_kept(new.parent))
    used = sum(size for _, size, _ in known)
    for _, size, file in known:
        if used <= LIMIT_BYTES:
            return
        if file != new:
            file.unlink(missing_ok=True)
            used -= size


def _kept(folder: Path) -> Iterator[tuple[float, int, Path]]:
    """Yields time of last use, size and path of every file."""
    for file in folder.glob(f"*{_SUFFIX}"):
        with suppress(FileNotFoundError):  # another process made room
            status = file.stat()
            yield status.st_mtime, status.st_size, file
