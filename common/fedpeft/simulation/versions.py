"""The server half of a simulation: adapter versions, folded one from the other, and the chain of their records.

The newest version and the state of the server lie under their number, beside those of the version before until the
round counts (`progress`, `settle`), so a process that is killed at any instant leaves what the last round that counts
needs (`resume`).
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path

from fedpeft.adapters import adapter_file, payload
from fedpeft.adapters.adapter_file import Written
from fedpeft.adapters.payload import Tensors
from fedpeft.errors import BlobCorrupt
from fedpeft.peft import TunedModel
from fedpeft.privacy.events import Event
from fedpeft.process import durable
from fedpeft.process.mapped_files import mapped
from fedpeft.rounds import record
from fedpeft.rounds.commit import RunHeader, Stored, Update, fold_round, write_version
from fedpeft.rounds.local_job import Version
from fedpeft.rounds.screening import Extent, comparable
from fedpeft.simulation.distances import squared_distances
from fedpeft.simulation.report import Json, RoundBook

ADAPTER, RECORDS = "adapter.safetensors", "records.jsonl"
KEPT = re.compile(r"(adapter|state)-\d+")
"""Names of the files in the folder `kept`."""


class Versions:
    """The newest version of a run, and the records that led there.

    Args:
        header: The run.
        out: Folder of adapter.safetensors and records.jsonl; those there are replaced.
        scratch: Folder for what passes: payloads of a round by ticket.
        kept: Folder for what outlives a process that is killed: version 0, the newest, and the server's state.

    Attributes:
        ledger: Events of all rounds so far, oldest first.
    """

    def __init__(self, header: RunHeader, out: Path, scratch: Path, kept: Path) -> None:
        self._header = header
        self._adapter, self._log = out / ADAPTER, out / RECORDS
        self._scratch, self._kept = scratch, kept
        self._number = 0
        self._newest = Written("", 0)
        self._published: dict[int, Version] = {}
        self._state_sha256 = ""
        self._record_sha256 = ""
        self._extents: dict[int, Extent] = {}
        self.ledger: list[Event] = []

    def begin(self, tensors: Tensors) -> None:
        """Writes version 0."""
        self._log.write_bytes(b"")
        self._newest = write_version(self._header, tensors, self._version(0))
        self._show()

    def progress(self) -> Json:
        """Returns what `resume` needs of the round that was folded last."""
        extent = self._extents[self._number]
        return {
            "adapter": [self._newest.sha256, self._newest.size_bytes],
            "state": self._state_sha256,
            "record": self._record_sha256,
            "extent": [extent.norm, extent.steps],
            "records_bytes": self._log.stat().st_size,
        }

    def sync(self) -> None:
        """Makes the newest version, the server's state and the records durable: only then may `progress` be kept."""
        state = [self._state(self._number)] if self._state_sha256 else []
        for path in (self._version(self._number), *state, self._log, self._kept):
            durable.sync(path)

    def settle(self) -> None:
        """Shows the newest version, which counts, and removes what the one before it needed.

        Not earlier: one that does not count is folded again, and where noise is drawn people would have seen two.
        """
        self._show()
        before = self._number - 1
        if before > 0:
            self._version(before).unlink(missing_ok=True)
        self._state(before).unlink(missing_ok=True)

    def resume(self, progress: Sequence[Json], first: Json) -> None:
        """Goes on after the rounds that count.

        Args:
            progress: Values of `progress` after each of them.
            first: The digest and size of version 0, as `progress` has those of the newest.

        Raises:
            BlobCorrupt: If a file is not what it was.
        """
        self._number = len(progress)
        newest = progress[-1] if progress else {**first, "state": "", "record": "", "records_bytes": 0}
        self._newest = Written(*newest["adapter"])
        self._state_sha256, self._record_sha256 = newest["state"], newest["record"]
        self._extents = {number: Extent(*each["extent"]) for number, each in enumerate(progress, 1)}
        try:
            with self._log.open("r+b") as stream:
                stream.truncate(newest["records_bytes"])
        except FileNotFoundError:
            raise BlobCorrupt(f"there is no {self._log}") from None
        records = self._log.read_text("ascii", "replace").splitlines()
        record.verify_chain(records)
        if records and record.digest(records[-1]) != self._record_sha256:
            raise BlobCorrupt(f"{self._log} does not end with the record that was made last")
        self.ledger = [event for _, event in record.ledger(map(record.parse, records))]
        adapter_file.check_digest(self._version(0), first["adapter"][0])
        adapter_file.check_digest(self._version(self._number), self._newest.sha256)
        if self._state_sha256:
            adapter_file.check_digest(self._state(self._number), self._state_sha256)
        self.settle()

    @property
    def first(self) -> Json:
        """The digest and size of version 0, right after `begin`."""
        return {"adapter": [self._newest.sha256, self._newest.size_bytes]}

    def _version(self, number: int) -> Path:
        return self._kept / f"adapter-{number}"

    def _state(self, number: int) -> Path:
        return self._kept / f"state-{number}"

    def _show(self) -> None:
        """Makes the newest version the file that people find."""
        path, version = self._scratch / "shown", self._version(self._number)
        try:
            os.link(version, path)
        except OSError:  # the file system has no links
            shutil.copyfile(version, path)
        os.replace(path, self._adapter)
        path.unlink(missing_ok=True)  # it is still there if both names were the same file's

    def squared_distances(self, model: TunedModel) -> dict[str, float]:
        """Returns how far the newest version is from version 0, see `fedpeft.simulation.distances`."""
        with (
            adapter_file.open_adapter(self._version(0)) as first,
            adapter_file.open_adapter(self._version(self._number), self._newest.sha256) as last,
        ):
            return squared_distances(model, first, last)

    def publish(self, number: int) -> Version:
        """Writes the newest version, which has this number, as clients receive it: through `codec.down`."""
        path, newest = self._scratch / f"version-{number}", self._version(self._number)
        with adapter_file.open_adapter(newest, self._newest.sha256) as tensors, path.open("wb") as stream:
            manifest = payload.write(stream, tensors, self._header.spec.shared, self._header.config.codec.down)
        self._published[number] = Version(manifest, path)
        return self._published[number]

    def keep_published(self, numbers: AbstractSet[int]) -> None:
        """Removes the published versions that nobody trains from any more."""
        for number in self._published.keys() - numbers:
            self._published.pop(number).payload.unlink()

    def spool(self, ticket: str) -> Path:
        """Returns where the payload of a ticket is kept until it is folded."""
        return self._scratch / ticket

    def fold(self, book: RoundBook, epsilon: float) -> None:
        """Folds the updates of a round into the next version, and leaves its record; notes what came of it.

        Args:
            book: Of the round.
            epsilon: Figure of that name of the committed round before; 0 where it has none.

        Raises:
            RoundEmptied: If none of them can be folded.
        """
        updates = [
            Update(
                t.id,
                t.client,
                a.examples,
                a.metrics,
                a.manifest,
                mapped(self.spool(t.id)),
                a.norm,
                book.round.staleness(t),
            )
            for t, a in book.counted
        ]
        state = Stored(self._state(self._number), self._state_sha256) if self._state_sha256 else None
        base = Stored(self._version(self._number), self._newest.sha256)
        number = book.round.number
        past = [self._extents[earlier] for earlier in comparable(self._header.spec, number)]
        outcome = fold_round(
            self._header,
            number,
            updates,
            base,
            state,
            self._record_sha256,
            self._scratch,
            past=past,
            ledger=self.ledger,
            epsilon=epsilon,
        )
        self._extents[number] = outcome.extent
        os.replace(self._scratch / "state", self._state(number))
        os.replace(self._scratch / "adapter", self._version(number))
        self._number = number
        durable.append(self._log, f"{outcome.record}\n".encode("ascii"))
        self._newest, self._state_sha256 = outcome.made, outcome.state_sha256
        self._record_sha256 = book.record_sha256 = outcome.record_sha256
        book.weights, book.metrics, book.excluded = outcome.weights, outcome.metrics, outcome.excluded
        book.events = outcome.events
        self.ledger += outcome.events

    def forget(self, book: RoundBook) -> None:
        """Removes the payloads of a round."""
        for ticket in book.arrivals:
            self.spool(ticket).unlink(missing_ok=True)
