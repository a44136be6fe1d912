"""Checking a run from outside: its chain of records, and each round folded again from the updates that were kept.

A server that runs with `--keep-updates` leaves in `DATA_DIR/spool`, for every update, TICKET.DIGEST.update (the payload
as it came) and TICKET.DIGEST.manifest (the `tensor.Manifest` that describes it, serialized). Nothing else is needed:
the strategy's state begins empty and is carried from round to round.
"""

from __future__ import annotations

import hashlib
import math
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from google.protobuf.message import DecodeError

from fedpeft.adapters.payload import Manifest, checked_squared_norm
from fedpeft.errors import BlobCorrupt, InvalidArgument, StateInvalid
from fedpeft.privacy.accounting import BudgetSpent
from fedpeft.privacy.events import Adapted, Event
from fedpeft.privacy.round_privacy import round_privacy_of
from fedpeft.privacy.transforms import transforms_of
from fedpeft.process.mapped_files import mapped, releaser
from fedpeft.rounds.acceptance import check_tensors, norm_of
from fedpeft.rounds.commit import RoundEmptied, RunHeader, Stored, Update, extents, fold_round, roll_back
from fedpeft.rounds.record import Contributed, Excluded, Record, digest, parse, verify_chain
from fedpeft.rounds.screening import Extent, comparable, median
from fedpeft.rpc.wire import manifest_from_proto
from fedpeft.v1 import tensor_pb2


def check_records(
    run: str, version: int, records: Sequence[tuple[str, str]], *, makes_versions: bool = True
) -> list[Record]:
    """Checks what a server says about the committed rounds of a run.

    Args:
        run: Its id.
        version: Its newest adapter version.
        records: The record of each round with the digest (hexadecimal) that goes with it, oldest first.
        makes_versions: False if its versions are those of a parent's server, and of no number of rounds here.

    Returns:
        The records, read.

    Raises:
        BlobCorrupt: With the first record that disagrees, or if there are not `version` of them where rounds make
            versions.
    """
    for number, (text, sha256) in enumerate(records, 1):
        if digest(text) != sha256:
            raise BlobCorrupt(f"round {number}: the record has sha256 {digest(text)}; {sha256} goes with it")
    verify_chain([text for text, _ in records])
    read = [parse(text) for text, _ in records]
    if read and read[0].run != run:
        raise BlobCorrupt(f"round 1: the record is of run {read[0].run}, not {run}")
    for record in read:
        to = record.rolled_back_to
        if to is not None and record.state_sha256 != (read[to - 1].state_sha256 if to else ""):
            raise BlobCorrupt(
                f"round {record.round}: it goes back to version {to}, and not to the state of that version"
            )
    if makes_versions and len(read) != version:
        raise BlobCorrupt(f"{run} has version {version}, and records of {len(read)} rounds")
    return read


def check_rollback(header: RunHeader, record: Record, source: Stored, scratch: Path) -> None:
    """Checks that a version which goes back to an earlier one has its tensors.

    Args:
        header: The run.
        record: Of the round that went back.
        source: The file of the earlier version.
        scratch: A folder.

    Raises:
        BlobCorrupt: If it has others.
    """
    to = record.rolled_back_to or 0
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        found = roll_back(
            header,
            record.round,
            to,
            source,
            record.base_sha256,
            record.state_sha256,
            record.previous_sha256,
            Path(folder),
        ).record
    if found != record.to_json():
        raise BlobCorrupt(f"round {record.round}: {_difference(parse(found), record)}")


