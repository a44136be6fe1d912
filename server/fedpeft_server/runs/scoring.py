"""Versions that each evaluator has scored or could not score, and the next one for it: the newest that is missing.

What is known here is the database's, read once for each run and evaluator, and kept as one bit a version: to find the
newest of 10,000 versions that is missing, or to count them, is one operation on a number.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from fedpeft_server.store.rows import FailedEvaluation, RunRow
from fedpeft_server.store.store import Store

SHOWN = 8
"""Most failures of an evaluator that a run shows, the newest versions first."""


@dataclass
class _Book:
    """Of one run and evaluator: the versions that it scored, as bits, and why it could not score others."""

    scored: int = 0
    failed: dict[int, str] = field(default_factory=dict)

    def missing(self, version: int) -> int:
        """Returns the versions up to `version` that it is still to score, as bits."""
        done = self.scored
        for number in self.failed:
            done |= 1 << number
        return ((1 << (version + 1)) - 1) & ~done


@dataclass(frozen=True, slots=True)
class EvaluatorProgress:
    """Progress of an evaluator with a run.

    Attributes:
        evaluator: Its id.
        scored: How many versions it scored.
        missing: How many it is still to score.
        newest: The newest of those; None if there is none.
        failed: Why it could not score others, by version, the newest first; at most SHOWN.
    """

    evaluator: str
    scored: int
    missing: int
    newest: int | None
    failed: tuple[tuple[int, str], ...] = ()


class Scoring:
    """The evaluators' work on all runs.

    Args:
        store: Where it is written.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._books: dict[str, dict[str, _Book]] = defaultdict(dict)
        self._evaluators: dict[str, set[str]] = defaultdict(set)

    def takes_part(self, run: str, evaluator: str) -> None:
        """Notes that an evaluator scores the versions of a run."""
        self._evaluators[run].add(evaluator)

    def leaves(self, run: str, evaluator: str) -> None:
        """Notes that it does not."""
        self._evaluators.get(run, set()).discard(evaluator)

    def dismiss(self, evaluator: str) -> list[str]:
        """Notes that an evaluator scores no run any more: it left, was revoked, or trains; returns those it scored."""
        left = [run for run, evaluators in self._evaluators.items() if evaluator in evaluators]
        for run in left:
            self._evaluators[run].discard(evaluator)
        return left

    async def progress(self, run: RunRow, evaluator: str) -> EvaluatorProgress:
        """Returns how far an evaluator is with a run."""
        book = await self._book(run.id, evaluator)
        missing = book.missing(run.version)
        failed = sorted(book.failed.items(), reverse=True)[:SHOWN]
        return EvaluatorProgress(
            evaluator,
            book.scored.bit_count(),
            missing.bit_count(),
            missing.bit_length() - 1 if missing else None,
            tuple(failed),
        )

    async def progress_of_all(self, run: RunRow) -> list[EvaluatorProgress]:
        """Returns how far each evaluator is that takes part in a run, by id."""
        return [await self.progress(run, evaluator) for evaluator in sorted(self._evaluators.get(run.id, ()))]

    def backlog(self, run: RunRow) -> int | None:
        """Returns how many versions the evaluator that is furthest behind has left: 0 without any, None if unknown."""
        books, evaluators = self._books.get(run.id, {}), self._evaluators.get(run.id, ())
        known = [books[evaluator] for evaluator in evaluators if evaluator in books]
        return max((book.missing(run.version).bit_count() for book in known), default=None if evaluators else 0)

    async def scored(self, run: str, evaluator: str, version: int) -> None:
        """Notes that the figures of a version are in the database."""
        await self._store.transact(self._store.db.forget_failed_evaluations, evaluator, run, version)
        if (
            book := self._books.get(run, {}).get(evaluator)
        ) is not None:  # else it is read, with this, once it is needed
            book.scored |= 1 << version
            book.failed.pop(version, None)

    async def failed(self, failure: FailedEvaluation) -> None:
        """Writes that an evaluator cannot score a version; it gets others, until it registers again."""
        await self._store.transact(self._store.db.put_failed_evaluation, failure)
        if (book := self._books.get(failure.run, {}).get(failure.evaluator)) is not None:
            book.failed[failure.version] = failure.reason

    async def try_again(self, evaluator: str) -> None:
        """Forgets what an evaluator could not score, because it began anew and its site may have changed."""
        await self._store.transact(self._store.db.forget_failed_evaluations, evaluator)
        for books in self._books.values():
            if evaluator in books:
                books[evaluator].failed.clear()

    def forget(self, run: str) -> None:
        """Forgets what is kept of a run that was deleted."""
        self._books.pop(run, None)
        self._evaluators.pop(run, None)

    async def _book(self, run: str, evaluator: str) -> _Book:
        if evaluator not in self._books[run]:
            db = self._store.db
            scored = await self._store.transact(db.evaluated_by, run, evaluator)
            failed = await self._store.transact(db.failed_evaluations, run, evaluator)
            book = _Book(_bits(scored), failed)
            self._books[run].setdefault(evaluator, book)  # another call may have read it meanwhile
        return self._books[run][evaluator]


def _bits(numbers: Iterable[int]) -> int:
    bits = 0
    for number in numbers:
        bits |= 1 << number
    return bits
