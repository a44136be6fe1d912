"""Versions that each evaluator has scored or could not score, and the next one for it: the newest that is missing.

What is known here of an evaluator is the database's, read once, and kept as one bit a version: to find the newest of
10,000 versions that is missing, or to count them, is one operation on a number. The runs of which something is missing
are kept as versions are made and scored, so a poll looks at no run that has nothing for it.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from fedpeft.rounds.policies import policy_of
from fedpeft_server.store.database import Database
from fedpeft_server.store.rows import FailedEvaluation, RunRow
from fedpeft_server.store.store import Store
from fedpeft_server.tasks import ended

SHOWN = 8
"""Most failures of an evaluator that a run shows, the newest versions first."""


@dataclass
class _Book:
    """Of one run and evaluator: the versions that it scored, as bits, and why it could not score others."""

    scored: int = 0
    failed: dict[int, str] = field(default_factory=dict)

    def missing(self, version: int, removed: int = 0) -> int:
        """Returns the versions up to `version` that it is still to score, as bits; `removed` are not there."""
        done = self.scored | removed
        for number in self.failed:
            done |= 1 << number
        return ((1 << (version + 1)) - 1) & ~done


@dataclass
class _Work:
    """Work of one evaluator.

    Attributes:
        books: Versions that it scored and could not score, by run; of the others it scored nothing.
        missing: The newest version that it is still to score, by run; runs that lack none have no entry.
        aside: Runs that it declined, and that `missing` leaves out for that.
    """

    books: dict[str, _Book]
    missing: dict[str, int] = field(default_factory=dict)
    aside: set[str] = field(default_factory=set)

    def look(self, run: str, version: int, removed: int) -> None:
        """Finds anew what is missing of a run whose newest version is given, and those that are not there."""
        missing = self.books.get(run, _Book()).missing(version, removed)
        self.aside.discard(run)
        self.missing.pop(run, None)
        if missing:
            self.missing[run] = missing.bit_length() - 1

    def forget(self, run: str) -> None:
        """Forgets a run."""
        self.books.pop(run, None)
        self.missing.pop(run, None)
        self.aside.discard(run)


@dataclass(frozen=True, slots=True)
class EvaluatorProgress:
    """Progress of an evaluator with a run.

    Attributes:
        evaluator: Its id.
        scored: Number of versions that it scored.
        missing: Number of versions that it is still to score.
        newest: The newest of those; None if there is none.
        failed: Reasons for which it could not score others, by version, the newest first; at most SHOWN.
    """

    evaluator: str
    scored: int
    missing: int
    newest: int | None
    failed: tuple[tuple[int, str], ...] = ()


class Scoring:
    """The evaluators' work on all runs.

    Args:
        store: Store in which it is written.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._versions: dict[str, int] = {}  # the newest, by run
        self._removed: dict[str, int] = defaultdict(int)  # versions without files, as bits, by run
        self._work: dict[str, _Work] = {}  # by evaluator
        self._reading: dict[str, asyncio.Task[_Work]] = {}  # by evaluator whose work is being read
        self._outdated: set[str] = set()  # those of which another daemon has news meanwhile
        self._evaluators: dict[str, set[str]] = defaultdict(set)

    def follow(self, run: RunRow) -> None:
        """Notes the newest version of a run, which is new, or may have made one.

        What an edge relays is scored where it is made, at the parent's server.
        """
        makes_versions = policy_of(run.config.rounds).makes_versions
        if self._versions.get(run.id) == run.version or not makes_versions:
            return
        self._versions[run.id] = run.version
        for work in self._work.values():
            work.look(run.id, run.version, self._removed[run.id])

    def takes_part(self, run: str, evaluator: str) -> None:
        """Notes that an evaluator scores the versions of a run."""
        self._evaluators[run].add(evaluator)
        self._look(run, evaluator)

    def leaves(self, run: str, evaluator: str) -> None:
        """Notes that it does not: `missing` leaves the run out until there is a new version, or it is asked again."""
        self._evaluators.get(run, set()).discard(evaluator)
        work = self._work.get(evaluator)
        if work is not None and work.missing.pop(run, None) is not None:
            work.aside.add(run)

    def dismiss(self, evaluator: str) -> list[str]:
        """Notes that an evaluator scores no run any more: it left, was revoked, or trains; returns those it scored."""
        left = self.runs_of(evaluator)
        for run in left:
            self._evaluators[run].discard(evaluator)
        self._work.pop(evaluator, None)
        return left

    async def missing(self, evaluator: str) -> Mapping[str, int]:
        """Returns the newest version that an evaluator is still to score of each run that has one; not a copy.

        Runs that it declined may be among them; `leaves` takes them out.
        """
        return (await self._known(evaluator)).missing

    async def progress_of_all(self, run: RunRow) -> list[EvaluatorProgress]:
        """Returns how far each evaluator is that takes part in a run, by id."""
        return [await self._progress(run, evaluator) for evaluator in sorted(self._evaluators.get(run.id, ()))]

    async def _progress(self, run: RunRow, evaluator: str) -> EvaluatorProgress:
        book = (await self._known(evaluator)).books.get(run.id, _Book())
        missing = book.missing(run.version, self._removed[run.id])
        failed = sorted(book.failed.items(), reverse=True)[:SHOWN]
        return EvaluatorProgress(
            evaluator,
            book.scored.bit_count(),
            missing.bit_count(),
            missing.bit_length() - 1 if missing else None,
            tuple(failed),
        )

    def backlog(self, run: RunRow) -> int | None:
        """Returns how many versions the evaluator that is furthest behind has left: 0 without any, None if unknown."""
        evaluators = self._evaluators.get(run.id, ())
        known = [
            self._work[evaluator].books.get(run.id, _Book()) for evaluator in evaluators if evaluator in self._work
        ]
        removed = self._removed[run.id]
        counts = (book.missing(run.version, removed).bit_count() for book in known)
        return max(counts, default=None if evaluators else 0)

    async def scored(self, run: str, evaluator: str, version: int) -> None:
        """Notes that the figures of a version are in the database."""
        await self._store.transact(self._store.db.forget_failed_evaluations, evaluator, run, version)
        work = await self._known(evaluator)
        if run in self._versions:
            book = work.books.setdefault(run, _Book())
            book.scored |= 1 << version
            book.failed.pop(version, None)
            self._look(run, evaluator)

    async def failed(self, failure: FailedEvaluation) -> None:
        """Writes that an evaluator cannot score a version; it gets others, until it registers again."""
        await self._store.transact(self._store.db.put_failed_evaluation, failure)
        work = await self._known(failure.evaluator)
        if failure.run in self._versions:
            work.books.setdefault(failure.run, _Book()).failed[failure.version] = failure.reason
            self._look(failure.run, failure.evaluator)

    async def try_again(self, evaluator: str) -> None:
        """Forgets what an evaluator could not score, because it began anew and its site may have changed.

        It is asked again for what it declined, too.
        """
        await self._store.transact(self._store.db.forget_failed_evaluations, evaluator)
        work = await self._known(evaluator)
        changed = {run for run, book in work.books.items() if book.failed} | work.aside
        for run in changed:
            if run in work.books:
                work.books[run].failed.clear()
            self._look(run, evaluator)

    def note_scored(self, run: str, evaluator: str, version: int) -> None:
        """Notes that another daemon has written the figures of a version."""
        work = self._work.get(evaluator)
        if work is None or run not in self._versions:
            self.reread(evaluator)
            return
        book = work.books.setdefault(run, _Book())
        book.scored |= 1 << version
        book.failed.pop(version, None)
        self._look(run, evaluator)

    def note_removed(self, run: str, versions: Iterable[int]) -> None:
        """Notes that versions are not there any more, and need not be scored."""
        if run in self._versions:
            self._removed[run] |= _bits(versions)
            for evaluator in list(self._work):
                self._look(run, evaluator)

    def reread(self, evaluator: str) -> None:
        """Has the work of an evaluator read again before it is used."""
        self._work.pop(evaluator, None)
        if evaluator in self._reading:
            self._outdated.add(evaluator)

    def reread_all(self) -> None:
        """Has the work of all evaluators read again."""
        for evaluator in {*self._work, *self._reading}:
            self.reread(evaluator)

    def runs_of(self, evaluator: str) -> list[str]:
        """Returns the runs that an evaluator scores."""
        return [run for run, evaluators in self._evaluators.items() if evaluator in evaluators]

    def forget(self, run: str) -> None:
        """Forgets what is kept of a run that was deleted."""
        self._versions.pop(run, None)
        self._evaluators.pop(run, None)
        self._removed.pop(run, None)
        for work in self._work.values():
            work.forget(run)

    def _look(self, run: str, evaluator: str) -> None:
        """Finds anew what is missing of a run for an evaluator, if its work is known."""
        work, version = self._work.get(evaluator), self._versions.get(run)
        if work is not None and version is not None:
            work.look(run, version, self._removed[run])

    async def _known(self, evaluator: str) -> _Work:
        """Returns the work of an evaluator. Calls that come while it is read wait for the same reading.

        So what they then note of a version is kept, whether it was in the database by that reading or not.
        """
        if (known := self._work.get(evaluator)) is not None:
            return known
        if evaluator not in self._reading:
            self._reading[evaluator] = asyncio.create_task(self._read(evaluator))
        return await ended(self._reading[evaluator])

    async def _read(self, evaluator: str) -> _Work:
        try:
            books, removed = await self._store.read(_books, self._store.db, evaluator)
            work = _Work(books)
            for run, bits in removed.items():
                if run in self._versions:
                    self._removed[run] |= bits
            for run in work.books.keys() - self._versions:  # deleted meanwhile
                work.forget(run)
            for run, version in self._versions.items():
                work.look(run, version, self._removed[run])
            if evaluator not in self._outdated:
                self._work[evaluator] = work
            return work
        finally:
            self._outdated.discard(evaluator)
            del self._reading[evaluator]


def _books(db: Database, evaluator: str) -> tuple[dict[str, _Book], dict[str, int]]:
    """Reads what an evaluator scored and could not score, by run, and the versions that are not there, as bits."""
    scored, failed = db.evaluations_by(evaluator)
    books: dict[str, _Book] = defaultdict(_Book)
    versions: dict[str, list[int]] = defaultdict(list)
    for run, version in scored:
        versions[run].append(version)
    for run, numbers in versions.items():
        books[run].scored = _bits(numbers)
    for run, version, reason in failed:
        books[run].failed[version] = reason
    removed: dict[str, list[int]] = defaultdict(list)
    for run, version in db.retention.all_removed():
        removed[run].append(version)
    return dict(books), {run: _bits(numbers) for run, numbers in removed.items()}


def _bits(numbers: Iterable[int]) -> int:
    bits = 0
    for number in numbers:
        bits |= 1 << number
    return bits
