"""Leaving for good, on this side: what is removed from a state directory, what stays, and the note that it left."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path

from fedpeft.identity import folder
from fedpeft.process import durable
from fedpeft.process.locks import LOCK
from fedpeft_client.egress.entries import FILE as LEDGER
from fedpeft_client.egress.log_file import archives
from fedpeft_client.enrolment import site_identity
from fedpeft_client.state import contact, processes
from fedpeft_client.state.state_dir import ASIDE, BOX, DRAFT, POLICY, POLICY_FILE, StateDirectory, identity_folder

LEFT = "left"
"""In the state directory: when this client left."""
_UNSENT: Mapping[str, str] = {
    BOX: "an update that was trained and not received",
    DRAFT: "an update whose training did not finish",
}
_BOOKKEEPING: Mapping[str, str] = {
    "instance": "this client's instance",
    processes.FILE: "its processes",
    contact.FILE: "its last contact",
    POLICY_FILE: "the place of its policy",
    contact.REFUSED: "the server's last refusal",
}
_MADE_HERE: Mapping[str, str] = {
    "identity.next": "the key of an enrolment that did not finish",
    "runs": "adapters, residuals and local tensors",
    ASIDE: "updates that the server could not take, with the tensors that were trained",
    **_BOOKKEEPING,
}
"""Names in a state directory of what is secret, made from the data, or of this client alone, besides its identity."""


def note_left(state_dir: Path) -> None:
    """Notes that this client left.

    Raises:
        StateInvalid: If that cannot be written.
    """
    path = state_dir / LEFT
    with durable.refusals(f"writing {path}"):
        durable.write(path, f"{datetime.now(UTC).isoformat(timespec='seconds')}\n".encode())


def left_at(state_dir: Path) -> datetime | None:
    """Returns when this client left; None if it did not, or has enrolled again since."""
    try:
        at = datetime.fromisoformat((state_dir / LEFT).read_text("ascii").strip())
    except (OSError, ValueError):
        return None
    return at if at.tzinfo else None


def back(state_dir: Path) -> None:
    """Notes that this client enrolled again.

    Raises:
        StateInvalid: If that cannot be written.
    """
    with durable.refusals(f"writing {state_dir}"):
        (state_dir / LEFT).unlink(missing_ok=True)


def drop_unsent(directory: StateDirectory) -> Iterator[tuple[Path, str, int]]:
    """Removes an update that will not be sent any more; yields its path, what it was, and its bytes.

    An update that the server has answered for is settled instead: its tensors are in `runs` then.

    Raises:
        StateInvalid: If it cannot be removed, or not be settled.
    """
    from fedpeft_client.state.outbox import Outbox  # only now: it needs NumPy, of which other commands ask nothing

    with durable.refusals(f"writing {directory.path}"):
        Outbox(directory, "").finish()
    yield from _removed(directory.path, _UNSENT)


def remove(directory: StateDirectory, identity: Path | None) -> Iterator[tuple[Path, str, int]]:
    """Removes what is secret or made from the data; yields each path, what it was, and its bytes.

    Args:
        directory: The state directory.
        identity: The identity folder, if it is another than that in the state directory.

    Raises:
        StateInvalid: If something cannot be removed.
    """
    own = identity_folder(directory.path)
    settled = {path.name: "an update that the server had answered for" for path in directory.path.glob("settled-*")}
    yield from _removed(directory.path, {own.name: "key and certificate", **_MADE_HERE, **settled, **_UNSENT})
    if identity is not None and identity != own:
        for path in [identity / name for name in site_identity.FILES]:
            _remove(path)
        yield identity, "key and certificate", 0


def kept(state_dir: Path, identity: Path | None) -> Iterator[tuple[Path, str]]:
    """Yields what is there still, with what it is; of what says nothing of keys or data, nothing."""
    own = identity_folder(state_dir)
    for where in dict.fromkeys((identity or own, own)):
        if folder.key_path(where).exists():
            yield where, "key and certificate, which the server refuses now"
    stays = {LEDGER: "the ledger: what left this device", POLICY: "the policy"}
    for name, what in {**_MADE_HERE, **stays}.items():
        if (state_dir / name).exists() and name not in _BOOKKEEPING:
            yield state_dir / name, what
    named = {own, *archives(state_dir / LEDGER), *(state_dir / name for name in (*_MADE_HERE, *stays, LEFT, LOCK))}
    for path in sorted(set(state_dir.iterdir()) - named):
        yield path, "not made by this client"


def _removed(state_dir: Path, there: Mapping[str, str]) -> Iterator[tuple[Path, str, int]]:
    for name, what in there.items():
        path = state_dir / name
        if os.path.lexists(path):
            size_bytes = _bytes(path)
            _remove(path)
            yield path, what, size_bytes


def _remove(path: Path) -> None:
    with durable.refusals(f"removing {path}"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _bytes(path: Path) -> int:
    files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
    return sum(each.lstat().st_size for each in files)
