"""Times of simulated rounds with `[training] keep_features` and without it, for head tuning and the last block.

    python benchmarks/kept_features.py [--repeat 3] [--rounds 4] [--clients 4] [--depth 12] [--epochs 1]

Every case is a fresh process with one of torch's threads, engine `inprocess`, and the cases take turns. The model is a
random ViT-tiny at 64 pixels; each client has 48 images of noise, in batches of 16. Printed are, by method, the first
round, in which features are computed, and the median of the later ones, with and without; the median of the ratios of
the same turn; and the largest difference between the two adapters.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from engines import IMAGES, SIDE, images
from numpy.typing import NDArray
from safetensors.numpy import load_file

METHODS = ("head", "partial")
RUN_FILE = """
[model]
name = "vit_tiny_patch16_224"
weights = "none"
image_size = {side}
depth = {depth}
classes = ["cat", "dog"]
[peft]
method = "{method}"
[rounds]
count = {rounds}
clients = {clients}
[training]
batch_size = 16
epochs = {epochs}
augmentation = "none"
keep_features = {keep}
[simulation]
clients = {clients}
"""


@dataclass(frozen=True)
class Found:
    """Measurements of one run.

    Attributes:
        first_s: Seconds of the first round.
        later_s: Median of the later ones, seconds.
        tensors: The adapter.
    """

    first_s: float
    later_s: float
    tensors: dict[str, NDArray[np.float32]]


def measure(method: str, keep: bool, data: Path, args: argparse.Namespace) -> Found:
    """Runs a case once."""
    with tempfile.TemporaryDirectory() as folder:
        run, out = Path(folder) / "run.toml", Path(folder) / "out"
        sizes = {name: getattr(args, name) for name in ("depth", "rounds", "clients", "epochs")}
        run.write_text(RUN_FILE.format(method=method, keep=str(keep).lower(), side=SIDE, **sizes))
        asked = ["simulate", str(run), "--data", str(data), "--out", str(out), "--threads", "1", "--device", "cpu"]
        command = [sys.executable, "-m", "fedpeft_operator.app", *asked, "--json"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        report = json.loads((out / "report.json").read_text())
        seconds = [row["seconds"] for row in report["rounds"]]
        return Found(seconds[0], statistics.median(seconds[1:]), load_file(out / "adapter.safetensors"))


def row(method: str, pairs: list[tuple[Found, Found]]) -> str:
    """Returns a method's line of the table, of its (without, with) in each turn."""
    cells = []
    for name in ("first_s", "later_s"):
        without, kept = ([getattr(pair[at], name) for pair in pairs] for at in (0, 1))
        ratio = statistics.median(k / w for w, k in zip(without, kept, strict=True))
        cells += [f"{statistics.median(without):.3f}", f"{statistics.median(kept):.3f}", f"{ratio:.2f}"]
    apart = max(float(np.abs(w.tensors[n] - k.tensors[n]).max()) for w, k in pairs for n in w.tensors)
    return f"| {method} | {' | '.join(cells)} | {apart:.1g} |"


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"repeat": 3, "rounds": 4, "clients": 4, "depth": 12, "epochs": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    found: dict[str, list[tuple[Found, Found]]] = {method: [] for method in METHODS}
    with tempfile.TemporaryDirectory() as folder:
        data = images(Path(folder), IMAGES * args.clients)
        for _ in range(args.repeat):
            for method in METHODS:
                found[method].append((measure(method, False, data, args), measure(method, True, data, args)))
    load = ", ".join(f"{each:.1f}" for each in os.getloadavg())
    print(f"{os.cpu_count()} cores, load {load}; {args.clients} clients a round, {args.repeat} turns")
    print("| method | first round, s | kept | ratio | later round, s | kept | ratio | adapters apart by |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    for method in METHODS:
        print(row(method, found[method]))


if __name__ == "__main__":
    main()
