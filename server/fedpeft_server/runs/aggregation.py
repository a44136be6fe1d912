"""Folding one round of the daemon: spooled updates and version r - 1 become version r in the blobs.

Runs in a thread and touches nothing but blobs and spool; doing it twice gives the same bytes under the same keys, so a
daemon that died in the middle just does it again.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from fedpeft.adapters import adapter_file
from fedpeft.process.durable import create_eagerly
from fedpeft.rounds.commit import Outcome, RunHeader, Stored, Update, fold_round, roll_back
from fedpeft.rounds.screening import Extent
from fedpeft.rounds.state_machine import Round, TicketState
from fedpeft_server.store.rows import RunRow, UpdateRow, VersionRow
from fedpeft_server.store.store import Store, state_key, version_key


@dataclass(frozen=True, slots=True)
class Result:
    """A folded round: the row of the stored version, and what folding gave."""

    version: VersionRow
    outcome: Outcome


def run_header(run: RunRow) -> RunHeader:
    """Returns what all versions of a run have in common."""
    return RunHeader(run.id, run.config, run.spec, run.backbone_fingerprint)


def aggregate(
    run: RunRow,
    current: Round,
    received: Mapping[str, UpdateRow],
    base: VersionRow,
    previous: str,
    past: Sequence[Extent],
    store: Store,
) -> Result:
    """Folds what a round received and stores the result durably.

    Args:
        run: The run.
        current: Its round, in phase AGGREGATING.
        received: What was received, by ticket.
        base: The row of the version the clients started from.
        previous: Digest of the record before, empty for the first round.
        past: Medians of the comparable rounds before; see `fedpeft.rounds.screening`.
        store: Blobs and spool.

    Raises:
        BlobCorrupt: If the base version is not what was stored.
        RoundEmptied: If no update can be folded.
        DiskFull: If there is no room for the result.
    """
    number = current.number
    with ExitStack() as stack, TemporaryDirectory(dir=store.scratch) as scratch:
        updates = []
        for ticket in current.in_state(TicketState.RECEIVED):
            row = received[ticket.id]
            data = stack.enter_context(store.spool.open(ticket.id))
            updates.append(Update(ticket.id, ticket.client, row.examples, row.metrics, row.manifest, data, row.norm))
        old = Stored(stack.enter_context(store.blobs.local(version_key(run.id, base.version))), base.sha256)
        state = None
        if base.state_sha256:
            path = stack.enter_context(store.blobs.local(state_key(run.id, base.version)))
            state = Stored(path, base.state_sha256)
        outcome = fold_round(
            run_header(run), number, updates, old, state, previous, Path(scratch), create_eagerly, past
        )
        if outcome.state_sha256:
            store.blobs.put(state_key(run.id, number), Path(scratch, "state"))
        store.blobs.put(version_key(run.id, number), Path(scratch, "adapter"))
    adapter = outcome.adapter
    version = VersionRow(run.id, number, adapter.sha256, adapter.size_bytes, outcome.state_sha256, time.time())
    return Result(version, outcome)


def go_back(run: RunRow, number: int, source: VersionRow, base: VersionRow, previous: str, store: Store) -> Result:
    """Makes version `number` of the tensors and the state of an earlier one, and stores it durably.

    Args:
        run: The run.
        number: Number of the round in progress.
        source: The row of the earlier version.
        base: The row of the newest version.
        previous: Digest of its record.
        store: Blobs.

    Raises:
        BlobCorrupt: If the earlier version is not what was stored.
        DiskFull: If there is no room for the result.
    """
    with ExitStack() as stack, TemporaryDirectory(dir=store.scratch) as scratch:
        old = Stored(stack.enter_context(store.blobs.local(version_key(run.id, source.version))), source.sha256)
        parts = (source.version, old, base.sha256, source.state_sha256, previous, Path(scratch), create_eagerly)
        outcome = roll_back(run_header(run), number, *parts)
        if source.state_sha256:
            kept = stack.enter_context(store.blobs.local(state_key(run.id, source.version)))
            stack.enter_context(adapter_file.open_state(kept, source.state_sha256))
            store.blobs.put(state_key(run.id, number), shutil.copyfile(kept, Path(scratch, "state")))
        store.blobs.put(version_key(run.id, number), Path(scratch, "adapter"))
    adapter = outcome.adapter
    version = VersionRow(run.id, number, adapter.sha256, adapter.size_bytes, outcome.state_sha256, time.time())
    return Result(version, outcome)
