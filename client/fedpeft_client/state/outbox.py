"""The update that was trained and that the server has not answered for; it survives a kill at any instant.

The worker writes the files into a draft folder; one rename to `pending` commits them. Once the server has answered, one
rename to `settled-OUTCOME` commits the decision, the client's state for that outcome is renamed into the run's folder,
and the rest is removed. A crash between any two steps is finished by `finish` at the next start: a file that is no
longer in the settled folder has already been moved, so nothing is lost and nothing is counted twice.

A counted update may still be excluded when its round closes, and the server may find that its disk lost it. So its
ticket, its payload, and the state for the case that it does not count stay in the run's folder (`counted.json`,
`counted.payload`, `counted.safetensors` of the residual, `counted-GROUP.safetensors` of another group) until the next
ticket of the run; `excluded` there names the ticket of an excluded update that was the last one. Where the server gives
the same ticket out again, `recall` makes all of it the pending update once more.

update.payload                the encoded tensors
ticket.json                   the run, the round, the policy, the header of the upload
GROUP.safetensors             a group of the client's state (fedpeft.rounds.local_job), the same in either outcome
GROUP_if_counted.safetensors  one that holds if the server counts the update
GROUP_if_not.safetensors      the same group if it does not

set-aside/RUN-ROUND-TICKET/   updates that the server could not take; the oldest go where there are more than KEPT_ASIDE
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from google.protobuf import json_format

from fedpeft import ids
from fedpeft.adapters.payload import Manifest, Tensors
from fedpeft.errors import FedpeftError, StateInvalid
from fedpeft.process import durable, logs
from fedpeft.rounds.groups import RESIDUAL, SENT
from fedpeft.rounds.local_job import LocalUpdate
from fedpeft.rpc import wire
from fedpeft.v1 import federation_service_pb2 as pb
from fedpeft_client.state import state_dir
from fedpeft_client.state.state_dir import ASIDE, BOX, DRAFT

PAYLOAD = "update.payload"
_SUFFIX, _IF_COUNTED, _IF_NOT = ".safetensors", "_if_counted", "_if_not"
_RECORD = "ticket.json"
_COUNTED, _COUNTED_PAYLOAD, _EXCLUDED = "counted.json", "counted.payload", "excluded"
KEPT_ASIDE = 8
"""Updates that are kept aside: each is as large as any other, and nobody may be there to look at them."""

_log = logs.logger()


class Outcome(StrEnum):
    """Outcome of an update."""

    COUNTED = "counted"
    """The server has it: the residual is what the encoding left out."""
    NOT_COUNTED = "not-counted"
    """It came too late or was not wanted: all of it goes into the residual."""
    SET_ASIDE = "set-aside"
    """The server could not take it, or found a fault in its form: all of it goes into the residual, and the update is
    kept in `set-aside/`, for a person to look at."""
    DROPPED = "dropped"
    """It was wrong: it is forgotten, and with it the residual that it was made from."""


def state_files(update: LocalUpdate) -> dict[str, Tensors]:
    """Returns the files of a draft that hold the client's state after an update, by name."""
    files: dict[str, Tensors] = {}
    for group in sorted({*update.if_counted, *update.if_not}):
        counted, other = update.if_counted.get(group), update.if_not.get(group)
        cases = {"": counted} if counted is other else {_IF_COUNTED: counted, _IF_NOT: other}
        files |= {f"{group}{case}{_SUFFIX}": tensors for case, tensors in cases.items() if tensors is not None}
    return files


def _place(file: Path, folder: Path, *, counted: bool) -> Path | None:
    """Returns where a file of `state_files` belongs in a run's folder, by the outcome; None if nowhere."""
    stem = file.name.removesuffix(_SUFFIX)
    if stem.endswith(_IF_COUNTED):
        return state_dir.group(folder, stem.removesuffix(_IF_COUNTED)) if counted else None
    group = stem.removesuffix(_IF_NOT)
    return state_dir.if_excluded(folder, group) if counted and group != stem else state_dir.group(folder, group)


@dataclass(frozen=True, slots=True)
class Pending:
    """A trained update on disk; `header` is what its upload begins with."""

    folder: Path
    run: str
    round: int
    header: pb.UpdateHeader
    policy: str
    """Digest of the policy under which it was trained."""

    @property
    def ticket(self) -> str:
        """Id of the ticket it was trained for."""
        return self.header.ticket

    @property
    def payload(self) -> Path:
        """The file with the payload's bytes."""
        return self.folder / PAYLOAD

    @property
    def manifest(self) -> Manifest:
        """The description of the payload."""
        return wire.manifest_from_proto(self.header.manifest)


