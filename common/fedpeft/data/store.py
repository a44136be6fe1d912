"""Decoded images of a source: decoded once and kept while they fit a stated number of bytes, else every time."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterable, Iterator

import numpy as np
import structlog
from numpy.typing import NDArray

from fedpeft.data.decoding import Decoded, Decoders, decode_rows
from fedpeft.data.interface import Indices, Source
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
        unreadable: Why a row could not be decoded, by row, as far as rows were asked for.

    Args:
        source: The images.
        preprocessing: How they are decoded.
        cache_bytes: Size up to which all decoded pixels are kept.
        workers: Worker processes for decoding; chosen from the data's size and the processors if None.
    """

    def __init__(
        self, source: Source, preprocessing: Preprocessing, cache_bytes: int = CACHE_BYTES, workers: int | None = None
    ) -> None:
        self.source = source
        self.preprocessing = preprocessing
        self.unreadable: dict[int, str] = {}
        side = preprocessing.image_size
        size = len(source) * 3 * side * side
        # Memory is taken page by page as rows are decoded, so clients that share a source share it at no cost.
        self._kept: Pixels | None = np.empty((len(source), 3, side, side), np.uint8) if size <= cache_bytes else None
        self._state: NDArray[np.uint8] = np.zeros(len(source), np.uint8)
        self._workers = workers
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
        missing = rows[self._state[rows] == _UNKNOWN]
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
            missing = rows[self._state[rows] == _UNKNOWN]
            if len(missing):
                pixels, bad = decode_rows(self.source, self.preprocessing, missing)
                self._keep(missing, pixels, self._good(missing, bad))
            good = self._state[rows] == _GOOD
            yield self._kept[rows[good]], good

    def _keep(self, rows: Indices, pixels: Pixels, good: NDArray[np.bool_]) -> None:
        assert self._kept is not None
        self._kept[rows[good]] = pixels
        self._state[rows] = np.where(good, _GOOD, _BAD)

    def _decoded(self, batches: Iterable[Indices]) -> Iterator[tuple[Pixels, NDArray[np.bool_]]]:
        """Decodes batches in order, in worker processes if there are any."""
        for rows, (pixels, bad) in zip(batches, self._results(batches), strict=True):
            yield pixels, self._good(rows, bad)

    def _results(self, batches: Iterable[Indices]) -> Iterator[Decoded]:
        if not self.workers:
            return (decode_rows(self.source, self.preprocessing, rows) for rows in batches)
        if self._decoders is None:
            self._decoders = Decoders(self.source, self.preprocessing, self.workers)
        return self._decoders.decoded(batches)

    def _good(self, rows: Indices, bad: dict[int, str]) -> NDArray[np.bool_]:
        """Notes unreadable rows, the first of them told once, and returns which of `rows` are readable."""
        for row, why in bad.items():
            if row not in self.unreadable:
                self.unreadable[row] = why
                if len(self.unreadable) <= _TOLD:
                    _log.warning("image_unreadable", image=self.source.name(row), why=why)
        return np.array([int(row) not in bad for row in rows], np.bool_)
