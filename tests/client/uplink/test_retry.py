"""After a restart of the server clients are back soon, and one that is away for long is not asked all the time."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.errors import ServerUnreachable
from fedpeft.process import logs
from fedpeft_client.timing import TIMING
from fedpeft_client.uplink import retry
from fedpeft_client.uplink.retry import Retry


class Clock:
    """Time that passes only in pauses, each as long a part of its range as `draws` says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, draw: float) -> None:
        self.now = 0.0
        self.pauses: list[float] = []
        monkeypatch.setattr(retry.random, "uniform", lambda low, high: low + draw * (high - low))
        monkeypatch.setattr(retry.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(retry.asyncio, "sleep", self.sleep)

    async def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


async def _back_after(clock: Clock, away_s: float) -> float:
    """Returns how long after the return of a server the call that is kept up has its answer."""

    async def call() -> str:
        if clock.now < away_s:
            raise ServerUnreachable("nobody listens there")
        return "registered"

    assert await Retry(logs.logger(), None).call(call) == "registered"
    return clock.now - away_s


@given(away_s=st.floats(0.1, 600), draw=st.floats(0, 1))
def test_a_client_is_back_within_half_of_the_absence_and_no_pause_is_over_ten_seconds(
    away_s: float, draw: float
) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        clock = Clock(monkeypatch, draw)
        assert asyncio.run(_back_after(clock, away_s)) <= min(0.5 * away_s + 0.2, TIMING.longest_pause_s)


@given(draw=st.floats(0, 1))
def test_after_a_restart_of_four_seconds_each_client_has_three_attempts_within_ten(draw: float) -> None:
    """The first may find its connection still in gRPC's own pause, which is 5 s at most."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        clock = Clock(monkeypatch, draw)
        asyncio.run(_back_after(clock, 14.0))
        attempts, at = [], 0.0
        for pause in clock.pauses:
            at += pause
            attempts.append(at)
        assert sum(4.0 <= attempt < 14.0 for attempt in attempts) >= 3
        assert len(attempts) < 40


@pytest.mark.parametrize(("permanent", "least_s", "most_s"), [(True, 10.0, 20.0), (False, 80.0, 90.0)])
def test_a_cause_that_somebody_must_mend_is_not_waited_out(
    permanent: bool, least_s: float, most_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch, 0.5)

    async def call() -> None:
        error = ServerUnreachable("its authority was replaced")
        error.permanent = permanent
        raise error

    with pytest.raises(ServerUnreachable):
        asyncio.run(Retry(logs.logger(), 80.0).call(call))
    assert least_s <= clock.now <= most_s
