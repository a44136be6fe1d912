"""State that the clients of a simulation keep from round to round: residual, local tensors, an algorithm's state.

It lies in files, as an agent's does, so memory does not grow with clients.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from fedpeft.adapters.payload import Tensors
from fedpeft.adapters.tensor_errors import as_os_errors
from fedpeft.rounds.groups import RESIDUAL
from fedpeft.rounds.local_job import Groups

Arrays = dict[str, NDArray[np.float32]]

_ENDING = ".safetensors"
_IF_EXCLUDED = ".if-excluded"
_BETWEEN = "@"
"""Between client and group in a file's name; no client's id has it."""


class ClientMemory:
    """State of every client from round to round: a file for each group of tensors that is not empty.

    What a round changes lies apart (`pending-NUMBER`) until the round counts, then it is moved in place (`settle`). An
    empty file there stands for a group that is gone. A process that was killed meanwhile leaves files that the next one
    moves, or removes if their round does not count.

    Args:
        folder: The folder; what a simulation left there that is resumed.
        settled: Number of the last round that counts.
    """

    def __init__(self, folder: Path, settled: int = 0) -> None:
        self._kept = folder / "kept"
        self._place = folder
        self._pending = folder / f"pending-{settled}"
        self._changed: dict[str, dict[str, bool]] = {}  # by client and group: True if it has tensors now
        self._held: dict[str, set[str]] = {}  # groups that are held for the case that an update is excluded
        self.settle(settled)

    def settle(self, number: int) -> None:
        """Makes what round `number` changed the state of its clients; further changes are of the round after it."""
        for file in self._pending.glob(f"*{_ENDING}"):
            client, group = file.name.split(_BETWEEN)
            kept = self._kept / client / group
            if file.stat().st_size:
                kept.parent.mkdir(parents=True, exist_ok=True)
                file.replace(kept)
            else:
                kept.unlink(missing_ok=True)
        self._changed.clear()
        self._held.clear()
        shutil.rmtree(self._pending, ignore_errors=True)
        self._pending = self._place / f"pending-{number + 1}"
        shutil.rmtree(self._pending, ignore_errors=True)
        self._pending.mkdir(parents=True)

    def state(self, client: str) -> dict[str, Arrays]:
        """Returns what a client keeps, float32 by group and tensor."""
        files = {file.stem: file for file in (self._kept / client).glob(f"*{_ENDING}")}
        for group, there in self._changed.get(client, {}).items():
            if there:
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
                _write(self._file(client, group), arrays)
                self._changed.setdefault(client, {})[group] = bool(arrays)
        for group, arrays in (if_excluded or {}).items():
            now = state.get(group)
            if arrays is not now and (arrays or now):
                _write(self._file(client, group, _IF_EXCLUDED), arrays)
                self._held.setdefault(client, set()).add(group)

    def confirm(self, client: str) -> None:
        """Settles that a client's last update was folded."""
        for group in self._held.pop(client, ()):
            self._file(client, group, _IF_EXCLUDED).unlink()

    def take_back(self, client: str) -> None:
        """Settles that a client's last update was excluded: what was held for that takes effect."""
        for group in self._held.pop(client, ()):
            file = self._file(client, group, _IF_EXCLUDED)
            self._changed.setdefault(client, {})[group] = file.stat().st_size > 0
            file.replace(self._file(client, group))

    def forget_residual(self, client: str) -> None:
        """Drops the residual, as an agent does whose update was refused as wrong."""
        self.keep(client, {RESIDUAL: {}})

    def _has(self, client: str, group: str) -> bool:
        changed = self._changed.get(client, {})
        return changed[group] if group in changed else (self._kept / client / f"{group}{_ENDING}").exists()

    def _file(self, client: str, group: str, ending: str = _ENDING) -> Path:
        return self._pending / f"{client}{_BETWEEN}{group}{ending}"


def _write(file: Path, arrays: Tensors) -> None:
    """Writes a group; an empty file if it has no tensors."""
    if not arrays:
        file.write_bytes(b"")
        return
    with as_os_errors(file):
        safetensors.numpy.save_file(dict(arrays), file)
