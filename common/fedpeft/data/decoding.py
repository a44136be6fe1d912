"""Processes that decode images, started once for a source and kept between rounds."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing import connection
from typing import Any, TypeAlias, TypeVar

import numpy as np

from fedpeft.data.images import peak
from fedpeft.data.sources.interface import ImageUnreadable, Indices, Source
from fedpeft.data.transforms import Pixels, Preprocessing
from fedpeft.errors import DataInvalid

AHEAD = 2
"""Batches under way for each process."""

POOLS = 2
"""Sources whose processes are kept; those of the one used longest ago end first."""

Decoded: TypeAlias = tuple[Pixels, dict[int, str]]
"""uint8[m, 3, side, side] of the readable rows in order, and why each other row is not, by row."""

T = TypeVar("T")

_pools: OrderedDict[int, ProcessPoolExecutor] = OrderedDict()
_held: tuple[Source, Preprocessing] | None = None


def decode_rows(source: Source, preprocessing: Preprocessing, rows: Indices) -> Decoded:
    """Decodes rows of a source in this process.

    Raises:
        BitsUnknown: As `Preprocessing.decode`.
        DataInvalid: If the source cannot be read any more.
    """
    side = preprocessing.image_size
    pixels = np.empty((len(rows), 3, side, side), np.uint8)
    bad: dict[int, str] = {}
    done = 0
    for row in map(int, rows):
        try:
            pixels[done] = preprocessing.decode(source.image_bytes(row))
            done += 1
        except ImageUnreadable as error:
            bad[row] = str(error)
    return pixels[:done], bad


def highest_value(source: Source, preprocessing: Preprocessing, rows: Indices) -> int:
    """Returns the highest value in images of 16 bits a channel among some rows; 0 if there are none that can be read.

    Raises:
        DataInvalid: If the source cannot be read any more.
    """
    highest = 0
    for row in map(int, rows):
        with suppress(ImageUnreadable):  # counted and named when it is decoded
            highest = max(highest, peak(source.image_bytes(row), preprocessing.max_pixels))
    return highest


class Decoders:
    """The processes of one source.

    Args:
        source: The images; sent to each process once.
        preprocessing: Their preprocessing.
        workers: Number of processes, at least 1.
    """

    def __init__(self, source: Source, preprocessing: Preprocessing, workers: int) -> None:
        self._work = source, preprocessing
        self._workers = workers

    def decoded(self, batches: Iterable[Indices]) -> Iterator[Decoded]:
        """Decodes batches of rows, in order, some ahead of what is asked for.

        Raises:
            BitsUnknown: As `decode_rows`.
            DataInvalid: If the source cannot be read any more, or a process ended.
        """
        return self._mapped(_decode, batches)

    def highest_values(self, batches: Iterable[Indices]) -> Iterator[int]:
        """Returns `highest_value` of batches of rows; raises as `decoded`."""
        return self._mapped(_highest_value, batches)

    def _mapped(self, function: Callable[[Indices], T], batches: Iterable[Indices]) -> Iterator[T]:
        pool, under_way = self._pool(), deque[Future[T]]()
        try:
            for rows in batches:
                under_way.append(pool.submit(function, rows))
                if len(under_way) > AHEAD * self._workers:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        except BrokenProcessPool as error:
            self.end()
            raise DataInvalid(f"a process that decodes images ended ({error}); use fewer worker processes") from None
        finally:
            for each in under_way:
                each.cancel()

    def end(self) -> None:
        """Ends the processes; they are started again when they are needed."""
        if pool := _pools.pop(id(self), None):
            pool.shutdown(wait=False, cancel_futures=True)

    def __del__(self) -> None:
        self.end()

    def _pool(self) -> ProcessPoolExecutor:
        if id(self) not in _pools:
            while len(_pools) >= POOLS:
                _pools.popitem(last=False)[1].shutdown(wait=False, cancel_futures=True)
            _pools[id(self)] = ProcessPoolExecutor(self._workers, _context(), _hold, self._work)
        _pools.move_to_end(id(self))
        return _pools[id(self)]


def _hold(source: Source, preprocessing: Preprocessing) -> None:
    """Keeps in a process what it decodes, and ties the process's life to that of the one that started it."""
    global _held
    _held = source, preprocessing
    warnings.simplefilter("ignore")  # no raw line of a library's between those of the log
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all of the group; who started this one ends it
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Ends this process when its parent was killed: the pool's queues would keep it, and images, for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _decode(rows: Indices) -> Decoded:
    assert _held is not None
    return decode_rows(*_held, rows)


def _highest_value(rows: Indices) -> int:
    assert _held is not None
    return highest_value(*_held, rows)


def _context() -> Any:
    """Returns how workers start: from a clean process, because forking one with threads (gRPC, CUDA) may hang."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context
