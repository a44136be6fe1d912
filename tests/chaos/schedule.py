"""A schedule of faults over real processes, drawn from a seed; the moments are those of the machine that runs it."""

from __future__ import annotations

import random
import signal
from dataclasses import dataclass, replace
from typing import Any, Protocol

from .mains import CLIENTS, DAEMONS, EVALUATOR

MACHINES = ("server", "server", "server", *CLIENTS, EVALUATOR)
LINKS = (*CLIENTS, EVALUATOR)
POSTGRES, S3 = "postgres", "s3"
PLACES = (POSTGRES, S3, *(f"{daemon}/{POSTGRES}" for daemon in DAEMONS))
"""Machine and lines of what several daemons share: the database, the S3, and the way of each daemon to the database."""
LENGTH_S = 4.0
"""Faults begin within this time."""
MOST, STORM = 12, 60
"""Most faults of a schedule, and of a storm."""
EFFECTS_S = 4.0
"""The effects that a death waits for come in this time, or it does not happen."""
ROUNDS = 6
ENDLESS = 100_000
"""Rounds of a run that is ended before."""


class Fault(Protocol):
    """One fault: when it begins, when it is over, and what it does."""

    @property
    def at_s(self) -> float: ...
    @property
    def over_s(self) -> float: ...
    def begin(self, world: Any) -> None: ...
    def end(self, world: Any) -> None: ...


@dataclass(frozen=True)
class _Lasting:
    at_s: float

    @property
    def over_s(self) -> float:
        """The moment at which it is over."""
        return self.at_s + self.for_s  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Kill(_Lasting):
    """A process is killed at a moment, or before one of its effects that follow; it is started again after a while."""

    machine: str
    for_s: float
    effects: int | None = None
    power: bool = False
    within_s: float = EFFECTS_S

    @property
    def over_s(self) -> float:
        return self.at_s + self.for_s + (0.0 if self.effects is None else self.within_s)

    def begin(self, world: Any) -> None:
        machine = world.machines[self.machine]
        if self.effects is None:
            machine.kill(self.for_s, power=self.power)
            return
        machine.away_s, machine.loses_power = self.for_s, self.power
        machine.switches.look()
        machine.dies_before(machine.switches.effects + self.effects)

    def end(self, world: Any) -> None:
        """Nothing: the machine starts its process itself."""


@dataclass(frozen=True)
class Restart(_Lasting):
    """A process is asked to end, and started again after a while."""

    machine: str
    for_s: float

    def begin(self, world: Any) -> None:
        if not world.machines[self.machine].is_stopped:
            world.machines[self.machine].leave(self.for_s)

    def end(self, world: Any) -> None:
        """Nothing: likewise."""


@dataclass(frozen=True)
class Stop(_Lasting):
    """A process stands still for a while."""

    machine: str
    for_s: float

    def begin(self, world: Any) -> None:
        world.machines[self.machine].is_stopped = True
        world.machines[self.machine].signal(signal.SIGSTOP)

    def end(self, world: Any) -> None:
        world.machines[self.machine].is_stopped = False
        world.machines[self.machine].signal(signal.SIGCONT)


@dataclass(frozen=True)
class Line(_Lasting):
    """Something happens on the line of a client, or on one of several daemons: see `proxy`."""

    client: str
    for_s: float
    what: str
    amount: float = 0.0

    def begin(self, world: Any) -> None:
        world.line(self.client, self.what, self.amount)

    def end(self, world: Any) -> None:
        world.line(self.client, "heal")


@dataclass(frozen=True)
class Full(_Lasting):
    """A disk is full for a while, but for some bytes."""

    machine: str
    for_s: float
    left_bytes: int

    def begin(self, world: Any) -> None:
        world.machines[self.machine].fill(self.left_bytes)

    def end(self, world: Any) -> None:
        world.machines[self.machine].fill(None)


@dataclass(frozen=True)
class Unforced(_Lasting):
    """Some syncs fail."""

    machine: str
    times: int
    for_s: float = 0.0

    def begin(self, world: Any) -> None:
        switches = world.machines[self.machine].switches
        switches.failing += self.times
        switches.order()

    def end(self, world: Any) -> None:
        switches = world.machines[self.machine].switches
        switches.look()
        switches.failing = switches.failed
        switches.order()


@dataclass(frozen=True)
class Jump(_Lasting):
    """A clock jumps, and stays wrong."""

    machine: str
    by_s: float
    for_s: float = 0.0

    def begin(self, world: Any) -> None:
        switches = world.machines[self.machine].switches
        switches.wall_s += self.by_s
        switches.order()

    def end(self, world: Any) -> None:
        """Nothing."""


