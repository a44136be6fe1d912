"""The processes that registered from a state directory: by them the server tells a state from a copy left behind.

The file has the one whose registration was answered last, then all others. A process that is killed at any instant so
leaves a file that names the one the server knows as the last; also where that is an older one, whose call reached one
of several daemons late.
"""

from __future__ import annotations

from pathlib import Path

from fedpeft import ids
from fedpeft.errors import ClientMoved
from fedpeft.process import durable

FILE = "processes"
MOST = 64
"""Processes that are kept, and sent: the oldest goes first, the one answered last never."""


class Processes:
    """The processes of a state directory.

    Args:
        folder: The state directory, held by this process.
        own: This process, 32 hexadecimal digits.
    """

    def __init__(self, folder: Path, own: str) -> None:
        self._path = folder / FILE
        self._own = own

    def earlier(self) -> list[str]:
        """Returns the processes before this one; none where nobody registered, or the file was removed or damaged.

        Raises:
            StateInvalid: If it cannot be read.
        """
        return [one for one in self._read() if one != self._own]

    def registers(self) -> None:
        """Notes that this process is about to register.

        Raises:
            StateInvalid: If that cannot be written.
        """
        kept = self._read()
        if self._own not in kept:
            self._write([*kept[:1], *kept[1:][-(MOST - 2) :], self._own])

    def registered(self) -> None:
        """Notes that the server answered.

        Raises:
            StateInvalid: If that cannot be written.
        """
        kept = self._read()
        if kept[:1] != [self._own]:
            others = [one for one in kept if one != self._own]
            self._write([self._own, *others[1:], *others[:1]])

    def moved(self, error: ClientMoved) -> ClientMoved:
        """Returns the server's refusal with what may be done about it here."""
        return ClientMoved(
            f"{error.message}. If this one is to go on in its place, as after a restore from a backup, stop the other "
            f"and remove {self._path}"
        )

    def _read(self) -> list[str]:
        with durable.refusals(f"reading {self._path}"):
            try:
                lines = self._path.read_text("ascii", "replace").split()
            except FileNotFoundError:
                return []
        return [line for line in lines if ids.INSTANCE.fullmatch(line)]

    def _write(self, processes: list[str]) -> None:
        with durable.refusals(f"writing {self._path}"):
            durable.write(self._path, "".join(f"{one}\n" for one in processes).encode())
