"""Batches of a training: their order, and preparing them ahead of the device that computes."""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from fedpeft import seeds
from fedpeft.config import TrainingConfig
from fedpeft.errors import TrainingFailed
from fedpeft.models.tasks import Batch

T = TypeVar("T")
R = TypeVar("R")

AHEAD = 2
"""Batches that are ready while one is computed."""


class BatchOrder:
    """The positions of every batch, a new order in each pass; made as they are asked for, as often as wanted.

    Attributes:
        steps: Batches in all.
        batches_per_pass: Batches in one pass over the data.
    """

    def __init__(self, settings: TrainingConfig, examples: int, seed: int) -> None:
        self._examples, self._size, self._seed = examples, settings.batch_size, seed
        self.batches_per_pass = math.ceil(examples / settings.batch_size)
        self.steps = settings.steps or (settings.epochs or 1) * self.batches_per_pass

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        order = np.empty(0, np.int64)
        for step in range(self.steps):
            epoch, at = step // self.batches_per_pass, step % self.batches_per_pass * self._size
            if at == 0:
                generator = np.random.Generator(np.random.PCG64(seeds.derive(self._seed, "shuffle", epoch)))
                order = generator.permutation(self._examples)
            yield order[at : at + self._size]


def size(batch: Batch) -> int:
    """Returns the number of examples in a batch."""
    return len(next(iter(batch.values())))


def split(batch: Batch, most: int) -> Iterator[Batch]:
    """Yields a batch in parts of at most so many examples: views, not copies."""
    for at in range(0, size(batch), most):
        yield {name: tensor[at : at + most] for name, tensor in batch.items()}


def pinned(batch: Batch) -> Batch:
    """Returns a batch in memory from which copies to a GPU need not be waited for."""
    return {name: tensor.pin_memory() for name, tensor in batch.items()}


def moved(batch: Batch, device: torch.device) -> Batch:
    """Returns a batch on a device; a copy from pinned memory is not waited for."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def in_parts(batch: Batch, device: torch.device, compute: Callable[[Batch], R], example: str) -> list[R]:
    """Returns the results for the parts of a batch in turn, each moved to the device; halves them until they fit.

    Raises:
        TrainingFailed: If not even one example, of this word, fits into the GPU's memory.
    """
    most = size(batch)
    while True:
        try:
            return [compute(moved(part, device)) for part in split(batch, most)]
        except torch.OutOfMemoryError:
            if most == 1:
                raise TrainingFailed(f"not even one {example} fits into the memory of {device}") from None
        # Outside the handler: while it runs, the exception holds the tensors that filled the memory.
        most = -(-most // 2)
        if device.type == "cuda":
            torch.cuda.empty_cache()


def ahead(items: Iterable[T], prepare: Callable[[T], R], depth: int = AHEAD) -> Iterator[R]:
    """Yields `prepare` of each item, in order, made in a thread of its own up to `depth` items ahead.

    An error of the items or of `prepare` is raised where its item would come. Whoever stops early closes the iterator,
    which ends the thread.

    Args:
        items: Iterated in the thread.
        prepare: Called in the thread.
        depth: At least 1.
    """
    done = threading.Event()
    ready: queue.Queue[tuple[R | None, BaseException | None, bool]] = queue.Queue(depth)

    def offer(value: R | None, error: BaseException | None, last: bool) -> None:
        while not done.is_set():
            try:
                return ready.put((value, error, last), timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                offer(prepare(item), None, False)
                if done.is_set():
                    return
            offer(None, None, True)
        except BaseException as error:  # it crosses to the thread that iterates, whatever it is
            offer(None, error, True)

    thread = threading.Thread(target=work, name="batches", daemon=True)
    thread.start()
    try:
        while True:
            value, error, last = ready.get()
            if error is not None:
                raise error
            if last:
                return
            yield value  # type: ignore[misc]  # an item's own
    finally:
        done.set()
        thread.join()
