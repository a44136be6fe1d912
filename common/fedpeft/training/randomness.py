"""Torch's global generators: seeded for a piece of work, put back after it, and those of other GPUs never touched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

import torch


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds the generator of the CPU and that of `device`, and puts both back at the end.

    `torch.manual_seed` would seed those of all GPUs, also where another process's or thread's work draws from them.
    """
    before = Generators.of(device)
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    try:
        yield
    finally:
        before.restore()


@dataclass(frozen=True, slots=True, eq=False)
class Generators:
    """The state of the CPU's generator and of a GPU's.

    Attributes:
        device: The GPU, or the CPU alone.
        cpu: uint8[n].
        cuda: uint8[n]; None on the CPU.
    """

    device: torch.device
    cpu: torch.Tensor
    cuda: torch.Tensor | None

    @classmethod
    def of(cls, device: torch.device) -> Self:
        """Returns the state now."""
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(device, torch.get_rng_state(), cuda)

    def same_as(self, other: Generators) -> bool:
        """Returns True if nothing was drawn between two states."""
        gpu = self.cuda is None or other.cuda is None or torch.equal(self.cuda, other.cuda)
        return gpu and torch.equal(self.cpu, other.cpu)

    def restore(self) -> None:
        """Goes back to this state."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)


class Stream:
    """Random numbers of one client among several: torch's global generators, taken up where it left them.

    Args:
        seed: Seed of its training.
        device: Device of the training.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self._device = device
        with seeded(seed, device):
            self._now = self._before = Generators.of(device)

    @contextmanager
    def drawn(self) -> Iterator[None]:
        """Gives the global generators the state of the stream, and puts theirs back at the end."""
        others = Generators.of(self._device)
        self._now.restore()
        try:
            yield
        finally:
            self._now = Generators.of(self._device)
            others.restore()

    def mark(self) -> None:
        """Notes the state to which `back` goes."""
        self._before = self._now

    def back(self) -> None:
        """Goes back to the state that was noted last."""
        self._now = self._before
