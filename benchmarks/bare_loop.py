"""Local training of simulated clients against a bare PyTorch loop over the same clients, in one process.

    python benchmarks/bare_loop.py [--method lora] [--clients 8] [--depth 4] [--side 64] [--batch 16] [--repeat 5]

The bare loop is what one would write by hand: batches of decoded pixels as a tensor, normalised; forward, backward and
a step of `torch.optim.SGD` for each; the tuned tensors set back for every client, and their changes taken. Model, data,
batches, optimizer, device and threads are the same. The engines get jobs and return encoded updates. Cases take turns;
printed are, by case, the median and the fastest time of a round, and the median of its ratios to the bare loop of the
same turn. Images are decoded before the first turn, and there is no augmentation. On a CPU the times are those of the
process's threads, which other work on the machine hardly changes; on a GPU they are those of a clock.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from engines import images
from torch.nn import functional

from fedpeft import seeds
from fedpeft.adapters import payload
from fedpeft.config import parse_config
from fedpeft.rounds.local_job import LocalJob, LocalUpdate, Version
from fedpeft.simulation import clients_of
from fedpeft.simulation.engines import engine_named
from fedpeft.simulation.local_trainer import Inputs, LocalTrainer
from fedpeft.training.batches import BatchOrder
from fedpeft.training.loop import placed
from fedpeft.training.run_spec import version_0

ENGINES = ("inprocess", "batched")
IMAGES = 48


class Bare:
    """The loop by hand."""

    def __init__(self, trainer: LocalTrainer, jobs: list[LocalJob]) -> None:
        self._run, self._jobs = trainer.run, jobs
        self._parameters = self._run.model.trainable(1)
        self._start = {name: p.detach().clone() for name, p in self._parameters.items()}
        self._pixels, self._labels = {}, {}
        for job in jobs:
            dataset = trainer._data.of(job.client)
            (rows,) = dataset.batches([np.arange(len(dataset))])
            self._pixels[job.client], self._labels[job.client] = torch.from_numpy(rows.pixels), rows.labels
            self._normalise = dataset.preprocessing.normalise

    def round(self) -> None:
        """Trains every client."""
        run, settings = self._run, self._run.config.training
        module, device = run.model.module, run.device
        run.model.trainable(1)
        run.model.train()
        for job in self._jobs:
            with torch.no_grad():
                for name, parameter in self._parameters.items():
                    parameter.copy_(self._start[name])
            optimizer = torch.optim.SGD(
                self._parameters.values(),
                lr=settings.learning_rate,
                momentum=settings.momentum,
                weight_decay=settings.weight_decay,
                nesterov=True,
            )
            pixels, labels = self._pixels[job.client], self._labels[job.client]
            losses = []
            for rows in BatchOrder(settings, len(pixels), job.seed):
                values = self._normalise(pixels[rows].to(device))
                loss = functional.cross_entropy(module(values), labels[rows].to(device))
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                losses.append(loss.detach())
            torch.stack(losses).tolist()
            {name: (p.detach() - self._start[name]).cpu().numpy() for name, p in self._parameters.items()}
        run.model.eval()


def jobs_of(trainer: LocalTrainer, folder: Path) -> list[LocalJob]:
    """Returns a job of every client."""
    run = trainer.run
    manifest, packed = payload.encode(version_0(run.spec, run.model), run.spec.shared, "float32")
    (folder / "version").write_bytes(packed)
    version = Version(manifest, folder / "version")
    names = sorted(trainer.inputs.clients)
    return [LocalJob(name, 1, seeds.training(0, 1, name), run.config.training, version) for name in names]


def cases_of(args: argparse.Namespace, folder: Path) -> dict[str, Callable[[], object]]:
    """Returns a round of each case as a function."""
    config = parse_config(
        {
            "model": {
                "name": "vit_tiny_patch16_224",
                "weights": "none",
                "image_size": args.side,
                "depth": args.depth,
                "classes": ["cat", "dog"],
            },
            "peft": {"method": args.method, **({"dropout": 0.0} if args.method in ("prompt", "adaptformer") else {})},
            "training": {"batch_size": args.batch, "precision": "float32", "augmentation": "none"},
            "simulation": {"clients": args.clients},
        }
    )
    data = clients_of(images(folder / "images", IMAGES * args.clients), config)[0]
    trainer = LocalTrainer(Inputs(config, data, device=args.device))
    placed(trainer.run.model.module, trainer.run.device)
    jobs = jobs_of(trainer, folder)

    def by_engine(name: str) -> Callable[[], object]:
        engine = engine_named(name)(trainer, args.together if name == "batched" else None)

        def one_round() -> None:
            outcomes = list(engine.run(jobs))
            assert all(isinstance(outcome, LocalUpdate) for outcome in outcomes)

        return one_round

    return {"bare loop": Bare(trainer, jobs).round} | {name: by_engine(name) for name in ENGINES}


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="lora")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--together", type=int, default=16, help="clients in a pass of batched")
    for name, value in {"clients": 8, "depth": 4, "side": 64, "batch": 16, "repeat": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        cases = cases_of(args, Path(folder))
        for one_round in cases.values():  # opens and decodes the data
            one_round()
        clock = time.process_time if args.device == "cpu" else time.perf_counter
        times = {name: list[float]() for name in cases}
        for _ in range(args.repeat):
            for name, one_round in cases.items():
                began = clock()
                one_round()
                times[name].append(clock() - began)
    print(f"{vars(args)}; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    print("| case | a round, median (fastest), s | over the bare loop |")
    print("|---|--:|--:|")
    for name, each in times.items():
        ratio = statistics.median(one / bare for one, bare in zip(each, times["bare loop"], strict=True))
        print(f"| {name} | {statistics.median(each):.3f} ({min(each):.3f}) | {ratio:.2f} |")


if __name__ == "__main__":
    main()
