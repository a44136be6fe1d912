"""Tracking of one run by any number of trackers, none of which can fail or delay it."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self, TypeAlias

import structlog

from fedpeft.tracking.figures import Json, TrackedRun, figures_of, seconds_of, tracked_run
from fedpeft.tracking.tracker import Point, Tracker, tracker_named

END_S = 60.0
"""Longest wait for all trackers together at the end of a run."""

Figures: TypeAlias = tuple[dict[str, float], float]
"""Figures of a round by name, and the time of its commit."""

SILENT_S = 2.0
"""Wait of which nothing is said."""

log = structlog.get_logger(__name__)


class Tracking:
    """The trackers of one run. A context manager: what leaves it without `end` was interrupted or has failed.

    Args:
        trackers: Those; may be none.
        name: Name of the run in them; that of the report if empty.
        run: Its id in them, which no other run has; that of the report if empty.
        unanswered_s: Longest wait of `end` for one that has not taken the run's begin; `END_S` if absent.
    """

    def __init__(
        self, trackers: Iterable[Tracker] = (), *, name: str = "", run: str = "", unanswered_s: float | None = None
    ) -> None:
        self._sinks = [_Sink(each) for each in trackers]
        self._name, self._run = name, run
        self._unanswered_s = unanswered_s
        self._is_open = True

    def begin(self, report: Json, *, simulated: bool = False) -> None:
        """Takes the run, as a report without rounds has it; figures of version 0 are those of round 0.

        Args:
            report: The part of a report before its rounds.
            simulated: True if other simulations have the same id.
        """
        run = tracked_run(report, simulated=simulated)
        run = replace(run, name=self._name or run.name, id=self._run or run.id)
        for sink in self._sinks:
            sink.begin(run)
        self.initial(report)

    def initial(self, report: Json) -> None:
        """Takes the figures of version 0, which may come late."""
        if report["initial_metrics"]:
            self._put(0, report["initial_metrics"], report["created_at"])

    def round(self, row: Json) -> None:
        """Takes a committed round, as a report has it; again, if it has more figures by now."""
        self._put(row["version"], figures_of(row), row["committed_at"])

    def end(self, state: str) -> None:
        """Takes the end of the run, and waits until all is written, for `END_S` at most."""
        if self._is_open:
            self._is_open = False
            for sink in self._sinks:
                sink.end(state)
            now = time.monotonic()
            for sink in self._sinks:
                sink.join(now + (END_S if sink.has_answered else self._unanswered_s or END_S))

    @property
    def missed(self) -> dict[str, int]:
        """Number of rounds that were not written, by tracker; 0 for one that did not answer the end alone."""
        return {sink.name: len(sink.owed) for sink in self._sinks if sink.owed or sink.is_silent}

    @property
    def silent(self) -> frozenset[str]:
        """Trackers that did not answer until `end` gave up waiting."""
        return frozenset(sink.name for sink in self._sinks if sink.is_silent)

    def _put(self, number: int, figures: Json, moment: str | None) -> None:
        for sink in self._sinks:
            sink.put(number, (dict(figures), seconds_of(moment or "")))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end("failed" if isinstance(error, Exception) else "interrupted")


def tracking_to(
    names: Iterable[str], folder: Path, *, name: str = "", run: str = "", unanswered_s: float | None = None
) -> Tracking:
    """Returns the tracking by trackers as `--track` names them; see `Tracking`.

    Raises:
        ConfigInvalid: If there is no such tracker.
        LocalError: If its library is not installed.
    """
    sinks = [tracker_named(each, folder) for each in names]
    return Tracking(sinks, name=name, run=run, unanswered_s=unanswered_s)


class _Sink:
    """A tracker in a thread of its own. What it did not take is offered again with the next round, and at the end.

    Attributes:
        name: The tracker, as people name it.
        owed: Figures by round that are not written: also those that wait while the tracker is in a call.
        is_silent: True once `join` gave up waiting.
    """

    def __init__(self, tracker: Tracker) -> None:
        self.name = tracker.text or type(tracker).extra
        self.owed: dict[int, Figures] = {}
        self.is_silent = False
        self._lock = threading.Lock()  # of `owed`, which both threads change
        self._tracker = tracker
        self._run: TrackedRun | None = None
        self._written: set[Point] | None = None
        self._failures = 0
        self._queue: queue.Queue[str | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, name=f"tracker {self.name}", daemon=True)

    @property
    def has_answered(self) -> bool:
        """True once the tracker has taken the run's begin."""
        return self._written is not None

    def begin(self, run: TrackedRun) -> None:
        """Adds the run; the tracker's thread begins."""
        self._run = run
        self._queue.put(None)
        self._thread.start()

    def put(self, number: int, figures: Figures) -> None:
        """Adds figures of a round."""
        with self._lock:
            self.owed[number] = figures
        self._queue.put(None)

    def end(self, state: str) -> None:
        """Adds the state in which the run ends."""
        self._queue.put(state)

    def join(self, deadline: float) -> None:
        """Waits for the end, which was put; says that it did not come, or what was not written."""
        if self._thread.ident is None:  # a run that never began
            return
        self._thread.join(min(SILENT_S, max(0.0, deadline - time.monotonic())))
        if self._thread.is_alive():
            left_s = max(0.0, deadline - time.monotonic())
            log.info("waiting for tracker", tracker=self.name, rounds=len(self.owed), at_most_s=round(left_s))
            self._thread.join(left_s)
        self.is_silent = self._thread.is_alive()
        if self.is_silent:
            log.warning("tracker does not answer: the run ends without it", tracker=self.name, rounds=len(self.owed))
        elif self.owed:
            log.warning("tracker misses rounds", tracker=self.name, rounds=len(self.owed), failures=self._failures)

    def _work(self) -> None:
        while (state := self._queue.get()) is None:
            if self._queue.empty():
                self._write()
        self._write()
        if self.owed:
            self._write()
        if self._written is not None:
            self._attempt(lambda: self._tracker.end(state))

    def _write(self) -> None:
        """Writes all that is owed. A round that fails keeps none back; after two, the sink is given a rest."""
        assert self._run is not None  # the thread begins with the run
        if self._written is None and not self._attempt(partial(self._begin, self._run)):
            return
        failed = False
        with self._lock:
            owed = sorted(self.owed.items())
        for number, figures in owed:
            if not self._attempt(partial(self._write_round, number, figures)):
                if failed:
                    return
                failed = True
                continue
            failed = False
            with self._lock:
                if self.owed[number] is figures:  # none that came meanwhile
                    del self.owed[number]

    def _begin(self, run: TrackedRun) -> None:
        self._written = self._tracker.begin(run)

    def _write_round(self, number: int, owed: Figures) -> None:
        assert self._written is not None
        key, (figures, at) = self._tracker.key, owed
        new = {name: value for name, value in figures.items() if (number, key(name)) not in self._written}
        if new:
            self._tracker.round(number, new, at)
            self._written.update((number, key(name)) for name in new)

    def _attempt(self, call: Callable[[], None]) -> bool:
        """Returns whether a call of the tracker ended well; says the first that did not."""
        try:
            call()
        except BaseException as error:  # whatever a library raises, SystemExit too: the run goes on
            self._failures += 1
            if self._failures == 1:
                cause = f"{type(error).__name__}: {error}"
                log.warning("tracker failed: the run goes on", tracker=self.name, cause=cause)
            return False
        return True
