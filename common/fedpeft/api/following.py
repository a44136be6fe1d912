"""Following a run: the snapshot that a watch's changes add up to, kept through restarts of the server.

Notable: a watch ends with the run, but the last version is scored after that; where an evaluator is at work, its
figures are waited for.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass, field, replace

from fedpeft.api import views
from fedpeft.api.operator_client import FINISHED, RESPONSE_TIMEOUT_S, Connect, OperatorClient
from fedpeft.api.round_parts import folded
from fedpeft.errors import CertificateExpired, FedpeftError, Unavailable
from fedpeft.v1 import federation_service_pb2, operator_service_pb2, run_pb2

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 15.0
SCORE_PAUSE_S = 0.5
"""Pause between two looks for the last version's figures."""


@dataclass(frozen=True)
class RunSnapshot:
    """A run as it is known now.

    Attributes:
        run: The run.
        rounds: Every round by number, the one in progress included.
        changed: The numbers of the rounds that the newest change brought.
        lost: Cause of a lost connection, in a sentence; empty while there is one.
        waiting: Work that is still awaited once the run is over; empty if nothing.
    """

    run: run_pb2.Run
    rounds: dict[int, run_pb2.Round] = field(default_factory=dict)
    changed: frozenset[int] = frozenset()
    lost: str = ""
    waiting: str = ""

    def fold(self, change: operator_service_pb2.WatchRunResponse) -> RunSnapshot:
        """Returns the snapshot after a change."""
        return replace(self._with(change.rounds), run=change.run, lost="", waiting="")

    def scored(self, run: run_pb2.Run, rounds: Iterable[run_pb2.Round]) -> RunSnapshot:
        """Returns the snapshot after a run and its rounds were asked for; changed are those that now have figures."""
        new = replace(self._with(rounds), run=run, waiting="")
        return replace(new, changed=_scored_versions(new.rounds) - _scored_versions(self.rounds))

    def _with(self, parts: Iterable[run_pb2.Round]) -> RunSnapshot:
        parts = list(parts)
        changed = frozenset(part.number for part in parts)
        return replace(self, rounds=folded(self.rounds, parts), changed=changed)

    def settled(self, *, scored: bool) -> int:
        """Returns the number up to which every round is known and committed, and has figures if they are to come."""
        number, given_up = 0, _given_up_by_all(self.run)
        while (known := self.rounds.get(number + 1)) is not None and known.phase == run_pb2.ROUND_PHASE_COMMITTED:
            if scored and not views.is_scored(known.metrics) and known.number not in given_up:
                break
            number += 1
        return number

    @property
    def is_scored(self) -> bool:
        """True if an evaluator has been at work."""
        return views.is_scored(self.run.initial_metrics) or bool(_scored_versions(self.rounds))

    @property
    def committed(self) -> list[run_pb2.Round]:
        """The rounds whose record is final."""
        return views.committed(self.rounds.values())

    @property
    def current(self) -> run_pb2.Round | None:
        """The round in progress."""
        return views.in_progress(self.run, self.rounds.values())

    @property
    def finished(self) -> bool:
        """True if the run is completed or stopped."""
        return self.run.state in FINISHED


async def follow(connect: Connect, run: str) -> AsyncIterator[RunSnapshot]:
    """Yields the run after every change, and with `lost` set while the server is away, until the run is finished.

    Raises:
        ServerUnreachable: If the server was not there in the first place.
        RunNotFound: If there is no such run.
    """
    async with connect() as server:
        found, _ = await server.run(run)
    snapshot = RunSnapshot(found)
    pause_s = FIRST_PAUSE_S
    while not snapshot.finished or not snapshot.rounds:
        let_in = False
        try:
            async with connect() as server:
                async for change in server.watch(run, snapshot.settled(scored=snapshot.is_scored)):
                    let_in, pause_s = True, FIRST_PAUSE_S
                    snapshot = snapshot.fold(change)
                    yield snapshot
            break
        except CertificateExpired:
            if not let_in:
                raise
            continue  # it ended under way: the identity may have the next one by now
        except Unavailable as error:
            snapshot = replace(snapshot, changed=frozenset(), lost=error.in_short)
            yield snapshot
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
    async for scored in _scored(connect, snapshot):
        yield scored