class Replay:
    """Folds the rounds of a run again, from the first.

    Args:
        header: The run.
        spool: The folder of the updates that were kept.
        scratch: An empty folder; holds one version and one state at a time, and those states that the run goes back to.
        records: Of all rounds.

    Attributes:
        noised: True if the rounds have noise, which nobody can draw again: then everything is compared but the digests
            of what it made, and the updates must be within the bound that the record says.
    """

    def __init__(self, header: RunHeader, spool: Path, scratch: Path, records: Sequence[Record]) -> None:
        self._wanted = {record.rolled_back_to for record in records if record.rolled_back_to}
        self._kept: dict[int, Stored] = {}
        self._header = header
        self._spool = spool
        self._scratch = scratch
        self._state: Stored | None = None
        self._extents: dict[int, Extent] = {}
        self._ledger: list[Event] = []
        self.noised = round_privacy_of(header.config).central is not None

    def fold(self, record: Record, base: Path) -> None:
        """Folds the next round and compares what comes out with its record, to the bit; up to the noise, if it has any.

        Args:
            record: Of that round; the one before was the last that was folded.
            base: The adapter file that the round started from.

        Raises:
            BlobCorrupt: If an update, its manifest or `base` is not what was folded, or something else came out.
            StateInvalid: If an update is missing or cannot be read.
        """
        if record.rolled_back_to is not None:
            self._state = self._kept.get(record.rolled_back_to)
            self._keep(record)
            return
        folder = self._scratch / f"round-{record.round}"
        folder.mkdir()
        folded = [self._update(record.round, counted) for counted in record.contributions]
        left_out = [self._update(record.round, excluded) for excluded in record.excluded]
        self._extents[record.round] = median(extents(self._header, folded))
        start = Stored(base, record.base_sha256)
        nothing = Extent(0.0, 0.0)  # of a round that went back to an earlier version
        earlier = comparable(self._header.spec, record.round)
        past = [self._extents.get(number, nothing) for number in earlier]
        try:
            found = fold_round(
                self._header,
                record.round,
                folded + left_out,
                start,
                None if self.noised else self._state,
                record.previous_sha256,
                folder,
                past=past,
                screened=bool(left_out),
                ledger=self._ledger,
            ).record
        except RoundEmptied as emptied:
            raise BlobCorrupt(f"round {record.round}: nothing of it can be folded: {emptied}") from None
        except BudgetSpent as error:
            raise BlobCorrupt(f"round {record.round} should not have been published: {error}") from None
        if self.noised:
            found = _up_to_noise(parse(found), record)
            self._check_bound(record)
        if found != record.to_json():
            raise BlobCorrupt(f"round {record.round}: {_difference(parse(found), record)}")
        self._ledger += record.events
        self._state = Stored(folder / "state", record.state_sha256) if record.state_sha256 else None
        self._keep(record)
        shutil.rmtree(self._scratch / f"round-{record.round - 1}", ignore_errors=True)

    def made(self, record: Record) -> Path | None:
        """Returns the adapter file that the round which was folded last made again; None if it made none.

        Nobody can draw noise again, and a round that goes back to an earlier version is not folded.
        """
        if self.noised or record.rolled_back_to is not None:
            return None
        return self._scratch / f"round-{record.round}" / "adapter"

    def _check_bound(self, record: Record) -> None:
        """Checks that a bound which adapts follows from the noised count that is recorded."""
        central = round_privacy_of(self._header.config).central
        adapted = [event for event in record.events if isinstance(event, Adapted)]
        for event in adapted:
            assert central is not None  # else no round folded again has such an event
            wanted = central.next_bound(central.bound(self._ledger), event.unclipped)
            if not math.isclose(event.bound, wanted, rel_tol=1e-12):  # the last bits are the machine's
                raise BlobCorrupt(f"round {record.round}: the next bound is {event.bound!r}; {wanted!r} follows")

    def _keep(self, record: Record) -> None:
        """Keeps the state of a version that the run goes back to later."""
        if record.round in self._wanted and self._state is not None:
            path = self._scratch / f"state-{record.round}"
            shutil.copyfile(self._state.path, path)
            self._kept[record.round] = Stored(path, self._state.sha256)

    def _update(self, number: int, counted: Contributed | Excluded) -> Update:
        """Returns a kept update, checked as it was when it came."""
        path = self._spool / f"{counted.ticket}.{counted.sha256}.update"
        who = f"round {number}: the update of {counted.client}"
        try:
            payload = mapped(path)
            described = path.with_suffix(".manifest").read_bytes()
        except FileNotFoundError as error:
            raise StateInvalid(
                f"{who} cannot be folded again: there is no {error.filename}; "
                "a server keeps updates only while it runs with --keep-updates"
            ) from None
        except OSError as error:
            raise StateInvalid(f"{who} cannot be read from {path}: {error.strerror}") from None
        found = hashlib.sha256(payload).hexdigest()
        if found != counted.sha256:
            raise BlobCorrupt(f"{who} in {path.name} has sha256 {found}; {counted.sha256} was folded")
        try:
            manifest = self._manifest(described, number, counted)
            squared_norm = checked_squared_norm(manifest, payload, releaser(payload))
            norm = norm_of(manifest, squared_norm, counted.examples)
            for transform in transforms_of(self._header.config):
                transform.check(norm)
        except (DecodeError, InvalidArgument) as error:
            raise BlobCorrupt(f"{who} is not what {path.with_suffix('.manifest')} describes: {error}") from None
        stale = counted.staleness if isinstance(counted, Contributed) else 0  # what is not folded has no weight
        return Update(counted.ticket, counted.client, counted.examples, {}, manifest, payload, norm, staleness=stale)

    def _manifest(self, described: bytes, number: int, counted: Contributed | Excluded) -> Manifest:
        config, spec = self._header.config, self._header.spec
        manifest = manifest_from_proto(tensor_pb2.Manifest.FromString(described))
        check_tensors(manifest, number, config, spec)
        if manifest.sha256.hex() != counted.sha256:
            raise BlobCorrupt(f"round {number}: the manifest kept for {counted.client} is of another payload")
        return manifest


def _up_to_noise(found: Record, recorded: Record) -> str:
    """Returns the record of a round folded again, with what its noise alone decides as it was recorded."""
    adapted = [event for event in recorded.events if isinstance(event, Adapted)]
    events = tuple(adapted[0] if adapted and isinstance(event, Adapted) else event for event in found.events)
    adapter, state = recorded.adapter_sha256, recorded.state_sha256
    return replace(found, adapter_sha256=adapter, state_sha256=state, events=events).to_json()


def _difference(found: Record, recorded: Record) -> str:
    """Returns the sentence for the first thing in which a folded round differs from its record."""
    mine, theirs = asdict(found), asdict(recorded)
    order = ("excluded", "bound", "contributions", "strategy", "options", *mine)
    key = next(key for key in order if mine[key] != theirs[key])
    if key == "contributions":
        pairs = zip(found.contributions, recorded.contributions, strict=True)
        ours, other = next(pair for pair in pairs if pair[0] != pair[1])
        return f"the strategy gives the update of {ours.client} weight {ours.weight!r}; {other.weight!r} is recorded"
    return f"folded again, its {key} is {mine[key]!r}; {theirs[key]!r} is recorded"
