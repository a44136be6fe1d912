"""Pages of a long list."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """One page of a list.

    Attributes:
        items: Items of the page.
        number: 1 for the first page.
        last: Number of the last page.
        total: Items of all pages.
    """

    items: Sequence[T]
    number: int
    last: int
    total: int


def paginate(items: Sequence[T], number: int, size: int) -> Page[T]:
    """Returns page `number` of a list, the nearest one there is."""
    last = max(1, -(-len(items) // size))
    number = min(max(1, number), last)
    return Page(items[(number - 1) * size : number * size], number, last, len(items))
