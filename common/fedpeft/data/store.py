"""Decoded images of a source: decoded once and kept while they fit a stated number of bytes, else every time.

What is kept in memory may be kept between processes too, see `fedpeft.data.pixel_cache`.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import structlog
from numpy.typing import NDArray

from fedpeft.data.decoding import Decoded, Decoders, decode_rows, highest_value
from fedpeft.data.images import BitsUnknown
from fedpeft.data.pixel_cache import PixelFile, opened
from fedpeft.data.sources.interface import DEEP_BITS, Indices, Source, origin
from fedpeft.data.transforms import Pixels, Preprocessing

CACHE_BYTES = 512 * 1024 * 1024
"""Decoded pixels up to this size are kept."""

SMALL_BYTES = 64 * 1024 * 1024
"""Encoded images up to this size are decoded in the process itself: workers would take longer to start."""

MAX_WORKERS = 8

_TOLD = 20
_WORKER_ROWS = 256
_UNKNOWN, _GOOD, _BAD = 0, 1, 2

_log = structlog.get_logger(__name__)


class PixelStore:
    """Pixels of a source's rows.

    Attributes:
        unreadable: Reasons for which rows could not be decoded, by row, as far as rows were asked for.
        preprocessing: Preprocessing of images. Its `bits` are None until an image of 16 bits a channel is met; then all
            of the source is looked through for the bits in use, so that they are the same for all its images.

    Args:
        source: The images.
        preprocessing: Preprocessing of the images.
        cache_bytes: Size up to which all decoded pixels are kept.
        workers: Worker processes for decoding; chosen from the data's size and the processors if None.
        pixel_cache: Folder in which pixels that are kept outlive the process; None: none.
    """

    def __init__(
        self,
        source: Source,
        preprocessing: Preprocessing,
        cache_bytes: int = CACHE_BYTES,
        workers: int | None = None,
        pixel_cache: Path | None = None,
    ) -> None:
        self.source = source
        self.preprocessing = replace(preprocessing, bits=None)
        self.unreadable: dict[int, str] = {}
        side = preprocessing.image_size
        size = len(source) * 3 * side * side
        # Memory is taken page by page as rows are decoded, so clients that share a source share it at no cost.
        self._kept: Pixels | None = np.empty((len(source), 3, side, side), np.uint8) if size <= cache_bytes else None
        self._state: NDArray[np.uint8] = np.zeros(len(source), np.uint8)
        self._workers = workers
        self._pixel_cache = pixel_cache
        self._decoders: Decoders | None = None

    @property
    def workers(self) -> int:
        """Worker processes that decode."""
        if multiprocessing.current_process().daemon:
            return 0  # such a process may not start any
        if self._workers is not None:
            return self._workers
        if self.source.image_bytes_total <= SMALL_BYTES:
            return 0
        return min(MAX_WORKERS, len(os.sched_getaffinity(0)) - 1)

    def prepare(self, rows: Indices) -> None:
        """Decodes rows ahead, in worker processes; does nothing where there are none, or pixels are not kept."""
        if self._kept is None or not self.workers:
            return
        missing = self._recalled(rows[self._state[rows] == _UNKNOWN])
        if not len(missing):
            return
        batches = [missing[at : at + _WORKER_ROWS] for at in range(0, len(missing), _WORKER_ROWS)]
        for some, (pixels, good) in zip(batches, self._decoded(batches), strict=True):
            self._keep(some, pixels, good)
        if self._decoders is not None:
            self._decoders.end()  # what was decoded is kept

    def batches(self, batches: Iterable[Indices]) -> Iterator[tuple[Pixels, NDArray[np.bool_]]]:
        """Yields the pixels of batches of rows.

        Args:
            batches: Row numbers of each batch, int64[n]. Iterated twice at once, so no generator, but it may be lazy.

        Yields:
            uint8[m, 3, side, side] of the m readable rows, and which rows these are, bool[n].
        """
        if self._kept is None:
            yield from self._decoded(batches)
            return
        for rows in batches:
            missing = self._recalled(rows[self._state[rows] == _UNKNOWN])
            if len(missing):
                self._keep(missing, *self._decoded_here(missing))
            good = self._state[rows] == _GOOD
            yield self._kept[rows[good]], good

    def _keep(self, rows: Indices, pixels: Pixels, good: NDArray[np.bool_]) -> None:
        assert self._kept is not None
        self._kept[rows[good]] = pixels
        self._state[rows] = np.where(good, _GOOD, _BAD)
        if (cached := self._cached(rows[good])) is not None:
            file, at = cached
            file.put(at, pixels)

    def _recalled(self, rows: Indices) -> Indices:
        """Takes rows that another process decoded; returns those that are left."""
        if not len(rows) or (cached := self._cached(rows)) is None:
            return rows
        assert self._kept is not None
        file, at = cached
        for row, pixels in zip(rows, file.get(at), strict=True):
            if pixels is not None:
                self._kept[row], self._state[row] = pixels, _GOOD
        left: Indices = rows[self._state[rows] == _UNKNOWN]
        return left

    def _cached(self, rows: Indices) -> tuple[PixelFile, list[int]] | None:
        """Returns the file that keeps pixels between processes, and where rows are in it; None if they are not kept.

        Where the bits in use matter, those of the part of a source are meant, and pixels are those of that part alone.
        """
        if self._pixel_cache is None or self.preprocessing.bits is not None:
            return None
        whole, at = origin(self.source, rows)
        file = opened(self._pixel_cache, whole, self.preprocessing)
        return None if file is None else (file, at.tolist())

    def _decoded(self, batches: Iterable[Indices]) -> Iterator[tuple[Pixels, NDArray[np.bool_]]]:
        """Decodes batches in order, in worker processes if there are any."""
        done = 0
        while True:
            rest, again = (islice(iter(batches), done, None) for _ in range(2))
            try:
                for rows, (pixels, bad) in zip(rest, self._results(again), strict=True):
                    done += 1
                    yield pixels, self._good(rows, bad)
                return
            except BitsUnknown:
                self._look_for_bits()  # once: with them, decoding goes on where it stopped

    def _decoded_here(self, rows: Indices) -> tuple[Pixels, NDArray[np.bool_]]:
        try:
            pixels, bad = decode_rows(self.source, self.preprocessing, rows)
        except BitsUnknown:
            self._look_for_bits()
            pixels, bad = decode_rows(self.source, self.preprocessing, rows)
        return pixels, self._good(rows, bad)

    def _results(self, batches: Iterable[Indices]) -> Iterator[Decoded]:
        if not self.workers:
            return (decode_rows(self.source, self.preprocessing, rows) for rows in batches)
        return self._processes().decoded(batches)

    def _processes(self) -> Decoders:
        if self._decoders is None:
            self._decoders = Decoders(self.source, self.preprocessing, self.workers)
        return self._decoders

    def _look_for_bits(self) -> None:
        """Finds how many bits the source's images of 16 bits a channel use, and says so if these are not all."""
        rows = np.arange(len(self.source), dtype=np.int64)
        batches = [rows[at : at + _WORKER_ROWS] for at in range(0, len(rows), _WORKER_ROWS)]
        if self.workers:
            highest = max(self._processes().highest_values(batches))
            self._processes().end()
            self._decoders = None  # the next ones know
        else:
            highest = max(highest_value(self.source, self.preprocessing, rows) for rows in batches)
        bits = max(highest.bit_length(), 1)
        self.preprocessing = replace(self.preprocessing, bits=bits)
        if bits < DEEP_BITS:
            _log.warning("images of 16 bits use fewer; all are scaled by the bits in use", bits=bits, highest=highest)

    def _good(self, rows: Indices, bad: dict[int, str]) -> NDArray[np.bool_]:
        """Notes unreadable rows, the first of them told once, and returns which of `rows` are readable."""
        for row, why in bad.items():
            if row not in self.unreadable:
                self.unreadable[row] = why
                if len(self.unreadable) <= _TOLD:
                    _log.warning("image_unreadable", image=self.source.name(row), why=why)
        return np.array([int(row) not in bad for row in rows], np.bool_)
