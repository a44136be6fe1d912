"""State that the clients of a simulation keep from round to round: residual, local tensors, an algorithm's state.

It lies in files, as an agent's does; memory holds the digests of those who keep something.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from fedpeft.adapters import adapter_file
from fedpeft.adapters.payload import Tensors
from fedpeft.adapters.tensor_errors import as_os_errors
from fedpeft.process import durable
from fedpeft.rounds.groups import RESIDUAL
from fedpeft.rounds.local_job import Groups

Arrays = dict[str, NDArray[np.float32]]

Changes = Mapping[str, Mapping[str, str]]
"""Digests (SHA-256, hexadecimal) of what a round changed, by client and group; empty for a group that is gone."""

_ENDING = ".safetensors"
_IF_EXCLUDED = ".if-excluded"
_BETWEEN = "@"
"""Between client, group and round in a file's name; no client's id has it."""
_SYNCS = 8
"""Files that are synced at once: a disk makes several durable in one go. Measured on ext4, 100 files of 400 kB take
50 ms in place of 210."""


class _Kept(NamedTuple):
    """A group that counts: the round that wrote its file, and the file's digest."""

    round: int
    sha256: str


class ClientMemory:
    """State of every client from round to round: a file for each group of tensors that is not empty.

    A file has the number of its round in its name, and is not moved: what a round changes counts once its `changes` are
    on record. A process that was killed meanwhile leaves files that are on no record; the next one removes them.

    Args:
        folder: The folder; what a simulation left there that is resumed.
        rounds: The `changes` of every round that counts, oldest first.
    """

    def __init__(self, folder: Path, rounds: Sequence[Changes] = ()) -> None:
        self._folder = folder
        self._kept: dict[str, dict[str, _Kept]] = {}
        self._changed: dict[str, dict[str, str]] = {}
        self._held: dict[str, dict[str, str]] = {}  # for the case that an update is excluded, as `_changed`
        self._round = 1
        for changes in rounds:
            self._count(changes)
            self._round += 1
        folder.mkdir(exist_ok=True)
        known = {self._file(c, g, kept.round) for c, groups in self._kept.items() for g, kept in groups.items()}
        for file in folder.iterdir():
            if file not in known:
                file.unlink()

    def check(self) -> None:
        """Checks that what clients keep is what it was.

        Raises:
            BlobCorrupt: If a file is gone, or has other bytes.
        """
        for client, groups in self._kept.items():
            for group, kept in groups.items():
                adapter_file.check_digest(self._file(client, group, kept.round), kept.sha256)

    @property
    def changes(self) -> Changes:
        """Changes of this round so far."""
        return {client: dict(groups) for client, groups in self._changed.items()}

    def sync(self) -> None:
        """Makes durable what this round changed: only then may its `changes` be put on record."""
        files = [self._file(c, g) for c, groups in self._changed.items() for g, sha256 in groups.items() if sha256]
        if files:
            with ThreadPoolExecutor(min(_SYNCS, len(files))) as pool:
                list(pool.map(durable.sync, files))
            durable.sync(self._folder)

    def settle(self) -> None:
        """Ends the round, which counts; further changes are of the one after it."""
        for file in self._count(self._changed):
            file.unlink(missing_ok=True)
        for client in list(self._held):
            self.confirm(client)
        self._changed = {}
        self._round += 1

    def state(self, client: str) -> dict[str, Arrays]:
        """Returns what a client keeps, float32 by group and tensor."""
        files = {group: self._file(client, group, kept.round) for group, kept in self._kept.get(client, {}).items()}
        for group, sha256 in self._changed.get(client, {}).items():
            if sha256:
                files[group] = self._file(client, group)
            else:
                files.pop(group, None)
        return {group: safetensors.numpy.load_file(file) for group, file in sorted(files.items())}

    def keep(self, client: str, state: Groups, if_excluded: Groups | None = None) -> None:
        """Replaces the groups that `state` has; an empty one is removed.

        Args:
            client: The client's id.
            state: State that it keeps now, by group.
            if_excluded: State that it keeps instead if its update is excluded: held until `confirm` or `take_back`.
        """
        for group, arrays in state.items():
            if arrays or self._has(client, group):
                self._changed.setdefault(client, {})[group] = _write(self._file(client, group), arrays)
        for group, arrays in (if_excluded or {}).items():
            now = state.get(group)
            if arrays is not now and (arrays or now):
                file = self._file(client, group, ending=_IF_EXCLUDED)
                self._held.setdefault(client, {})[group] = _write(file, arrays)

    def confirm(self, client: str) -> None:
        """Settles that a client's last update was folded."""
        for group, sha256 in self._held.pop(client, {}).items():
            if sha256:
                self._file(client, group, ending=_IF_EXCLUDED).unlink()

    def take_back(self, client: str) -> None:
        """Settles that a client's last update was excluded: what was held for that takes effect."""
        for group, sha256 in self._held.pop(client, {}).items():
            self._changed.setdefault(client, {})[group] = sha256
            if sha256:
                self._file(client, group, ending=_IF_EXCLUDED).replace(self._file(client, group))
            else:
                self._file(client, group).unlink(missing_ok=True)

    def forget_residual(self, client: str) -> None:
        """Drops the residual, as an agent does whose update was refused as wrong."""
        self.keep(client, {RESIDUAL: {}})

    def _has(self, client: str, group: str) -> bool:
        changed = self._changed.get(client, {})
        return bool(changed[group]) if group in changed else group in self._kept.get(client, {})

    def _count(self, changes: Changes) -> list[Path]:
        """Makes changes of this round count; returns the files that do no more."""
        replaced = []
        for client, groups in changes.items():
            kept = self._kept.setdefault(client, {})
            for group, sha256 in groups.items():
                if before := kept.pop(group, None):
                    replaced.append(self._file(client, group, before.round))
                if sha256:
                    kept[group] = _Kept(self._round, sha256)
            if not kept:
                del self._kept[client]
        return replaced

    def _file(self, client: str, group: str, number: int | None = None, ending: str = _ENDING) -> Path:
        """Returns the path of a group that a round wrote; by default this one."""
        return self._folder / f"{client}{_BETWEEN}{group}{_BETWEEN}{number or self._round}{ending}"


def _write(file: Path, arrays: Tensors) -> str:
    """Writes a group, and returns the file's digest; removes the file if the group has no tensors."""
    if not arrays:
        file.unlink(missing_ok=True)
        return ""
    with as_os_errors(file):
        safetensors.numpy.save_file(dict(arrays), file)
    return durable.sha256(file).hex()  # measured, half the time of a digest of bytes that are written then
