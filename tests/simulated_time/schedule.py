"""A schedule of faults, drawn from a seed: the same seed is the same history, to the last message."""

from __future__ import annotations

import random
import sqlite3
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from .wire import Quality, Wire

CLIENTS = ("a", "b", "c")
MACHINES = ("server", "server", *CLIENTS)
"""The machines that faults happen to; one that is here twice has twice as many."""
OF_HIERARCHY = ("server", "edge", "edge", "relay", "relay", *CLIENTS)
"""Likewise, where `a` and `b` are clients of an edge, whose agent `relay` is one of the server."""
GOOD = Quality()
ROOM_BYTES = 64 * 1024 * 1024
EFFECTS_S = 3600.0
"""The effects that a death waits for come in this time, or it does not happen."""


class Fault(Protocol):
    """One fault: when it begins, when it is over, and how it happens."""

    @property
    def at_s(self) -> float: ...
    @property
    def over_s(self) -> float: ...
    def happen(self, machines: dict[str, Any], wire: Wire, loop: Any) -> None: ...


@dataclass(frozen=True)
class Kill:
    """A machine dies at a moment, or before one of the effects on its disk that follow, and comes back."""

    at_s: float
    machine: str
    effects: int | None
    away_s: float
    power: bool

    @property
    def over_s(self) -> float:
        return self.at_s + self.away_s + (0.0 if self.effects is None else EFFECTS_S)

    def happen(self, machines: dict[str, Any], wire: Wire, loop: Any) -> None:
        machine = machines[self.machine]
        if self.effects is None:
            machine.kill(self.away_s, power=self.power)
        else:  # of a machine that is down they are those of its next life
            machine.dies_after = self.effects + (machine.life.effects if machine.is_up else 0)
            machine.away_s, machine.loses_power = self.away_s, self.power


@dataclass(frozen=True)
class Cut:
    """Nothing comes from a machine or gets to it for a while."""

    at_s: float
    machine: str
    for_s: float

    @property
    def over_s(self) -> float:
        return self.at_s + self.for_s

    def happen(self, machines: dict[str, Any], wire: Wire, loop: Any) -> None:
        wire.cut.add(self.machine)
        wire.break_all(self.machine)
        wire.later(self.over_s, wire.cut.discard, self.machine)


@dataclass(frozen=True)
class Full:
    """The disk of a machine is full for a while, but for some bytes."""

    at_s: float
    machine: str
    left_bytes: int
    for_s: float

    @property
    def over_s(self) -> float:
        return self.at_s + self.for_s

    def happen(self, machines: dict[str, Any], wire: Wire, loop: Any) -> None:
        machines[self.machine].fill(self.left_bytes)
        wire.later(self.over_s, machines[self.machine].fill, None)


@dataclass(frozen=True)
class Rot:
    """Updates that a server has received whole get damaged on its disk: each loses a byte, its end, or its file.

    Those of rounds in the named phases: a fold may have read its updates already, and one that is damaged after that is
    not asked for again, though it is to be kept.
    """

    at_s: float
    seed: int
    machine: str = "server"
    phases: tuple[str, ...] = ("open", "aggregating")

    @property
    def over_s(self) -> float:
        return self.at_s

    def happen(self, machines: dict[str, Any], wire: Wire, loop: Any) -> None:
        draw = random.Random(self.seed)
        data_dir = machines[self.machine].disk.path / "data"
        spool = data_dir / "spool"
        waiting = _not_folded(data_dir / "fedpeft.db", self.phases)  # what is kept is not asked for
        for path in sorted(p for p in spool.glob("*.update") if p.stat().st_size and p.name.split(".")[0] in waiting):
            data = bytearray(path.read_bytes())
            how = draw.choice(("spared", "byte", "end", "file"))
            if how == "byte":
                data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
                path.write_bytes(data)
            elif how == "end":
                path.write_bytes(data[: draw.randrange(len(data))])
            elif how == "file":
                path.unlink()


def _not_folded(database: Path, phases: tuple[str, ...]) -> set[str]:
    """Returns the tickets whose updates are received and wait for their fold, in rounds in some phases."""
    query = (
        "select id from tickets join rounds on rounds.run = tickets.run and rounds.number = tickets.counts_in"
        f" where state = 'received' and phase in ({', '.join('?' * len(phases))})"
    )
    if not database.exists():
        return set()
    with closing(sqlite3.connect(database)) as read:
        return {ticket for (ticket,) in read.execute(query, phases)}


@dataclass(frozen=True)
class Jump:
    """The clock of a machine jumps; its process notices no more than that, and neither does the next one."""

    at_s: float
    machine: str
    by_s: float

    @property
    def over_s(self) -> float:
        return self.at_s

    def happen(self, machines: dict[str, Any], wire: Wire, loop: Any) -> None:
        machine = machines[self.machine]
        machine.wall_s += self.by_s
        if machine.life is not None:
            machine.life.wall_s = machine.wall_s


