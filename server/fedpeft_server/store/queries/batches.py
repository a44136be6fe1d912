"""Ids of which a statement asks for some: databases bound the values of one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")

VALUES = 500
"""Most values of one IN (...)."""


def batches(values: Sequence[T], most: int = VALUES) -> Iterator[Sequence[T]]:
    """Yields the values in their order, as many at once as one statement takes."""
    return (values[start : start + most] for start in range(0, len(values), most))
