"""Leaving for good, on this side: what is removed from a state directory, what stays, and the note that it left."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from fedpeft import durable
from fedpeft.identity import folder
from fedpeft_client import contact, enrolled, processes
from fedpeft_client.ledger_entries import FILE as LEDGER
from fedpeft_client.policy import FILE as POLICY
from fedpeft_client.state import identity_folder

LEFT = "left"
"""In the state directory: when this client left."""


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


def drop_unsent(state_dir: Path) -> None:
    """Removes an update that will not be sent any more.

    Raises:
        StateInvalid: If it cannot be removed.
    """
    for path in (state_dir / "pending", state_dir / "pending.new", *state_dir.glob("settled-*")):
        _remove(path)


def remove(state_dir: Path, identity: Path | None) -> Iterator[tuple[Path, str, int]]:
    """Removes what is secret or made from the data; yields each path, what it was, and its bytes.

    Args:
        state_dir: The state directory, held by this process.
        identity: The identity folder, if it is another than that in the state directory.

    Raises:
        StateInvalid: If something cannot be removed.
    """
    drop_unsent(state_dir)
    own = identity_folder(state_dir)
    for where, what in (
        (own, "key and certificate"),
        (own.with_name(f"{own.name}.next"), "the key of an enrolment that did not finish"),
        (state_dir / "runs", "adapters, residuals and local tensors"),
        (state_dir / "instance", "this client's instance"),
        (state_dir / processes.FILE, "its processes"),
        (state_dir / contact.FILE, "its last contact"),
        (state_dir / contact.REFUSED, "the server's last refusal"),
    ):
        if where.exists():
            size_bytes = _bytes(where)
            _remove(where)
            yield where, what, size_bytes
    if identity is not None and identity != own:
        for path in [identity / name for name in enrolled.FILES]:
            _remove(path)
        yield identity, "key and certificate", 0


def kept(state_dir: Path, identity: Path | None) -> Iterator[tuple[Path, str]]:
    """Yields what is there still, with what it is."""
    where = identity or identity_folder(state_dir)
    if folder.key_path(where).exists():
        yield where, "key and certificate, which the server refuses now"
    for path, what in (
        (state_dir / "runs", "adapters, residuals and local tensors"),
        (state_dir / LEDGER, "the ledger: what left this device"),
        (state_dir / POLICY, "the policy"),
    ):
        if path.exists():
            yield path, what


def _remove(path: Path) -> None:
    with durable.refusals(f"removing {path}"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _bytes(path: Path) -> int:
    files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
    return sum(each.lstat().st_size for each in files)
