"""Log lines about calls: bounded for each caller, so that nobody can fill the disk; what is left out is counted."""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Callable

import structlog

from fedpeft.errors import FedpeftError, StoreUnavailable
from fedpeft_server.access import bounds
from fedpeft_server.access.call import CALL, Call, Party
from fedpeft_server.access.pacing import TokenBucket
from fedpeft_server.access.throttle import Throttle
from fedpeft_server.metrics import Metrics
from fedpeft_server.timing import Timing

log = structlog.get_logger()

MOST_NAMED = 5
"""Callers that are named where lines were left out."""


class CallerLog:
    """Writes lines about the current call.

    Args:
        metrics: Counts the lines that are left out.
        timing: Time for which a refusal is not logged again.
        clock: Monotonic seconds.
    """

    def __init__(self, metrics: Metrics, timing: Timing, clock: Callable[[], float] = time.monotonic) -> None:
        self._metrics = metrics
        self._clock = clock
        self._refusals: Throttle[tuple[Party, str, str]] = Throttle(timing.refusal_quiet_s, clock)
        self._faults: Throttle[tuple[str, str]] = Throttle(timing.refusal_quiet_s, clock)
        self._buckets: OrderedDict[Party, TokenBucket] = OrderedDict()
        self._left_out: Counter[str] = Counter()

    def info(self, event: str, **words: object) -> None:
        """Writes a line, unless there are too many of the current caller."""
        if self._may(CALL.get()):
            log.info(event, **words)

    def refused(self, error: FedpeftError) -> None:
        """Writes that the current call was refused, the same of the same caller once in a while.

        A database or store that refuses is no caller's doing, and callers are told no more than that: it is written
        once in a while for all callers together.
        """
        call = CALL.get()
        if error.for_sites:
            before = self._faults.suppressed((call.method, error.reason))
            if before is not None:
                words = {"unsaid_before": before} if before else {}
                say = log.error if isinstance(error, StoreUnavailable) else log.warning
                say("the database or a store refuses", method=call.method, message=error.message, **words)
            return
        again = self._repetition(call, error.reason)
        if again is not None:
            log.info("refused", method=call.method, reason=error.reason, message=error.message, **again)

    def failed(self, error: BaseException) -> None:
        """Writes that the current call failed through a fault of the server, likewise."""
        call = CALL.get()
        again = self._repetition(call, type(error).__name__)
        if again is not None:
            log.error("a call failed with an internal error", method=call.method, exc_info=error, **again)

    def log_suppressed(self) -> None:
        """Writes how many lines were left out since the last time, and about whose calls most."""
        if not self._left_out:
            return
        most = {who: count for who, count in self._left_out.most_common(MOST_NAMED)}
        log.warning("log lines about calls were suppressed", lines=self._left_out.total(), most=most)
        self._left_out.clear()

    def _repetition(self, call: Call, kind: str) -> dict[str, int] | None:
        """Returns what a line says of those like it that were left out; None if it is to be left out itself."""
        before = self._refusals.suppressed((call.party, call.method, kind))
        if before is None:
            self._leave_out(call.party)
            return None
        if not self._may(call):
            return None
        return {"unsaid_before": before} if before else {}

    def _may(self, call: Call) -> bool:
        now = self._clock()
        bucket = self._buckets.pop(call.party, None) or TokenBucket(bounds.LOG_LINES, now)
        self._buckets[call.party] = bucket
        if len(self._buckets) > bounds.MOST_CALLERS:
            self._buckets.popitem(last=False)
        if bucket.wait_s(now):
            self._leave_out(call.party)
            return False
        bucket.take()
        return True

    def _leave_out(self, party: Party) -> None:
        self._metrics.lines_left_out.inc()
        if len(self._left_out) < bounds.MOST_CALLERS or str(party) in self._left_out:
            self._left_out[str(party)] += 1
