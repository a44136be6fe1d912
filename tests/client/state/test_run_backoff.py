"""Runs that fail are left out for a while, and tried again."""

from __future__ import annotations

from fedpeft_client.owner import run_series
from fedpeft_client.owner.metrics import Metrics
from fedpeft_client.state import run_backoff
from fedpeft_client.state.run_backoff import FAILURES, MAX_HELD, RunBackoff
from fedpeft_client.timing import TIMING
from fedpeft_client.uplink import attempts
from fedpeft_client.uplink.attempts import Attempts


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_run_is_left_out_after_some_failures_in_a_row_and_longer_each_time() -> None:
    clock = Clock()
    backoff = RunBackoff(clock)
    assert [backoff.failed("run-a") for _ in range(FAILURES)] == [0.0] * (FAILURES - 1) + [TIMING.first_hold_s]
    assert backoff.held() == ["run-a"]
    clock.now += TIMING.first_hold_s
    assert backoff.held() == [], "it is tried again"
    assert backoff.failed("run-a") == 2 * TIMING.first_hold_s, "once is enough now"
    for _ in range(10):
        assert backoff.failed("run-a") <= TIMING.longest_hold_s
    clock.now += TIMING.longest_hold_s
    backoff.succeeded("run-a")
    assert backoff.failed("run-a") == 0.0


def test_a_failure_that_is_sure_to_repeat_leaves_its_run_out_at_once_and_no_other() -> None:
    backoff = RunBackoff(Clock())
    assert backoff.failed("run-a", surely=True) == TIMING.first_hold_s
    assert backoff.failed("run-b") == 0.0
    assert backoff.held() == ["run-a"]


def test_no_more_runs_are_left_out_than_a_call_takes() -> None:
    backoff = RunBackoff(Clock())
    for number in range(MAX_HELD + 5):
        backoff.failed(f"run-{number}", surely=True)
    assert len(backoff.held()) == MAX_HELD


def test_invented_runs_do_not_grow_the_client_and_those_used_last_are_kept() -> None:
    """A server that names a new run with every ticket made each of these grow for as long as the client ran."""
    held, failed, metrics = RunBackoff(Clock()), Attempts[tuple[str, int]](), Metrics()

    def fails(run: str) -> tuple[float, int]:
        metrics.tickets_given_up.labels(run, "TRAINING_FAILED").inc()
        metrics.left_out.labels(run).inc()
        return held.failed(run), failed.failed((run, 1))

    most = max(run_backoff.MOST, attempts.MOST, run_series.MOST)
    fails("run-mine")
    for number in range(3 * most):
        fails(f"run-{number}")
        if number % 100 == 99:
            last = fails("run-mine")
    assert last[0] and last[1] == 3 * most // 100 + 1, "what is used is not forgotten"
    assert len(held._records) == run_backoff.MOST and len(failed) == attempts.MOST
    samples = [sample for metric in metrics.registry.collect() for sample in metric.samples]
    runs = {sample.labels["run"] for sample in samples if "run" in sample.labels}
    assert len(runs) == run_series.MOST and "run-mine" in runs
    value = metrics.registry.get_sample_value
    assert value("fedpeft_client_runs_left_out_total", {"run": "run-mine"}) == last[1]