async def _scored(connect: Connect, snapshot: RunSnapshot) -> AsyncIterator[RunSnapshot]:
    """Yields the snapshot as figures come in until the last version has its own, if somebody was at work on them.

    It ends when no version was scored for `RESPONSE_TIMEOUT_S`, or the server fails: the run is over without them all
    the same, and `waiting` says that they are awaited no longer.
    """
    last, now = snapshot.run.version, asyncio.get_running_loop().time
    try:
        async with connect() as server:
            if not last or not await _evaluator_seen(server, snapshot.run):
                return
            give_up, asked = now() + RESPONSE_TIMEOUT_S, None
            while last not in _scored_versions(snapshot.rounds) and now() < give_up:
                given_up = _given_up(snapshot.run, last)  # or scored since the rounds were read: they are read again
                if not given_up:
                    yield (snapshot := replace(snapshot, changed=frozenset(), waiting=waiting_line(snapshot.run)))
                    await asyncio.sleep(SCORE_PAUSE_S)
                run = (await server.run(snapshot.run.id))[0]
                if run.evaluators == asked and asked and not given_up:  # the rounds have what they had
                    snapshot = replace(snapshot, run=run)
                    continue
                snapshot, asked = replace(snapshot, run=run), run.evaluators
                rounds = await server.rounds(run.id, snapshot.settled(scored=True), records=False)
                # The run again, and last, so that it has what was scored before: figures of version 0 stand there.
                seen = snapshot.scored((await server.run(run.id))[0], rounds)
                if seen.changed:
                    give_up = now() + RESPONSE_TIMEOUT_S
                    yield (snapshot := seen)
                elif given_up:
                    return
                else:
                    snapshot = replace(snapshot, run=seen.run)
            if last in _scored_versions(snapshot.rounds):
                return
            why = f"none came for {RESPONSE_TIMEOUT_S:g} s"
    except FedpeftError as error:
        why = error.message
    yield replace(snapshot, changed=frozenset(), waiting=f"figures of version {last} are awaited no longer: {why}")


def waiting_line(run: run_pb2.Run) -> str:
    """Returns what a watch of a finished run still waits for."""
    how_far = "; ".join(views.evaluator_line(row) for row in views.evaluators(run) if row["backlog"])
    return f"waiting for the evaluator's figures of version {run.version}" + (f" ({how_far})" if how_far else "")


def _given_up(run: run_pb2.Run, version: int) -> bool:
    """Returns True if no evaluator is left that could still score a version: each has, or reported that it cannot."""
    return bool(run.evaluators) and not any(each.backlog and each.next_version >= version for each in run.evaluators)


def _given_up_by_all(run: run_pb2.Run) -> frozenset[int]:
    """Returns versions that every evaluator reported that it cannot score."""
    failed = [frozenset(version.version for version in each.failed) for each in run.evaluators]
    return frozenset.intersection(*failed) if failed else frozenset()


def _scored_versions(rounds: Mapping[int, run_pb2.Round]) -> frozenset[int]:
    return frozenset(number for number, round_ in rounds.items() if views.is_scored(round_.metrics))


async def _evaluator_seen(server: OperatorClient, run: run_pb2.Run) -> bool:
    """Returns True if an evaluator has called since the run was created; one that computes right now looks as if away.

    A server that is older than `Run.evaluators` is asked for its clients.
    """
    if run.evaluators:
        return True
    return any(
        client.role == federation_service_pb2.CLIENT_ROLE_EVALUATOR
        and client.last_seen.ToNanoseconds() >= run.created_at.ToNanoseconds()
        for client in await server.clients()
    )
