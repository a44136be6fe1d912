"""Work beside a watch: who ends first decides, and nothing goes on behind the caller's back."""

from __future__ import annotations

import asyncio
from typing import NoReturn

import pytest

from fedpeft.process.race import first_of


class Side:
    """One side of a race, which notes whether it was left, and when its clearing up was through."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.left = False

    async def until_told(self, then: Exception | str) -> str:
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            await asyncio.sleep(0)  # clearing up may take a while
            self.left = True
            raise
        if isinstance(then, Exception):
            raise then
        return then

    async def watching(self, then: Exception) -> NoReturn:
        await self.until_told(then)
        raise AssertionError("a watch ends by raising")


@pytest.fixture
def sides() -> tuple[Side, Side]:
    return Side(), Side()


async def test_work_that_ends_first_is_returned_and_the_watch_is_left(sides: tuple[Side, Side]) -> None:
    work, watch = sides
    work.go.set()
    assert await first_of(work.until_told("done"), watch.watching(LookupError())) == "done"
    assert watch.left


async def test_work_that_fails_first_raises_its_error(sides: tuple[Side, Side]) -> None:
    work, watch = sides
    work.go.set()
    with pytest.raises(ValueError, match="broken"):
        await first_of(work.until_told(ValueError("broken")), watch.watching(LookupError()))
    assert watch.left


async def test_a_watch_that_raises_leaves_the_work_once_it_has_cleared_up(sides: tuple[Side, Side]) -> None:
    work, watch = sides
    watch.go.set()
    with pytest.raises(LookupError, match="gone"):
        await first_of(work.until_told("done"), watch.watching(LookupError("gone")))
    assert work.left


@pytest.mark.parametrize(("then", "expected"), [("done", "done"), (ValueError("unreachable"), LookupError("died"))])
async def test_both_in_one_instant(sides: tuple[Side, Side], then: Exception | str, expected: Exception | str) -> None:
    for side in sides:
        side.go.set()
    race = first_of(sides[0].until_told(then), sides[1].watching(LookupError("died")))
    if isinstance(expected, str):
        assert await race == expected
    else:
        with pytest.raises(type(expected), match=str(expected)):
            await race


async def test_a_caller_that_is_cancelled_leaves_neither_behind(sides: tuple[Side, Side]) -> None:
    work, watch = sides
    race = asyncio.create_task(first_of(work.until_told("done"), watch.watching(LookupError())))
    await asyncio.sleep(0.01)
    race.cancel()
    with pytest.raises(asyncio.CancelledError):
        await race
    assert work.left and watch.left


async def test_work_that_cancels_itself_is_no_success(sides: tuple[Side, Side]) -> None:
    async def given_up() -> None:
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        await first_of(given_up(), sides[1].watching(LookupError()))
    assert sides[1].left