@dataclass(frozen=True)
class Schedule:
    """The faults of one world, and the quality of its lines.

    Attributes:
        seed: Decides all else that is drawn in the world.
        faults: The faults, in their order.
        quality: Of every line, until the last fault is over.
        clients: The clients.
        longest_training_s: Longest time that a training takes.
        disks_lie: True for disks that say that they forced what they did not.
        buffered: True for a run of buffered rounds, whose updates the server keeps.
        exact: True for a run that counts updates by exact sums.
        hierarchy: True for such a run where two clients are an edge's, with a server and an agent of its own.
        room_bytes: Size of each machine's disk; None for no limit, where none gets full.
    """

    seed: int
    faults: tuple[Fault, ...] = ()
    quality: Quality = GOOD
    clients: tuple[str, ...] = CLIENTS
    longest_training_s: float = 600.0
    disks_lie: bool = False
    buffered: bool = False
    exact: bool = False
    hierarchy: bool = False
    room_bytes: int | None = None

    @classmethod
    def named(cls, name: str, machines: tuple[str, ...] = MACHINES) -> Schedule:
        """Returns a schedule: of `NAMED`, a seed, `full SEED`, `rot SEED`, or `MACHINE EFFECT [power]`.

        Or `buffered` and one; or `hierarchy` and one of the others. What is drawn happens to `machines`.
        """
        if name in NAMED:
            return NAMED[name]
        if name.startswith("buffered "):
            made = cls.named(name.removeprefix("buffered "))
            kept = tuple(replace(f, phases=("open",)) if isinstance(f, Rot) else f for f in made.faults)
            return replace(made, faults=kept, buffered=True, clients=(*CLIENTS, "d"))
        if name.startswith("hierarchy "):
            made = cls.named(name.removeprefix("hierarchy "), OF_HIERARCHY)
            return replace(made, exact=True, hierarchy=True)
        if name.startswith("full "):
            return cls.full(int(name.removeprefix("full ")), machines)
        if name.startswith("rot "):
            return cls.rotting(int(name.removeprefix("rot ")), machines)
        if name.isdecimal():
            return cls.drawn(int(name), machines)
        machine, effect, *power = name.split()
        death = Kill(0.0, machine, int(effect), 1.0, power=bool(power))
        return cls(1, (death,), longest_training_s=2.0)

    @classmethod
    def full(cls, seed: int, machines: tuple[str, ...] = MACHINES) -> Schedule:
        """Draws a schedule in which disks get full besides; a client without room gives its ticket back for a while."""
        draw, made = random.Random(f"full {seed}"), cls.drawn(seed, machines)
        length = 30.0 + 4 * made.longest_training_s
        full = [
            Full(
                draw.uniform(0.0, length),
                draw.choice(machines),
                draw.choice((0, 4096, 65536)),
                draw.uniform(1.0, 300.0),
            )
            for _ in range(draw.randint(1, 6))
        ]
        faults = tuple(sorted((*made.faults, *full), key=lambda f: f.at_s))
        return replace(made, faults=faults, room_bytes=ROOM_BYTES)

    @classmethod
    def rotting(cls, seed: int, machines: tuple[str, ...] = MACHINES) -> Schedule:
        """Draws a schedule in which the disk of a server, of each in turn, damages updates besides."""
        draw, made = random.Random(f"rot {seed}"), cls.drawn(seed, machines)
        length = 30.0 + 4 * made.longest_training_s
        servers = sorted({"server", "edge"} & {*machines}, reverse=True)
        rot = [
            Rot(draw.uniform(1.0, length), draw.randrange(2**32), servers[n % len(servers)])
            for n in range(draw.randint(20, 80))
        ]
        return replace(made, faults=tuple(sorted((*made.faults, *rot), key=lambda f: f.at_s)))

    @classmethod
    def drawn(cls, seed: int, machines: tuple[str, ...] = MACHINES) -> Schedule:
        """Draws a schedule of faults of some machines."""
        draw = random.Random(f"schedule {seed}")
        quality = Quality(
            *(draw.choice((0.0, 0.0, 0.01, 0.1)) for _ in range(4)), longest_s=draw.choice((0.01, 0.1, 2.0))
        )
        training_s = draw.choice((2.0, 60.0, 600.0))
        faults = [_fault(draw, 30.0 + 4 * training_s, machines) for _ in range(draw.randint(0, 16))]
        return cls(seed, tuple(sorted(faults, key=lambda f: f.at_s)), quality, longest_training_s=training_s)


def _fault(draw: random.Random, length: float, machines: tuple[str, ...]) -> Fault:
    at, machine = draw.uniform(1.0, length), draw.choice(machines)
    kind = draw.random()
    if kind < 0.75:
        effects = draw.choice((None, draw.randint(0, 5), draw.randint(0, 60)))
        return Kill(at, machine, effects, draw.choice((0.5, 5.0, draw.uniform(0.0, 300.0))), draw.random() < 0.4)
    if kind < 0.93:
        return Cut(at, machine, draw.uniform(0.1, 600.0))
    return Jump(at, machine, draw.choice((-3600.0, -5.0, 5.0, 600.0)))


_POWER = tuple(Kill(2.0 + 2 * n, "server", 25, 0.5, power=True) for n in range(8))
NAMED = {
    "undisturbed": Schedule(0),
    "quick": Schedule(0, longest_training_s=2.0),
    "quick, of exact sums": Schedule(0, exact=True, longest_training_s=2.0),
    "power": Schedule(3, _POWER, longest_training_s=2.0),
    "power, and disks that lie": Schedule(3, _POWER, longest_training_s=2.0, disks_lie=True),
}
"""Schedules that are not drawn: nothing goes wrong; the server's power fails while clients train and push."""
