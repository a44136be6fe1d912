"""Rounds of a simulation as its clients grow, of which at most 64 train in a round.

    python benchmarks/population.py [--clients 8 64 512 4096] [--rounds 6] [--repeat 3]

Each case is a fresh process with one thread: a ViT-tiny of 2 blocks at 32 pixels under bias tuning, 8 images of noise a
client in one parquet file, which `[simulation]` divides; one step a client, no evaluation. Printed are the seconds
until the first round has ended, from the start of the process, the median of the rounds after it for each client that
trained, and the most memory at a round's end, without
the mapped file's pages. The cases take turns.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

IMAGES, CLASSES, SIDE, TRAINED = 8, 10, 32, 64


def write_images(clients: int, place: Path) -> Path:
    """Writes a parquet file with the images of all clients."""
    import numpy as np
    import pyarrow
    import pyarrow.parquet
    from PIL import Image

    draw = np.random.Generator(np.random.PCG64(0))
    encoded = []
    for _ in range(clients * IMAGES):
        kept = io.BytesIO()
        Image.fromarray(draw.integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(kept, "PNG", compress_level=1)
        encoded.append({"bytes": kept.getvalue(), "path": None})
    labels = [str(row % CLASSES) for row in range(clients * IMAGES)]
    place.mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.table({"image": encoded, "label": labels}), place / "train.parquet")
    return place / "train.parquet"


def hold(clients: int, rounds: int, data: Path) -> None:
    """Holds the simulation of a case; prints its times and its most memory."""
    began = float(os.environ["BEGAN"])
    import torch

    from fedpeft.config import parse_config
    from fedpeft.simulation import clients_of, simulate

    torch.set_num_threads(1)
    config = parse_config(
        {
            "name": "population",
            "model": {
                "name": "vit_tiny_patch16_224",
                "weights": "none",
                "image_size": SIDE,
                "depth": 2,
                "classes": [str(label) for label in range(CLASSES)],
            },
            "peft": {"method": "bias"},
            "rounds": {"count": rounds, "clients": min(clients, TRAINED)},
            "training": {"batch_size": IMAGES, "augmentation": "none", "precision": "float32"},
            "simulation": {"clients": clients, "partition": "iid"},
        }
    )
    members, _ = clients_of(data, config)
    rounds_held = []
    with tempfile.TemporaryDirectory() as out:
        simulate(
            config,
            members,
            Path(out),
            committed=lambda _: rounds_held.append((time.time() - began, anonymous_bytes())),
            device="cpu",
        )
    ends, held = zip(*rounds_held, strict=True)
    print(json.dumps({"ends": ends, "held": max(held)}))


def anonymous_bytes() -> int:
    """Returns the memory of this process that no file stands behind."""
    (line,) = (each for each in Path("/proc/self/status").read_text().splitlines() if each.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def measured(clients: int, rounds: int, data: Path) -> tuple[float, float, float]:
    """Returns seconds until the first round's end, seconds of a later round for each who trained, and MB at most."""
    command = [sys.executable, __file__, "--hold", str(data), "--clients", str(clients), "--rounds", str(rounds)]
    done = subprocess.run(
        command, env={**os.environ, "BEGAN": str(time.time())}, capture_output=True, text=True, check=True
    )
    said = json.loads(done.stdout.splitlines()[-1])
    later = [after - before for before, after in itertools.pairwise(said["ends"])]
    return said["ends"][0], statistics.median(later) / min(clients, TRAINED), said["held"] / 1e6


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[8, 64, 512, 4096])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--hold", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.hold:
        hold(args.clients[0], args.rounds, args.hold)
        return
    with tempfile.TemporaryDirectory() as name:
        files = {clients: write_images(clients, Path(name) / str(clients)) for clients in args.clients}
        found: dict[int, list[tuple[float, float, float]]] = {clients: [] for clients in args.clients}
        for _ in range(args.repeat):
            for clients, file in files.items():
                found[clients].append(measured(clients, args.rounds, file))
    print(f"{args.rounds} rounds, {args.repeat} times; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    print("| clients | train in a round | until the first round has ended, s | a client's turn, ms | memory, MB |")
    print("|--:|--:|--:|--:|--:|")
    for clients, rows in found.items():
        first, turn, memory = (statistics.median(column) for column in zip(*rows, strict=True))
        print(f"| {clients:,} | {min(clients, TRAINED)} | {first:.1f} | {1000 * turn:.1f} | {memory:.0f} |")


if __name__ == "__main__":
    main()
