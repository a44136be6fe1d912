"""Rounds of simulated clients beside Flower's and pfl's simulations and a bare PyTorch loop.

    python benchmarks/simulators.py [--clients 8] [--rounds 8] [--repeat 3]

All train the same: the first 4 blocks of a random ViT-tiny at 64 pixels, biases and head tuned, each client an epoch of
48 images in batches of 16 by Nesterov SGD, plain federated averaging, no evaluation (`peers/same_work.py`). Each peer
has an environment of its own, made on first use in build/peers, which borrows torch and timm from this one. Every case
is a fresh process with a thread of torch for each client at work, and the cases take turns. Printed are the seconds
until the first round has ended, from the start of the process; the median of the rounds after it; and the median ratio
of that to the bare loop's in the same turn. Flower and `processes` train on two cores at once, the others on one.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
PEERS = {
    "flower": ["flwr[simulation]==1.42.*"],
    "pfl": ["pfl==0.6.*", "prv-accountant==0.2.*"],
    "nvflare": ["nvflare==2.9.*"],
}
"""Requirements of a peer's environment; those of pfl are taken alone, for it names other versions of what is shared."""
OURS = {f"FedPEFT, {engine}": engine for engine in ("inprocess", "batched", "processes")}


def environment(name: str) -> str:
    """Makes the environment of a peer, unless it is there; returns its Python."""
    place = HERE.parent / "build" / "peers" / name
    python = place / "bin" / "python"
    if not (place / "complete").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", place], check=True)
        alone = ["--no-deps"] if name == "pfl" else []
        subprocess.run([python, "-m", "pip", "install", "-q", *alone, *PEERS[name]], check=True)
        (site,) = place.glob("lib/python*/site-packages")
        (site / "zz_borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")  # after its own: its versions win
        (place / "complete").touch()
    return str(python)


def rounds_of(command: Sequence[str], clients: int, rounds: int, **more: str) -> list[float]:
    """Runs a case; returns the seconds of its rounds, the first from the start of the process.

    Raises:
        RuntimeError: If it fails, with the end of what it said.
    """
    settings = {"CLIENTS": str(clients), "ROUNDS": str(rounds), "PYTHONPATH": str(HERE / "peers")}
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "RAY_DEDUP_LOGS": "1"}
    began = time.time()
    ended = subprocess.run(
        command, env={**os.environ, **settings, **quiet, **more}, cwd=HERE / "peers", capture_output=True, text=True
    )
    lines = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith('{"round"')]
    if ended.returncode or len(lines) != rounds:
        raise RuntimeError(
            f"{' '.join(command)} ended with {ended.returncode}:\n{(ended.stdout + ended.stderr)[-2000:]}"
        )
    ends = [line["at"] for line in lines]
    return [ends[0] - began, *(after - before for before, after in itertools.pairwise(ends))]


def cases() -> dict[str, tuple[list[str], dict[str, str]]]:
    """Returns the command of each case, and what its environment has besides."""
    found: dict[str, tuple[list[str], dict[str, str]]] = {"bare loop": ([sys.executable, "bare.py"], {})}
    found |= {case: ([sys.executable, "ours.py"], {"ENGINE": engine}) for case, engine in OURS.items()}
    found["pfl 0.6"] = ([environment("pfl"), "pfl_simulation.py"], {})
    found["Flower 1.42"] = ([environment("flower"), "-c", "import flower; flower.run()"], {})
    return found


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"clients": 8, "rounds": 8, "repeat": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    chosen = cases()
    first: dict[str, list[float]] = {name: [] for name in chosen}
    later: dict[str, list[float]] = {name: [] for name in chosen}
    for _ in range(args.repeat):
        for name, (command, more) in chosen.items():
            times = rounds_of(command, args.clients, args.rounds, **more)
            first[name].append(times[0])
            later[name].append(statistics.median(times[1:]))
    print(f"{vars(args)}; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    print("| case | until the first round has ended, s | a later round, s | over the bare loop |")
    print("|---|--:|--:|--:|")
    for name in chosen:
        ratio = statistics.median(one / bare for one, bare in zip(later[name], later["bare loop"], strict=True))
        print(f"| {name} | {statistics.median(first[name]):.1f} | {statistics.median(later[name]):.3f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
