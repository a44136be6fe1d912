"""Retention: which adapter versions of a run keep their files. Every method is one transaction, as in `Database`.

A version is decided on once, as it leaves the newest ones; those that are held for a reason that passes, as the best or
as the base of a ticket, are decided on again with each version that is made. So a step costs the same however many
versions a run has had. Rows and records stay; only files go.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import Connection

from fedpeft.errors import VersionRemoved
from fedpeft_server.store.evaluations import merged
from fedpeft_server.store.notices.notices import Topic
from fedpeft_server.store.queries import retention as queries
from fedpeft_server.store.queries.runs import select_evaluations, select_version
from fedpeft_server.store.rows import AuditEvent, FileState, VersionRow
from fedpeft_server.store.transactions import Transactions

BATCH = 256
"""Most versions that one step decides on, or removes."""

Score = tuple[int, float]
"""The figure that a version is judged by, the higher the better: accuracy, else the loss with its sign changed."""


@dataclass(frozen=True, slots=True)
class RetentionPolicy:
    """Versions of each run whose files are kept, beside version 0, the best scored one and what tickets start from.

    Attributes:
        newest: Number of the newest ones.
        every: Every version that this divides; 0: none.
    """

    newest: int
    every: int = 0

    def decide(
        self, candidates: Collection[int], scores: Mapping[int, Score], pinned: Collection[int]
    ) -> dict[int, FileState]:
        """Returns the states of versions that are not among the newest.

        Args:
            candidates: The versions; the best of those decided on before is among them.
            scores: Of those that were scored.
            pinned: Versions that tickets start from.
        """
        scored = [version for version in candidates if version in scores]
        best = max(scored, key=lambda version: (scores[version], -version), default=None)
        return {version: self._state(version, held=version == best or version in pinned) for version in candidates}

    def _state(self, version: int, *, held: bool) -> FileState:
        if held:
            return FileState.HELD
        return FileState.KEPT if self.every and version % self.every == 0 else FileState.REMOVING


@dataclass(frozen=True, slots=True)
class Step:
    """Result of a step of a run's retention.

    Attributes:
        removing: Versions whose files are to be removed from now on.
        more: True if more versions wait for a decision.
    """

    removing: tuple[int, ...] = ()
    more: bool = False


class VersionRetention:
    """The part of the database that says which versions have files."""

    def __init__(self, transactions: Transactions) -> None:
        self._transactions = transactions

    def decide(self, run: str, policy: RetentionPolicy, by: str) -> Step:
        """Decides on versions that are no longer among the newest; nothing where there is no such run.

        Args:
            run: The run.
            policy: Of this server.
            by: Actor of the entry in the audit log.
        """
        with self._transactions.begin() as connection:
            standing = queries.select_standing(connection, run)
            if standing is None:
                return Step()
            newest, first = standing
            end = newest - policy.newest + 1
            until = max(first, min(end, first + BATCH))
            known = {row.version: FileState.HELD for row in queries.select_in(connection, run, FileState.HELD)}
            known |= dict.fromkeys(queries.select_between(connection, run, first, until), FileState.KEPT)
            if not known and until == first:
                return Step()
            pinned = queries.select_bases(connection, run, newest + 1)
            states = policy.decide(known, _scores(connection, run, known), pinned)
            queries.put_states(connection, run, {v: state for v, state in states.items() if state is not known[v]})
            if until > first:
                queries.put_standing(connection, run, until)
            removing = tuple(sorted(v for v, state in states.items() if state is FileState.REMOVING))
            self._tell(connection, run, removing, by)
            return Step(removing, until < end)

    def _tell(self, connection: Connection, run: str, removing: Sequence[int], by: str) -> None:
        if removing:
            details = {"versions": ", ".join(map(str, removing))}
            self._transactions.append(connection, AuditEvent(by, "versions.removed", run, details))
            self._transactions.notices.tell(connection, Topic.REMOVED, [(run, version) for version in removing])

    def removing(self, run: str) -> list[VersionRow]:
        """Returns versions whose files are to be removed, at most `BATCH`."""
        with self._transactions.read() as connection:
            return queries.select_in(connection, run, FileState.REMOVING, BATCH)

    def removed(self, run: str, versions: Sequence[int]) -> None:
        """Writes that the files of versions are removed."""
        with self._transactions.begin() as connection:
            queries.put_states(connection, run, dict.fromkeys(versions, FileState.REMOVED))

    def runs_removing(self) -> list[str]:
        """Returns the runs that have versions whose files are to be removed."""
        with self._transactions.read() as connection:
            return queries.select_runs_in(connection, FileState.REMOVING)

    def all_removed(self) -> list[tuple[str, int]]:
        """Returns run and number of all versions whose files are removed, or about to be."""
        with self._transactions.read() as connection:
            return queries.select_removed(connection)

    def version(self, run: str, version: int) -> VersionRow:
        """Returns a version whose files are there.

        Raises:
            RunNotFound: If there is no such run.
            VersionNotFound: If the run has no such version.
            VersionRemoved: If its files are removed, or about to be; it says which are there.
        """
        with self._transactions.read() as connection:
            row = select_version(connection, run, version)
            if row.has_files:
                return row
            first = queries.select_retained_from(connection, run)
            near = [number for number in queries.select_nearest(connection, run, version) if number < first]
        said = f"version {version} of {run} was removed by the server's retention; "
        if near:  # an edge's run has no version 0
            nearest = " and ".join(f"version {number}" for number in near)
            said += f"nearest to it {'is' if len(near) == 1 else 'are'} {nearest}, and "
        raise VersionRemoved(f"{said}all from version {first} on are there")


def _scores(connection: Connection, run: str, versions: Collection[int]) -> dict[int, Score]:
    """Returns the scores of versions that have some; of a range, and a few apart from it."""
    found: dict[int, Score] = {}
    for first, last in _ranges(sorted(versions)):
        for version, latest in select_evaluations(connection, run, first, last).items():
            if score := _score(merged(latest)):
                found[version] = score
    return found


def _ranges(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Returns sorted numbers as ranges, both ends included."""
    ranges: list[tuple[int, int]] = []
    for number in numbers:
        if ranges and ranges[-1][1] == number - 1:
            ranges[-1] = ranges[-1][0], number
        else:
            ranges.append((number, number))
    return ranges


def _score(figures: Mapping[str, float]) -> Score | None:
    if "accuracy" in figures:
        return 1, figures["accuracy"]
    return (0, -figures["loss"]) if "loss" in figures else None
