"""The process that holds the rounds is killed, and the one that clients talk to: ours beside two others.

    python benchmarks/kills/kills.py [--only ours,flower,nvflare] [--repeat 1]

Three clients, eight rounds. After the second a process is killed outright (SIGKILL); three seconds later whatever a
person had started is started again with the same command, as a service manager does, and nobody does anything else. A
run that shows no further round in three minutes counts as stuck. Peers have environments of their own, made on first
use in build/peers.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

BENCHMARKS = Path(__file__).parents[1]
sys.path[:0] = [str(BENCHMARKS), str(BENCHMARKS / "federations")]

import ours  # noqa: E402
import peers  # noqa: E402
from outcome import CLIENTS, ROUNDS, Outcome  # noqa: E402
from simulators import environment  # noqa: E402

from fedpeft_operator.federation.process_group import free_ports  # noqa: E402

Case = tuple[str, Callable[[Path], Outcome]]


def _port() -> int:
    """Returns a port with free ones after it, as far as can be known."""
    return free_ports(1)[0]


def of_ours() -> Iterator[Case]:
    """Yields our cases."""
    with tempfile.TemporaryDirectory() as folder:
        undisturbed = ours.tensors(Path(folder), _port())
    for victim in ("server", "site1"):
        yield f"FedPEFT: {victim}", lambda place, v=victim: ours.measure(place, _port(), v, undisturbed)


def of_flower() -> Iterator[Case]:
    """Yields Flower's cases."""
    programs = Path(environment("flower")).parent
    for isolation in ("subprocess", "process"):
        for victim in ("SuperLink", "ServerApp"):
            name = f"Flower 1.42, isolation {isolation}: {victim}"
            yield name, lambda place, i=isolation, v=victim: peers.measure_flower(place, programs, _port(), i, v)


def of_nvflare() -> Iterator[Case]:
    """Yields NVFlare's cases."""
    programs = Path(environment("nvflare")).parent
    for victim in ("server", "job"):
        yield f"NVFlare 2.9: {victim}", lambda place, v=victim: peers.measure_nvflare(place, programs, v)


CASES = {"ours": of_ours, "flower": of_flower, "nvflare": of_nvflare}


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(CASES), help="frameworks, with commas between")
    parser.add_argument("--repeat", type=int, default=1, help="times that each case is held")
    chosen = parser.parse_args()
    print("| killed | rounds | updates counted | status at the end | right result | next round after, s |")
    print("|---|--:|--:|---|---|--:|", flush=True)
    for framework in chosen.only.split(","):
        for name, hold in CASES[framework]():
            for _ in range(chosen.repeat):
                with tempfile.TemporaryDirectory() as folder:
                    found = hold(Path(folder).resolve())
                after = "never" if found.pause_s is None else f"{found.pause_s:.0f}"
                counts = f"{found.rounds} of {ROUNDS} | {found.updates} of {ROUNDS * CLIENTS}"
                right = "yes" if found.right else "no"
                print(f"| {name} | {counts} | {found.status} | {right} | {after} |", flush=True)


if __name__ == "__main__":
    main()
