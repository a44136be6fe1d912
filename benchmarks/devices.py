"""Measures memory and time of one training step, for each PEFT method, on this machine's CPU.

    python benchmarks/devices.py --out benchmarks/results/devices.json

Each case is a process of its own that trains as a client does (`fedpeft.training.loop.train`) on the emoji images at
the model's own size, with one thread. Memory is the process's peak (VmHWM), and what of it was there before the first
step. Time is CPU time of one step: it does not count the moments in which others had the core, though
they still take cache
and memory bandwidth, so the ratio to full fine-tuning says more than the seconds.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from bytes_by_method import METHODS
from workload import machine, peak_memory_bytes, resident_bytes

from fedpeft.config import ModelConfig, TrainingConfig
from fedpeft.data.dataset import open_dataset
from fedpeft.data.transforms import Preprocessing
from fedpeft.models.backbones import build
from fedpeft.models.tasks import task_of
from fedpeft.peft import tune
from fedpeft.process import durable
from fedpeft.training.loop import train

DATA = Path(__file__).resolve().parents[1] / "experiments" / "emoji" / "data" / "test.parquet"
CLASSES = ("smileys", "people", "animals", "food", "travel", "activities", "objects", "symbols", "flags")
CASES = (("vit_small_patch16_224", 8), ("vit_small_patch16_224", 32), ("vit_base_patch16_224", 8))
"""Models and batch sizes."""
STEPS = 2


def measure(model: str, batch: int, method: str, checkpointing: bool) -> dict[str, Any]:
    """Trains one case in this process."""
    libraries = resident_bytes(os.getpid())
    backbone = build(ModelConfig(name=model, weights="none", classes=CLASSES), seed=0)
    name, options = METHODS[method]
    tuned = tune(backbone, name, options, seed=0)
    if checkpointing:
        assert tuned.checkpoint()
    dataset = open_dataset(DATA, CLASSES, Preprocessing.of(backbone), workers=0)
    before_training = resident_bytes(os.getpid())

    def cpu_s(steps: int, size: int) -> float:
        settings = TrainingConfig(steps=steps, batch_size=size, learning_rate=0.001)
        begun = time.process_time()
        train(task_of(""), tuned, dataset, settings, seed=0, number=1)
        return time.process_time() - begun

    cpu_s(1, 2)  # what only the first step does
    return {
        "model": model,
        "batch": batch,
        "method": method,
        "checkpointing": checkpointing,
        "parameters": tuned.spec.parameters,
        "step_cpu_s": cpu_s(STEPS, batch) / STEPS,
        "peak_bytes": peak_memory_bytes(os.getpid()),
        "libraries_bytes": libraries,
        "before_training_bytes": before_training,
    }


def _child(answer: Connection, *case: Any) -> None:
    torch.set_num_threads(1)
    answer.send(measure(*case))


def cases(models: list[str], checkpointing: bool) -> list[dict[str, Any]]:
    """Measures every case, each in a process of its own, which begins with the libraries loaded."""
    found, context = [], multiprocessing.get_context("fork")
    for model, batch in CASES:
        for method in METHODS if model in models else ():
            here, there = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(there, model, batch, method, checkpointing))
            process.start()
            there.close()
            found.append(here.recv())
            process.join()
            print(json.dumps(found[-1]), file=sys.stderr)
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """The figures as Markdown, each beside full fine-tuning of the same model and batch."""
    whole = {(row["model"], row["batch"]): row for row in rows if row["method"] == "full"}
    lines = ["| model | batch | method | peak memory, MiB | of full | CPU time of a step, s | of full |"]
    lines.append("|---|--:|---|--:|--:|--:|--:|")
    for row in rows:
        full = whole[row["model"], row["batch"]]
        lines.append(
            f"| {row['model']} | {row['batch']} | {row['method']} | {row['peak_bytes'] / 2**20:,.0f} "
            f"| {row['peak_bytes'] / full['peak_bytes']:.2f} | {row['step_cpu_s']:.2f} "
            f"| {row['step_cpu_s'] / full['step_cpu_s']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Reads the flags; prints the table and writes the figures."""
    models = list(dict.fromkeys(model for model, _ in CASES))
    parser = argparse.ArgumentParser(description="Memory and time of a training step for each PEFT method.")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/devices.json"))
    parser.add_argument("--model", action="append", choices=models)
    parser.add_argument("--checkpointing", action="store_true", help="as with fedpeft-client --checkpointing")
    chosen = parser.parse_args()
    load = os.getloadavg()[0]
    rows = cases(chosen.model or models, chosen.checkpointing)
    found = {"machine": machine(), "load": [load, os.getloadavg()[0]], "steps": STEPS, "cases": rows}
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    durable.write_text(chosen.out, json.dumps(found, indent=2) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
