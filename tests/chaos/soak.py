"""Memory, open files and disk of real processes that work for a long time, under faults, as fast as they can.

    python -m chaos.soak --minutes 40 [--seed 1] [--out soak.json] [--plot soak.svg]

A daemon with `--keep-versions 4`, four clients and an evaluator hold rounds without a pause. Every 29 s a client or the
evaluator is killed, a process is stopped for a while, or a line is cut; the daemon is never killed, so that what it
holds is of its whole life. Each process is looked at every 5 s. What is said of it are the medians of the second
fifth of its time and of the last one: the first is left out, in which caches fill.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedpeft_server import __main__ as server_command

from . import grpc_environment  # noqa: F401
from .goodput import Stretch, drawn
from .mains import CLIENTS
from .schedule import ENDLESS, Fault, Kill, Schedule

EVERY_S = 5.0
KEPT = 4
"""Versions that the daemon keeps, beside the first one and the best."""
FIFTHS = 5
MEBIBYTE = 2.0**20


@dataclass(frozen=True)
class Sample:
    """A look at a process: its memory of its own in MiB, open files, bytes of its disk in MiB, and its database's."""

    at_s: float
    machine: str
    life: int
    memory_mib: float
    files: int
    disk_mib: float
    database_mib: float


def serve(data: Path, port: int) -> int:
    """Runs the daemon, which keeps few versions."""
    where = ["--data-dir", str(data), "--listen", f"127.0.0.1:{port}", "--metrics", "", "--keep-versions", str(KEPT)]
    sys.argv = ["fedpeft-server", *where, "--drain-s", "1", "--log-format", "json", "--log-level", "warning"]
    server_command.main()
    return 0


class Soak(Stretch):
    """A stretch whose processes are looked at."""

    def __init__(self, schedule: Schedule, place: Path, length_s: float) -> None:
        super().__init__(schedule, place, length_s)
        self.samples: list[Sample] = []
        self._begun = time.monotonic()
        self._looked = 0.0

    def _serve(self, name: str, port: int, disk: Path) -> int:
        return serve(disk / "data", port)

    def _until(self, reached: Callable[[], Any], until: float, why: str) -> None:
        def looked() -> Any:
            if time.monotonic() - self._looked >= EVERY_S:
                self._looked = time.monotonic()
                self._look()
            return reached()

        super()._until(looked, until, why)

    def _look(self) -> None:
        for machine in self.machines.values():
            if machine.pid is None:
                continue
            # Not rglob: it stumbles over a folder that goes meanwhile.
            disk = [Path(at, name) for at, _, names in os.walk(machine.disk.path) for name in names]
            sizes = {path: size for path in disk if (size := _size(path)) is not None}
            try:
                memory, files = _own_memory(machine.pid), len(os.listdir(f"/proc/{machine.pid}/fd"))
            except (FileNotFoundError, ProcessLookupError):  # it has died meanwhile
                continue
            database = sum(size for path, size in sizes.items() if path.name.startswith("fedpeft.db"))
            at_s = time.monotonic() - self._begun
            facts = memory / MEBIBYTE, files, sum(sizes.values()) / MEBIBYTE, database / MEBIBYTE
            self.samples.append(Sample(at_s, machine.name, machine.lives, *facts))

    def _verify(self, run: str) -> list[str]:
        return []  # most versions are gone, and so are the updates; the oracle looks at what the database says


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_blocks * 512
    except FileNotFoundError:
        return None


def _own_memory(pid: int) -> int:
    """Returns the bytes of memory that a process shares with no other."""
    rows = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(row.split()[1]) * 1024 for row in rows if row.startswith("Private_"))


def gentle(faults: Sequence[Fault]) -> tuple[Fault, ...]:
    """Returns faults with a client killed in place of the daemon."""
    found = []
    for number, fault in enumerate(faults):
        if isinstance(fault, Kill) and fault.machine == "server":
            fault = Kill(fault.at_s, CLIENTS[number % len(CLIENTS)], fault.for_s)
        found.append(fault)
    return tuple(found)


def told(samples: Sequence[Sample], machine: str, length_s: float) -> str:
    """Returns a line about a machine: each figure at the beginning and at the end."""
    own = [sample for sample in samples if sample.machine == machine]
    early = [s for s in own if length_s / FIFTHS <= s.at_s < 2 * length_s / FIFTHS]
    late = [s for s in own if s.at_s >= length_s * (FIFTHS - 1) / FIFTHS]
    words = []
    for name in ("memory_mib", "files", "disk_mib", "database_mib"):
        before, after = (statistics.median(getattr(s, name) for s in part) for part in (early, late))
        words.append(f"{name} {before:.1f} -> {after:.1f}")
    return f"{machine:7} " + ", ".join(words)


def plot(samples: Sequence[Sample], path: Path) -> None:
    """Draws the daemon's figures over time."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    own = [sample for sample in samples if sample.machine == "server"]
    figure, axes = pyplot.subplots(1, 3, figsize=(11, 3), layout="constrained")
    minutes = [sample.at_s / 60 for sample in own]
    for axis, name, title in zip(
        axes,
        ("memory_mib", "files", "disk_mib"),
        ("memory of its own, MiB", "open files", "disk without the database, MiB"),
        strict=True,
    ):
        values = [getattr(s, name) - (s.database_mib if name == "disk_mib" else 0) for s in own]
        axis.plot(minutes, values, linewidth=1)
        axis.set_title(title)
        axis.set_xlabel("minutes")
        axis.set_ylim(bottom=0)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=40.0)
    parser.add_argument("--training", type=float, default=0.2, help="longest time that a training takes, in seconds")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    chosen = parser.parse_args()
    length_s = chosen.minutes * 60
    faults = gentle(drawn(chosen.seed, length_s))
    schedule = Schedule("soak", faults, rounds=ENDLESS, longest_training_s=chosen.training, wanted=3)
    with tempfile.TemporaryDirectory(prefix="soak-") as place:
        soak = Soak(schedule, Path(place), length_s)
        outcome = soak.hold()
    deaths, load = outcome.deaths, os.getloadavg()[0]
    print(f"{len(outcome.committed)} rounds in {chosen.minutes:g} minutes, {deaths} deaths, load {load:.1f}")
    for machine in soak.machines:
        print(told(soak.samples, machine, length_s))
    print("\n".join([*outcome.notes, *outcome.faults]) if outcome.faults else "lost 0, doubled 0")
    if chosen.out:
        chosen.out.write_text(json.dumps([asdict(sample) for sample in soak.samples]))
    if chosen.plot:
        plot(soak.samples, chosen.plot)
    sys.exit(bool(outcome.faults))


if __name__ == "__main__":
    main()