class Outbox:
    """The outbox of a state directory: it holds one pending update, trained under a policy of some digest.

    Attributes:
        aside: The folder of the updates that the server could not take.
    """

    def __init__(self, directory: state_dir.StateDirectory, policy: str) -> None:
        self._directory = directory
        self._policy = policy
        self._outbox = directory.path / BOX
        self._draft = directory.path / DRAFT
        self.aside = directory.path / ASIDE

    def draft(self) -> Path:
        """Returns an empty folder for the worker to write an update into."""
        shutil.rmtree(self._draft, ignore_errors=True)
        self._draft.mkdir(mode=0o700)
        return self._draft

    def commit(self, run: str, number: int, header: pb.UpdateHeader) -> Pending:
        """Makes the draft the pending update; after this a restart uploads it instead of training again."""
        described = json_format.MessageToDict(header)
        record = {"run": run, "round": number, "policy": self._policy, "header": described}
        durable.write(self._draft / _RECORD, json.dumps(record).encode())
        for path in self._draft.iterdir():
            durable.sync(path)
        durable.sync(self._draft)
        self._spend(self._directory.run(run))
        durable.move(self._draft, self._outbox)
        return Pending(self._outbox, run, number, header, self._policy)

    def _spend(self, folder: Path) -> None:
        """Books what the draft spends of the client's privacy budget: for good, before any of it can leave the site."""
        spent = self._draft / f"{SENT}{_SUFFIX}"
        if spent.exists():
            durable.write(state_dir.group(folder, SENT), spent.read_bytes())

    def load(self) -> Pending | None:
        """Returns the pending update, if there is one.

        Raises:
            StateInvalid: If it is damaged; `discard` it and its ticket will be trained again.
        """
        if not self._outbox.exists():
            return None
        try:
            record = json.loads((self._outbox / _RECORD).read_bytes())
            header = json_format.ParseDict(record["header"], pb.UpdateHeader())
            policy = str(record.get("policy", ""))
            pending = Pending(self._outbox, str(record["run"]), int(record["round"]), header, policy)
            manifest = pending.manifest
            digest = durable.sha256(pending.payload)
        except (OSError, KeyError, TypeError, ValueError, json_format.Error, FedpeftError) as error:
            raise StateInvalid(f"the pending update in {self._outbox} is damaged: {error}") from None
        if digest != manifest.sha256:
            raise StateInvalid(f"{pending.payload} does not have the digest of its manifest")
        if self.counted(pending.run) == pending.ticket:  # it was recalled, and its files are here
            self._forget(self._directory.run(pending.run), (_COUNTED_PAYLOAD, _COUNTED))
        return pending

    def recall(self, run: str) -> bool:
        """Makes the last update of a run that counted the pending one again, with what follows if it does not count.

        Returns:
            False if it cannot be: its payload is not here any more, or damaged.
        """
        folder = self._directory.run(run)
        try:
            record = json.loads((folder / _COUNTED).read_bytes())
            header = json_format.ParseDict(record["header"], pb.UpdateHeader())
            if durable.sha256(folder / _COUNTED_PAYLOAD) != header.manifest.sha256:
                return False
        except (OSError, KeyError, TypeError, ValueError, json_format.Error, FedpeftError):
            return False
        draft = self.draft()
        shutil.copyfile(folder / _COUNTED_PAYLOAD, draft / PAYLOAD)
        for group, file in state_dir.groups_if_excluded(folder).items():
            shutil.copyfile(file, draft / f"{group}{_IF_NOT}{_SUFFIX}")
        shutil.copyfile(folder / _COUNTED, draft / _RECORD)
        for path in draft.iterdir():
            durable.sync(path)
        durable.sync(draft)
        durable.move(draft, self._outbox)
        return True

    def holds(self, run: str) -> bool:
        """Returns True if an update of a run waits for an answer, or for the end of its settlement; also if unsure."""
        if any(self._directory.path.glob(f"settled-*@{run}")):
            return True
        try:
            return bool(json.loads((self._outbox / _RECORD).read_bytes())["run"] == run)
        except FileNotFoundError:
            return self._outbox.exists()
        except (OSError, ValueError, KeyError, TypeError):
            return True

    def discard(self) -> None:
        """Removes a damaged pending update; the residual stays as it was before it."""
        shutil.rmtree(self._outbox, ignore_errors=True)

    def settle(self, pending: Pending, outcome: Outcome) -> None:
        """Records what became of the pending update: its residual takes effect, its files go."""
        durable.move(self._outbox, self._settled(outcome, pending.run))
        self.finish()

    def finish(self) -> None:
        """Finishes what a killed process had begun to settle."""
        for outcome in Outcome:
            for settled in self._directory.path.glob(f"settled-{outcome}@*"):
                self._apply(settled, outcome, self._directory.run(settled.name.split("@", 1)[1]))

    def counted(self, run: str) -> str | None:
        """Returns the ticket of the last update of a run that counted, until that is settled for good."""
        try:
            record = json.loads((self._directory.run(run) / _COUNTED).read_bytes())
            return str(record["header"]["ticket"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            path = self._directory.path / "runs" / run / _COUNTED
            _log.warning("note on the last update is damaged; it is taken as counted", file=str(path), cause=str(error))
            self.confirm(run)
            return None

    def confirm(self, run: str) -> None:
        """Settles that the last update of a run was folded."""
        folder = self._directory.run(run)
        self._forget(folder, (_EXCLUDED, _COUNTED_PAYLOAD, _COUNTED))

    def take_back(self, run: str, *, faulty: bool = True) -> bool:
        """Settles that the last update of a run was excluded; a crash in the middle is mended by calling it again.

        Args:
            run: The run.
            faulty: False if nothing was wrong with it: the server lost it.

        Returns:
            True if it is in the residual now; False if residual and update were dropped, because the one before it was
            excluded too.
        """
        folder, ticket = self._directory.run(run), self.counted(run) or ""
        before = folder / _EXCLUDED
        last = before.read_text("ascii", "replace") if before.exists() else ""
        second = faulty and last not in ("", ticket)
        if second:
            state_dir.group(folder, RESIDUAL).unlink(missing_ok=True)
            state_dir.if_excluded(folder, RESIDUAL).unlink(missing_ok=True)
        elif faulty:
            durable.write(before, ticket.encode())
        for group, file in state_dir.groups_if_excluded(folder).items():
            durable.move(file, state_dir.group(folder, group))
        self._forget(folder, (_COUNTED_PAYLOAD, _COUNTED, _EXCLUDED) if second else (_COUNTED_PAYLOAD, _COUNTED))
        return not second

    def _forget(self, folder: Path, notes: Iterable[str]) -> None:
        """Removes what is kept of a counted update until it is settled for good, and notes on it."""
        for file in (*state_dir.groups_if_excluded(folder).values(), *(folder / name for name in notes)):
            file.unlink(missing_ok=True)
        durable.sync(folder)

    def _settled(self, outcome: Outcome, run: str) -> Path:
        return self._directory.path / f"settled-{outcome}@{run}"

    def _apply(self, settled: Path, outcome: Outcome, folder: Path) -> None:
        if outcome is Outcome.DROPPED:
            state_dir.group(folder, RESIDUAL).unlink(missing_ok=True)
            durable.sync(folder)
        else:
            self._take_effect(settled, folder, counted=outcome is Outcome.COUNTED)
        if outcome is Outcome.SET_ASIDE:
            self._keep(settled, folder.name)
        else:
            shutil.rmtree(settled)
            durable.sync(settled.parent)

    def _take_effect(self, settled: Path, folder: Path, *, counted: bool) -> None:
        """Moves the client's state for an outcome to where the next training finds it."""
        for file in sorted(settled.glob(f"*{_SUFFIX}")):
            if (place := _place(file, folder, counted=counted)) is not None:
                durable.move(file, place)
        if counted and (settled / PAYLOAD).exists():
            durable.move(settled / PAYLOAD, folder / _COUNTED_PAYLOAD)
        if counted and (settled / _RECORD).exists():
            durable.move(settled / _RECORD, folder / _COUNTED)  # last: it says that the rest is there

    def _keep(self, settled: Path, run: str) -> None:
        """Moves what is left of a settled update to those that are kept aside."""
        durable.make_folder(self.aside, 0o700)
        for file in settled.glob(f"*{_SUFFIX}"):
            file.unlink()
        record = json.loads((settled / _RECORD).read_bytes())
        ticket = str(record["header"]["ticket"])
        named = ticket if ids.TICKET.fullmatch(ticket) else "ticket"  # the server chose it
        place = self.aside / f"{run}-{int(record['round']):06}-{named}"
        shutil.rmtree(place, ignore_errors=True)  # the same ticket, trained and set aside once more
        durable.move(settled, place)
        for old in sorted(self.aside.iterdir(), key=lambda path: path.stat().st_mtime_ns)[:-KEPT_ASIDE]:
            _log.warning("an update that was set aside is removed: only the newest are kept", folder=str(old))
            shutil.rmtree(old)