@dataclass(frozen=True)
class Schedule:
    """The faults of one world.

    Attributes:
        name: A seed; `storm SEED`, which has many faults; `several SEED`, with three daemons; `MACHINE EFFECT [power]`,
            a death before that effect; `undisturbed`; `disks that lie`.
        faults: In their order.
        own_disks: True if each machine has a disk of a size, in memory, whose power can fail.
        rounds: Rounds of the run.
        disks_lie: True for disks that say that they forced what they did not.
        is_secured: True if all speak TLS, and clients renew their certificates meanwhile.
        longest_training_s: Longest time that a training takes.
        wanted: Updates that a round closes with.
        is_buffered: True for versions that are made of updates of any age.
        has_store: True if received updates are kept in another place too.
        are_several: True for three daemons on one PostgreSQL and one S3, behind one address.
        patience_s: The run is complete so long after the last fault, or something hangs.
    """

    name: str
    faults: tuple[Fault, ...] = ()
    own_disks: bool = False
    rounds: int = ROUNDS
    disks_lie: bool = False
    is_secured: bool = False
    longest_training_s: float = 0.3
    wanted: int = len(CLIENTS)
    is_buffered: bool = False
    has_store: bool = False
    are_several: bool = False
    patience_s: float = 60.0

    @classmethod
    def named(cls, name: str) -> Schedule:
        """Returns the schedule of a seed, or of a name."""
        if name == "undisturbed":
            return cls(name, longest_training_s=0.0)
        if name == "disks that lie":
            deaths = tuple(Kill(2.0 * (n + 1), "server", 0.1, power=True) for n in range(8))
            return cls(name, deaths, own_disks=True, disks_lie=True, patience_s=15.0)
        if name.isdecimal():
            return cls.drawn(int(name))
        if name.startswith("storm "):
            return cls.drawn(int(name.removeprefix("storm ")), STORM, 2 * LENGTH_S)
        if name.startswith("several "):
            return cls.drawn_for_several(int(name.removeprefix("several ")))
        machine, effect, *power = name.split()
        death = Kill(0.0, machine, 0.3, int(effect), power=bool(power), within_s=60.0)
        return cls(name, (death,), own_disks=bool(power))

    @classmethod
    def drawn(cls, seed: int, most: int = MOST, length_s: float = LENGTH_S) -> Schedule:
        """Draws a schedule; one of two has disks that get full and lose what was not forced.

        Every fourth is of a run whose rounds close with three of four updates: others are late, and which is chance.
        Every fifth is of buffered rounds, every third over TLS; of every seventh the updates lie in another place too.
        """
        draw = random.Random(f"chaos {seed}")
        own_disks = draw.random() < 0.5
        faults = [_fault(draw, own_disks, length_s) for _ in range(draw.randint(most // 6, most))]
        in_order = tuple(sorted(faults, key=lambda fault: fault.at_s))
        return cls(
            str(seed),
            in_order,
            own_disks,
            wanted=2 if seed % 5 == 0 else len(CLIENTS) - (seed % 4 == 0),
            is_buffered=seed % 5 == 0,
            is_secured=seed % 3 == 0,
            has_store=seed % 7 == 0,
        )

    @classmethod
    def drawn_for_several(cls, seed: int) -> Schedule:
        """Draws a schedule for three daemons, half of it of faults of theirs and of what they share.

        Kinds of runs are as in `drawn`; disks are good, as what counts lies in the database and the bucket.
        """
        draw = random.Random(f"chaos several {seed}")
        plain = cls.drawn(seed)
        faults = [_fault_of_several(draw) for _ in range(draw.randint(3, MOST))]
        return replace(
            plain,
            name=f"several {seed}",
            faults=tuple(sorted(faults, key=lambda fault: fault.at_s)),
            own_disks=False,
            has_store=False,
            are_several=True,
            patience_s=120.0,
        )

    @property
    def is_exact(self) -> bool:
        """True if the data alone decide the bits: each round has all updates, and the run comes to its end."""
        return self.wanted == len(CLIENTS) and self.rounds < ENDLESS


def _fault(draw: random.Random, own_disks: bool, length_s: float) -> Fault:
    at, machine = draw.uniform(0.1, length_s), draw.choice(MACHINES)
    for_s = draw.choice((0.05, 0.5, draw.uniform(0.0, 3.0)))
    kind = draw.random()
    if own_disks and kind < 0.2:
        return Full(at, machine, for_s, draw.choice((0, 4096, 65536, 500_000)))
    if kind < 0.3:
        return Unforced(at, machine, draw.randint(1, 4), 2.0)
    if kind < 0.35:
        return Jump(at, machine, draw.choice((-3600.0, -5.0, 5.0, 3600.0)))
    if kind < 0.65:
        effects = draw.choice((None, draw.randint(0, 20), draw.randint(0, 120)))
        return Kill(at, machine, for_s, effects, own_disks and draw.random() < 0.7)
    if kind < 0.7:
        return Restart(at, machine, for_s)
    if kind < 0.8:
        return Stop(at, machine, for_s)
    return _line(draw, at, for_s)


def _fault_of_several(draw: random.Random) -> Fault:
    at, for_s = draw.uniform(0.1, LENGTH_S), draw.choice((0.05, 0.5, draw.uniform(0.0, 3.0)))
    machine, kind = draw.choice((*DAEMONS, *DAEMONS, *LINKS)), draw.random()
    if kind < 0.3:
        effects = draw.choice((None, draw.randint(0, 20), draw.randint(0, 120)))
        return Kill(at, machine, for_s, effects)
    if kind < 0.4:
        return Stop(at, machine, draw.choice((for_s, draw.uniform(3.0, 6.0))))
    if kind < 0.5:
        return Restart(at, machine, for_s)
    if kind < 0.55:
        return Jump(at, machine, draw.choice((-3600.0, -5.0, 5.0, 3600.0)))
    if kind < 0.65:
        return Restart(at, POSTGRES, draw.choice((0.0, for_s)))
    if kind < 0.85:
        what = draw.choice(("cut", "cut", "reset", "stall", "delay"))
        amount = {"stall": float(draw.randint(1, 3)), "delay": 0.02}.get(what, 0.0)
        return Line(at, draw.choice(PLACES[1:]), for_s, what, amount)
    return _line(draw, at, for_s)


def _line(draw: random.Random, at: float, for_s: float) -> Line:
    what = draw.choice(("cut", "reset", "stall", "delay", "throttle", "truncate", "repeat"))
    amount = {
        "stall": float(draw.randint(1, 3)),
        "delay": draw.choice((0.02, 0.2)),
        "throttle": draw.choice((50_000.0, 500_000.0)),
        "truncate": float(draw.randint(0, 300_000)),
    }.get(what, 0.0)
    return Line(at, draw.choice(LINKS), for_s, what, amount)
