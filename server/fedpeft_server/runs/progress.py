"""Progress of a client with an open ticket, and whether it hangs. Pure; times are seconds on a monotonic clock.

Two kinds of hanging are told apart: a client of which nothing is heard (its process is frozen, its machine or line is
gone), and one that calls while its training stands still. A step that is honestly long is no hang: each client is
measured by the time that its own steps take, in this ticket and in its last rounds. The agent of an edge waits for
other clients, whose own server says which of them hang; it is measured by its calls alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from statistics import median
from typing import NamedTuple

from fedpeft.formatting import counted
from fedpeft_server.timing import Timing


class State(StrEnum):
    """State of a client that holds an open ticket."""

    TRAINING = "training"
    UPLOADING = "uploading"
    SLOW = "slow"
    STALLED = "stalled"
    SILENT = "silent"

    @property
    def hangs(self) -> bool:
        """True if nothing moves."""
        return self in (State.STALLED, State.SILENT)

    @property
    def is_well(self) -> bool:
        """True if it moves as usual."""
        return self in (State.TRAINING, State.UPLOADING)


@dataclass(frozen=True, slots=True)
class Past:
    """Durations of the last rounds of a client.

    Attributes:
        round_s: From the opening of a round to the receipt, a number for each.
        step_s: A step of its training, likewise, where the update said.
    """

    round_s: Sequence[float] = ()
    step_s: Sequence[float] = ()

    @property
    def usual_s(self) -> float | None:
        """Usual duration of a round, seconds; None where there are too few to say."""
        return median(self.round_s) if len(self.round_s) >= LEAST_ROUNDS else None


LEAST_ROUNDS = 2
"""Rounds that make a habit."""
NO_PAST = Past()
_ORDER = (State.SILENT, State.STALLED, State.SLOW, State.UPLOADING, State.TRAINING)


@dataclass(frozen=True, slots=True)
class Refusal:
    """Refusal of a transfer that the client will try again: a full disk, say.

    Attributes:
        transfer: `UPLOADING`, or `TRAINING` for the download before it.
        cause: The server's sentence.
        at: Time of the refusal.
    """

    transfer: State
    cause: str
    at: float

    def words(self, now: float) -> str:
        """Returns it for people."""
        verb = "upload" if self.transfer is State.UPLOADING else "download"
        return f"waits to {verb}, refused {_span(now - self.at)} ago: {self.cause}"


class Report(NamedTuple):
    """A report of a client on its progress.

    Attributes:
        step: Steps done.
        steps: Steps in all; 0 if the client has not said.
        updates: Updates that the agent of an edge has collected.
        wanted: Those that it wants; 0 for a client that trains itself.
    """

    step: int = 0
    steps: int = 0
    updates: int = 0
    wanted: int = 0

    @property
    def words(self) -> str:
        """The same for people; empty if nothing was said."""
        if self.wanted:
            return f"{self.updates:,} of {counted(self.wanted, 'update')}"
        return f"step {self.step:,} of {self.steps:,}" if self.steps else ""


NO_REPORT = Report()


@dataclass(frozen=True, slots=True)
class Progress:
    """Progress of a client with a ticket.

    Attributes:
        issued: Time at which it was given out.
        report: The last report.
        began: Time at which the client first said how many steps there are.
        moved: Time at which a report last said something else; before that, at which there was something to be done.
        refusal: The last transfer, if it was refused for now.
    """

    issued: float
    report: Report = NO_REPORT
    began: float = 0.0
    moved: float = 0.0
    refusal: Refusal | None = None

    @classmethod
    def at(cls, now: float) -> Progress:
        """Returns that of a ticket that is given out now."""
        return cls(now, began=now, moved=now)

    def reported(self, report: Report, now: float) -> Progress:
        """Returns the progress after the client said how far it is; a training that was begun anew may be less far."""
        before = self.report
        if not report.steps or report == before:
            return self
        began = self.began if before.steps == report.steps and report.step > before.step else now
        return replace(self, report=report, began=began, moved=now, refusal=None)

    def step_s(self, past: Past) -> float:
        """Returns how long a step takes this client, by this ticket or by its last rounds; 0 if nobody knows."""
        here = (self.moved - self.began) / self.report.step if self.report.step else 0.0
        return max(here, median(past.step_s) if past.step_s else 0.0)


@dataclass(frozen=True, slots=True)
class Verdict:
    """Judgement of a client's progress at a moment.

    Attributes:
        state: Its state.
        words: The same for people, with its figures.
        seconds: Since the ticket was given out.
        heard_s: Since anything was heard of the client.
        moved_s: Since the step moved.
        usual_s: Usual duration of its rounds; None if that is not known.
        refused: Reason for which the server refuses its transfers for now; empty if it does not.
    """

    state: State
    words: str
    seconds: float
    heard_s: float
    moved_s: float
    usual_s: float | None
    refused: str = ""

    @property
    def is_well(self) -> bool:
        """True if there is nothing to report about the client."""
        return self.state.is_well and not self.refused

    @property
    def rank(self) -> int:
        """Place in a list of clients, those first that need a look most."""
        return _ORDER.index(State.SLOW if self.refused and self.state.is_well else self.state)


def judge(
    progress: Progress,
    now: float,
    *,
    heard: float,
    uploading: bool = False,
    past: Past = NO_PAST,
    timing: Timing,
) -> Verdict:
    """Returns what is to be said of a client that holds an open ticket.

    Args:
        progress: Its progress.
        now: The moment.
        heard: Time of its last word; earlier than the ticket if nothing was heard since.
        uploading: True while its update is arriving.
        past: Durations of its last rounds.
        timing: Bounds after which it is said to hang.
    """
    seconds, moved_s = now - progress.issued, now - progress.moved
    heard_s, usual_s = now - max(heard, progress.issued), past.usual_s
    report, at = progress.report, progress.report.words
    patience_s = max(timing.stalled_s, timing.steps_missed * progress.step_s(past))
    refusal = None if uploading else progress.refusal
    late = usual_s is not None and seconds > max(timing.slow_factor * usual_s, usual_s + timing.slow_least_s)
    if heard_s >= timing.silent_s:
        state, words = State.SILENT, f"no word for {_span(heard_s)}" + (f", last at {at}" if at else "")
    elif refusal is not None:
        state, words = refusal.transfer, refusal.words(now)
    elif report.steps and not report.wanted and not uploading and moved_s >= patience_s:
        state, words = State.STALLED, f"{at} for {_span(moved_s)}"
    elif late and usual_s is not None:
        doing = "uploading" if uploading else at
        state = State.SLOW
        words = f"slower than usual: {_span(seconds)}, usually {_span(usual_s)}" + (f", {doing}" if doing else "")
    elif uploading:
        state, words = State.UPLOADING, f"uploading, {_span(heard_s)} ago"
    elif report.wanted:  # it waits for others, as long as they take
        state, words = State.TRAINING, f"training, {at}, last word {_span(heard_s)} ago"
    elif at:
        state, words = State.TRAINING, f"training, {at}, {_span(moved_s)} ago"
    else:
        state, words = State.TRAINING, f"training, last word {_span(heard_s)} ago"
    return Verdict(state, words, seconds, heard_s, moved_s, usual_s, refusal.cause if refusal else "")


def _span(seconds: float) -> str:
    """Returns a time as people say it: `65 s`, `12 min`, `3 h`."""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 3 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"
