"""The state directory: what a client must still know after it was killed.

lock                          held by the one process that uses the directory
instance                      32 hexadecimal digits drawn once: which client this is
processes                     the processes that may have registered last from here, one a line (processes.py)
contact                       the server; it answered last when this file was touched (contact.py)
refused                       why the server let this client in no more, if it did not since (contact.py)
left                          when this client left for good, if it did (commands/left_state.py)
identity/                     key and certificate of this client (fedpeft.identity.folder)
identity.next/                the key of an enrolment that did not finish
ledger.jsonl, ledger-*.jsonl  all that left this device (egress/log_file.py)
policy.toml                   what its owner allows, if it lies here (policy.py)
policy-file                   the policy's file, if it lies elsewhere (policy.py)
pending/                      a trained update that the server has not answered for (outbox.py)
pending.new/                  one that is being trained
settled-OUTCOME@RUN/          one that the server has answered for, until its files are in their places
set-aside/                    updates that the server could not take, for a person to look at
runs/RUN/adapter.json, ...    the adapter version held last (adapters.py)
runs/RUN/residual.safetensors what earlier updates left unsent (error feedback)
runs/RUN/local.safetensors    tensors that are trained here and never sent
runs/RUN/GROUP.safetensors    any other group of tensors that is kept from round to round (fedpeft.rounds.local_job)
runs/RUN/counted*             the last update, and what holds if it was excluded, or if the server lost it (outbox.py)
"""

from __future__ import annotations

import secrets
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from fedpeft import ids
from fedpeft.errors import StateInvalid
from fedpeft.process import durable, locks
from fedpeft.rounds.groups import RESIDUAL

BOX, DRAFT, ASIDE = "pending", "pending.new", "set-aside"
"""Names of what `fedpeft_client.state.outbox` keeps here."""
POLICY = "policy.toml"
"""The policy that applies where no other file is named."""
POLICY_FILE = "policy-file"
"""The place of a policy that lies elsewhere."""
IF_EXCLUDED = "counted"
"""Begins the name of a file that replaces a group if a counted update is excluded; it is the residual's whole name."""
VARIABLE = "FEDPEFT_CLIENT_STATE_DIR"
"""The environment variable that names it."""


class StateDirectory:
    """The state directory, held by this process alone from construction to `close`.

    Args:
        path: The folder; made if absent, readable by its owner only.

    Raises:
        StateInvalid: If it cannot be made, written or read, or if another process holds it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            durable.make_folder(path, 0o700)
        except OSError as error:
            raise StateInvalid(f"cannot use state directory {path}: {durable.in_words(error)}") from None
        with ExitStack() as held:
            words = f"state directory {path}", "fedpeft-client", "give each client a directory of its own"
            held.enter_context(locks.directory(path, *words))
            for folder in (path, identity_folder(path), *(path / "runs").glob("*")):
                durable.sweep(folder)
            if (path / "runs").is_dir():  # who made it, or a folder in it, may have been killed before it was durable
                durable.sync(path)
                durable.sync(path / "runs")
            self.instance = self._instance()
            self._held = held.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Lets another process use the directory."""
        self._held.close()

    def run(self, run: str) -> Path:
        """Returns the folder of a run, made if absent.

        Raises:
            StateInvalid: If the id, which the server chose, could be more than one plain folder name.
        """
        if not ids.RUN.fullmatch(run):
            raise StateInvalid(f"run id {run[:80]!r} has characters that are not allowed in one")
        folder = self.path / "runs" / run
        if not folder.is_dir():
            durable.make_folder(folder, 0o700)
        return folder

    def _instance(self) -> str:
        path = self.path / "instance"
        try:
            if not path.exists():
                with durable.refusals(f"writing {path}"):
                    durable.write(path, secrets.token_hex(16).encode())
            instance = path.read_text("ascii", "replace").strip()
        except OSError as error:
            raise StateInvalid(f"cannot use state directory {self.path}: {durable.in_words(error)}") from None
        if not ids.INSTANCE.fullmatch(instance):
            raise StateInvalid(
                f"{path} does not hold 32 hexadecimal digits; remove it and the server will see a new client"
            )
        return instance


def identity_folder(path: Path) -> Path:
    """Returns the identity folder of a state directory."""
    return path / "identity"


def group(folder: Path, name: str) -> Path:
    """Returns the file of a group of tensors that a client keeps from round to round of a run."""
    return folder / f"{name}.safetensors"


def groups(folder: Path) -> dict[str, Path]:
    """Returns the files of all groups in a run's folder, by group."""
    files = sorted(folder.glob("*.safetensors"))
    return {file.stem: file for file in files if not file.stem.startswith(IF_EXCLUDED)}


def if_excluded(folder: Path, name: str) -> Path:
    """Returns the file that replaces a group if the last update, which was counted, turns out to be excluded."""
    return folder / (f"{IF_EXCLUDED}.safetensors" if name == RESIDUAL else f"{IF_EXCLUDED}-{name}.safetensors")


def groups_if_excluded(folder: Path) -> dict[str, Path]:
    """Returns those files by group."""
    files = sorted(folder.glob(f"{IF_EXCLUDED}*.safetensors"))
    return {file.stem.removeprefix(IF_EXCLUDED).removeprefix("-") or RESIDUAL: file for file in files}
