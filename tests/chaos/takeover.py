"""Time until another of three daemons commits a round after the one that folds it was killed in the middle.

    python -m chaos.takeover [--times 10]

The S3 answers late, so that a fold takes a while; all durations of the processes are a user's. Afterwards each receipt
must count once, and `fedpeft run verify` folds each round again to the same bits.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import statistics
import tempfile
import time
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fedpeft_server.store.notices import notices

from . import (
    grpc_environment,  # noqa: F401
    shared_places,
)
from .schedule import ENDLESS, S3, Schedule
from .world import Outcome, World

DELAY_S = 0.15
"""Delay of all that passes to and from the S3."""
AWAY_S = 1.0
"""A supervisor starts a killed daemon again after this time."""
BOUND_S = 120.0
"""A wait that is longer is a hang."""


@dataclass(frozen=True)
class Taken:
    """A lease that another daemon took over: seconds since its holder was killed, until that and until the commit."""

    killed: str
    by: str
    lease_s: float
    commit_s: float


class Takeover(World):
    """A world in which the daemon that folds is killed again and again.

    Args:
        place: An empty folder.
        times: Deaths in the middle of a fold.
    """

    def __init__(self, place: Path, times: int) -> None:
        super().__init__(Schedule("takeover", are_several=True, rounds=ENDLESS, longest_training_s=0.2), place)
        self._times = times
        self.taken: list[Taken] = []

    def _serve(self, name: str, port: int, disk: Path) -> int:
        # The lease names its holder by this.
        notices.secrets = SimpleNamespace(token_hex=lambda _: f"{name}.{secrets.token_hex(2)}")  # type: ignore[attr-defined]
        return super()._serve(name, port, disk)

    def kill_those_that_fold(self) -> list[str]:
        """Holds the world; returns the promises that were broken."""
        self._begin()
        self._await(lambda: self._word("version"), "no round was committed")
        self.line(S3, "delay", DELAY_S)
        assert self._shared is not None
        with closing(self._shared.read()) as read:
            while len(self.taken) < self._times:
                self._kill_one(read)
        self.line(S3, "heal")
        self._place.joinpath("stop").touch()
        self._await(lambda: self._word("stopped") is not None, "the run was not stopped")
        outcome = Outcome(self._verify(str(self._word("run"))))
        self._end()
        return self._judged(outcome).faults

    def _kill_one(self, read: Any) -> None:
        """Kills the holder of the lease once a fold has begun, and waits for the commit of another daemon."""
        (before,) = read.execute("select max(version) from versions").fetchone()
        (known,) = read.execute("select coalesce(max(epoch), 0) from leases").fetchone()
        held: list[tuple[str, int]] = []

        def folds() -> bool:
            held[:] = read.execute("select holder, epoch from leases where epoch > %s", (known,)).fetchall()
            return bool(held)

        self._await(folds, "nobody folds")
        (holder, epoch), killed = held[0], time.monotonic()
        name = holder.partition(".")[0]
        self.machines[name].kill(AWAY_S, power=False)
        (now,) = read.execute("select max(version) from versions").fetchone()
        if now > before:
            return  # it was committed as this looked
        by: list[tuple[str]] = []

        def is_taken() -> bool:
            by[:] = read.execute("select holder from leases where epoch > %s", (epoch,)).fetchall()
            return bool(by)

        self._await(is_taken, "nobody takes the lease over")
        lease_s = time.monotonic() - killed
        committed = "select max(version) from versions"
        self._await(lambda: read.execute(committed).fetchone()[0] > before, "nobody commits")
        self.taken.append(Taken(holder, by[0][0], round(lease_s, 2), round(time.monotonic() - killed, 2)))
        print(json.dumps(asdict(self.taken[-1])), flush=True)

    def _await(self, reached: Any, why: str) -> None:
        self._until(reached, time.monotonic() + BOUND_S, why)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=10)
    chosen = parser.parse_args()
    shared_places.prepare()
    with tempfile.TemporaryDirectory(prefix="chaos-takeover-", ignore_cleanup_errors=True) as place:
        world = Takeover(Path(place), chosen.times)
        faults = world.kill_those_that_fold()
    for what in ("lease_s", "commit_s"):
        values = sorted(getattr(taken, what) for taken in world.taken)
        print(f"{what}: median {statistics.median(values):.2f}, longest {values[-1]:.2f}, of {len(values)}")
    print(f"load {os.getloadavg()[0]:.1f}")
    print("\n".join(faults) or "lost 0, doubled 0, every round folds again to the same bits", flush=True)
    raise SystemExit(bool(faults))


if __name__ == "__main__":
    main()
