"""Rounds that real processes commit under faults, beside those of another federation without, at the same time.

    python -m chaos.goodput --minutes 30 [--training 4] [--wanted 3] [--seed 1]

Every 29 s a process is killed or stopped, or a line is cut, by a seed. All durations of the processes are a user's.
Afterwards each receipt must count once, and `fedpeft run verify` must fold each round again to the same bits.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from . import (
    grpc_environment,  # noqa: F401
)
from .mains import CLIENTS
from .schedule import ENDLESS, LINKS, Fault, Kill, Line, Schedule, Stop
from .world import Outcome, World, begun

EVERY_S = 29.0
AWAY_S = 1.0
"""A supervisor starts a killed process again after this time."""
LONGEST_S = 5.0
"""Longest stop and longest cut."""


def drawn(seed: int, length_s: float) -> tuple[Fault, ...]:
    """Draws a fault for every 29 s."""
    draw = random.Random(f"goodput {seed}")
    faults: list[Fault] = []
    for number in range(1, int(length_s / EVERY_S) + 1):
        at, kind, machine = number * EVERY_S, draw.choice("ksp"), draw.choice(("server", *CLIENTS, "e"))
        for_s = draw.uniform(1.0, LONGEST_S)
        if kind == "k":
            faults.append(Kill(at, machine, AWAY_S))
        elif kind == "s":
            faults.append(Stop(at, machine, for_s))
        else:
            faults.append(Line(at, draw.choice(LINKS), for_s, draw.choice(("cut", "stall")), 3.0))
    return tuple(fault for fault in faults if fault.over_s < length_s)


class Stretch(World):
    """A world that is held for a time, whatever its run has come to.

    Args:
        schedule: Its faults.
        place: An empty folder.
        length_s: Its time, from the first committed round on.
    """

    def __init__(self, schedule: Schedule, place: Path, length_s: float) -> None:
        super().__init__(schedule, place)
        self._length_s = length_s

    def hold(self) -> Outcome:
        """Holds it, and looks at what it left."""
        outcome = Outcome()
        self._begin()
        self._until(lambda: self._word("version"), time.monotonic() + 60.0, "no round was committed")
        begun = time.monotonic()
        self._plan(begun)
        self._until(lambda: time.monotonic() >= begun + self._length_s, begun + self._length_s + 60.0, "")
        words = [word for word in self._words() if "version" in word]
        self._place.joinpath("stop").touch()
        self._until(lambda: self._word("stopped") is not None, time.monotonic() + 60.0, "the run was not stopped")
        outcome.faults += self._verify(str(self._word("run")))
        self._end()
        for before, word in itertools.pairwise(words):  # who looks now and then may see two at once
            outcome.committed += [word["at"] - begun] * (word["version"] - before["version"])
        return self._judged(outcome)


def stretch(name: str, faults: tuple[Fault, ...], chosen: argparse.Namespace) -> Callable[[], Outcome]:
    """Begins a stretch in a process of its own; returns the function that waits for its end."""
    schedule = Schedule(name, faults, rounds=ENDLESS, longest_training_s=chosen.training, wanted=chosen.wanted)
    return begun(schedule, lambda schedule, place: Stretch(schedule, place, chosen.minutes * 60))


def _told(wait_s: float, at: float, faults: Sequence[Fault]) -> str:
    """Returns a wait with the faults in it."""
    within = [fault for fault in faults if at <= fault.at_s <= at + wait_s]
    kinds = [f"{type(f).__name__} of {getattr(f, 'machine', getattr(f, 'client', ''))}" for f in within]
    return f"{wait_s:.1f} s ({', '.join(kinds) or 'nothing'})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--training", type=float, default=4.0, help="longest time that a training takes, in seconds")
    parser.add_argument("--wanted", type=int, default=len(CLIENTS) - 1, help="updates a round closes with, of 4")
    parser.add_argument("--seed", type=int, default=1)
    chosen = parser.parse_args()
    faults = drawn(chosen.seed, chosen.minutes * 60)
    print(f"faults: {dict(Counter(type(fault).__name__ for fault in faults))}", flush=True)
    committed = {}
    stretches = {
        name: (happening, stretch(name, happening, chosen))
        for name, happening in (("without faults", ()), ("under faults", faults))
    }
    for name, (happening, ended) in stretches.items():  # at the same time, so that the machine is as busy for both
        outcome = ended()
        committed[name] = len(outcome.committed)
        print(f"{name}: {len(outcome.committed)} rounds, {outcome.cpu_s:.0f} s of CPU, load {os.getloadavg()[0]:.1f}")
        waits = [(after - before, before) for before, after in itertools.pairwise(outcome.committed)]
        print(
            f"longest waits for a round: {', '.join(_told(wait, at, happening) for wait, at in sorted(waits)[:-6:-1])}"
        )
        print("\n".join(outcome.faults) or "lost 0, doubled 0, every round folds again to the same bits", flush=True)
    print(f"goodput: {committed['under faults'] / committed['without faults']:.3f}")


if __name__ == "__main__":
    main()
