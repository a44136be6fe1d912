"""Batches that a thread prepares ahead: the same ones in the same order, errors in their place, no thread left over."""

from __future__ import annotations

import threading
from contextlib import closing

import pytest

from fedpeft.training.batches import ahead


def threads() -> int:
    return sum(thread.name == "batches" for thread in threading.enumerate())


@pytest.mark.parametrize("depth", [1, 2, 50])
def test_everything_comes_prepared_and_in_order(depth: int) -> None:
    here = threading.get_ident()
    made = list(ahead(range(20), lambda n: (n * n, threading.get_ident() != here), depth))
    assert made == [(n * n, True) for n in range(20)]
    assert threads() == 0


def test_no_more_is_prepared_than_asked_for_ahead() -> None:
    prepared: list[int] = []
    with closing(ahead(range(1000), prepared.append, 3)) as batches:
        next(batches)
    assert 1 <= len(prepared) <= 6  # one taken, three waiting, one in hand, one taken while the first was
    assert threads() == 0


def test_an_error_comes_where_its_item_would() -> None:
    def items():
        yield 1
        yield 2
        raise ValueError("the third")

    seen = []
    with pytest.raises(ValueError, match="the third"):
        for item in ahead(items(), lambda n: n):
            seen.append(item)
    assert seen == [1, 2]
    with pytest.raises(ZeroDivisionError):
        list(ahead([1, 0], lambda n: 1 / n))
    assert threads() == 0
