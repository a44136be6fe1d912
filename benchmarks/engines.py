"""Times of simulated rounds by engine: one process with one or two threads, two worker processes, passes of clients.

    python benchmarks/engines.py [--repeat 3] [--rounds 3] [--clients 8] [--depth 4]

Every case is a fresh process, and the cases take turns. The model is the first blocks of a random ViT-tiny at 64 pixels
under LoRA; each client has 48 images of noise. Printed are, by case, the median and the fastest round after the first
(which opens the data), what the whole command took, the peak memory of all processes together (proportional set
sizes), and the digest of the adapter: but for batched, with the same number of threads it must be the same.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from workload import ended_by_signals

CASES = {"inprocess, 1 thread": ("inprocess", 1), "inprocess, 2 threads": ("inprocess", 2)} | {
    "processes, 2 workers of 1 thread": ("processes", 1),
    "batched, 4 clients a pass, 1 thread": ("batched", 1),
}
IMAGES, SIDE = 48, 64
RUN_FILE = """
[model]
name = "vit_tiny_patch16_224"
weights = "none"
image_size = {side}
depth = {depth}
classes = ["cat", "dog"]
[peft]
method = "lora"
[rounds]
count = {rounds}
clients = {clients}
[training]
batch_size = 16
[simulation]
clients = {clients}
engine = "{engine}"
{workers}
"""
WORKERS = {"inprocess": "", "processes": "workers = 2", "batched": "workers = 4"}


@dataclass
class Found:
    """Measurements of one case."""

    rounds_s: list[float] = field(default_factory=list)
    whole_s: list[float] = field(default_factory=list)
    peak_bytes: list[int] = field(default_factory=list)
    digests: set[str] = field(default_factory=set)


def images(folder: Path, count: int) -> Path:
    """Writes images of noise, those of one class brighter."""
    draw = np.random.default_rng(0)
    for index in range(count):
        pixels = draw.integers(0, 200, (SIDE, SIDE, 3), np.uint8) + np.uint8(50 * (index % 2))
        path = folder / ("cat", "dog")[index % 2] / f"{index:05}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return folder


def memory_bytes(pid: int) -> int:
    """Returns the proportional set sizes of a process and its children."""
    total = 0
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ValueError):  # it has ended
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if pid in (parent, int(folder.name)):
                lines = (folder / "smaps_rollup").read_text().splitlines()
                total += next(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total


def measure(engine: str, threads: int, data: Path, args: argparse.Namespace, found: Found) -> None:
    """Runs a case once."""
    with tempfile.TemporaryDirectory() as folder:
        run, out = Path(folder) / "run.toml", Path(folder) / "out"
        sizes = {"side": SIDE, "depth": args.depth, "rounds": args.rounds, "clients": args.clients}
        run.write_text(RUN_FILE.format(engine=engine, workers=WORKERS[engine], **sizes))
        asked = ["simulate", str(run), "--data", str(data), "--out", str(out), "--threads", str(threads), "--json"]
        began, peak = time.perf_counter(), 0
        command = [sys.executable, "-m", "fedpeft_operator.app", *asked, "--device", "cpu"]
        with ended_by_signals(), subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            ended = threading.Event()
            threading.Thread(target=lambda: (process.wait(), ended.set())).start()
            try:
                while not ended.wait(0.2):
                    peak = max(peak, memory_bytes(process.pid))
            finally:
                process.terminate()
        if process.returncode:
            raise SystemExit(f"{engine} ended with {process.returncode}")
        found.whole_s.append(time.perf_counter() - began)
        found.peak_bytes.append(peak)
        report = json.loads((out / "report.json").read_text())
        found.rounds_s += [row["seconds"] for row in report["rounds"][1:]]
        found.digests.add(hashlib.sha256((out / "adapter.safetensors").read_bytes()).hexdigest()[:12])


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--depth", type=int, default=4)
    args = parser.parse_args()
    found = {name: Found() for name in CASES}
    with tempfile.TemporaryDirectory() as folder:
        data = images(Path(folder), IMAGES * args.clients)
        for _ in range(args.repeat):
            for name, (engine, threads) in CASES.items():
                measure(engine, threads, data, args, found[name])
    load = ", ".join(f"{each:.1f}" for each in os.getloadavg())
    print(f"{os.cpu_count()} cores, load {load}; {args.clients} clients a round, {args.repeat} turns")
    print("| case | a round, median (fastest), s | whole command, s | peak memory, MB | adapter |")
    print("|---|--:|--:|--:|---|")
    for name, each in found.items():
        rounds = f"{statistics.median(each.rounds_s):.2f} ({min(each.rounds_s):.2f})"
        whole, peak = statistics.median(each.whole_s), max(each.peak_bytes) / 1e6
        print(f"| {name} | {rounds} | {whole:.1f} | {peak:.0f} | {', '.join(sorted(each.digests))} |")


if __name__ == "__main__":
    main()
