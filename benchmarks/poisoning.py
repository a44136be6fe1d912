"""Harm that one client does with updates of a bounded norm: accuracy by the factor, for one round and for several.

    python benchmarks/poisoning.py --data cifar10/train.parquet --test cifar10/test.parquet [--weights FILE]

Ten clients share 800 images (iid, so that the attack is what is measured); after six honest rounds one of them sends
the mean of the others, reversed and `factor` times as long as the median of their norms, with as many examples as they
have. FedAvg; the model is that of norms.py, by AdamW. Printed is the accuracy on 500 held-out images after the round of
the attack and after an honest round behind it, and after each of three rounds of attack in a row.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from norms import first_blocks, quiet, run_file
from numpy.typing import NDArray

from fedpeft import seeds
from fedpeft.adapters import payload
from fedpeft.data import partitions
from fedpeft.data.sources.interface import Selection
from fedpeft.data.sources.opening import open_source
from fedpeft.rounds.local_job import LocalJob, LocalUpdate, Version
from fedpeft.simulation.local_trainer import Inputs, LocalTrainer

Arrays = dict[str, NDArray[Any]]
CLIENTS, ROWS, TEST_ROWS, HONEST = 10, 800, 500, 6
FACTORS = (0.0, 3.0, 10.0, 30.0, 100.0, 1000.0)
LASTING = (3.0, 10.0, 30.0)
ROUNDS = 3


class Run:
    """A federation whose rounds are averaged here, with an attacker or without.

    Args:
        trainer: Trains for its clients, and scores.
        names: Theirs; the last one may attack.
        folder: For versions.
    """

    def __init__(self, trainer: LocalTrainer, names: list[str], folder: Path) -> None:
        self._trainer, self._names, self._folder = trainer, names, folder

    def round(self, number: int, x: Arrays, factor: float | None = None) -> Arrays:
        """Returns the version that a round makes; the last client attacks with a factor, and is honest without."""
        if factor == 0:
            factor = None
        version = self.version(x)
        honest = self._names if factor is None else self._names[:-1]
        settings = self._trainer.inputs.config.training
        jobs = [LocalJob(name, number, seeds.training(0, number, name), settings, version) for name in honest]
        trained = [update for job in jobs if isinstance(update := self._trainer.train(job), LocalUpdate)]
        deltas = [payload.decode(t.prepared.manifest, memoryview(t.prepared.payload)) for t in trained]
        return self.folded(x, deltas, [t.examples for t in trained], factor)

    def folded(self, x: Arrays, deltas: list[Any], examples: list[int], factor: float | None) -> Arrays:
        """Averages honest updates, and the attacker's if there is a factor."""
        mean = average(deltas, examples)
        if factor is not None:
            middle = sorted(norm(delta) for delta in deltas)[len(deltas) // 2]
            scale = -factor * middle / norm(mean)
            attack = {name: values * scale for name, values in mean.items()}
            share = np.mean(examples)
            mean = average([*deltas, attack], [*examples, share])
        return {name: (x[name] + mean[name]).astype(np.float32) for name in x}

    def accuracy(self, x: Arrays) -> float:
        """Returns the accuracy of a version on the held-out images."""
        return self._trainer.evaluate(self.version(x))["accuracy"]

    def version(self, x: Arrays) -> Version:
        """Returns tensors as clients receive them."""
        manifest, data = payload.encode(x, self._trainer.run.model.spec.shared, "float32")
        (self._folder / "version").write_bytes(data)
        return Version(manifest, self._folder / "version")


def norm(arrays: Any) -> float:
    """Returns the Euclidean norm of all values."""
    return float(np.sqrt(sum(np.square(v, dtype=np.float64).sum() for v in arrays.values())))


def average(deltas: list[Any], weights: list[Any]) -> Arrays:
    """Returns the weighted mean."""
    total = float(sum(weights))
    return {
        n: sum(w * d[n].astype(np.float64) for d, w in zip(deltas, weights, strict=True)) / total for n in deltas[0]
    }


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--method", default="bias")
    args = parser.parse_args()
    quiet()
    source, test, began = open_source(args.data), open_source(args.test), time.process_time()
    parts = partitions.iid(ROWS, CLIENTS, 0).parts
    with tempfile.TemporaryDirectory() as folder:
        weights = args.weights and first_blocks(args.weights, Path(folder))
        training = {"optimizer": "adamw", "learning_rate": 0.003, "batch_size": 16, "epochs": 4}
        sections = {"peft": {"method": args.method}, "training": training}
        config = run_file(sections, CLIENTS, 1, source.class_names, weights)
        clients = {f"c{i}": Selection(source, rows) for i, rows in enumerate(parts)}
        trainer = LocalTrainer(Inputs(config, clients))
        held_out = Selection(test, np.arange(TEST_ROWS))
        trainer._test = trainer._data.open(held_out, "held-out images")[0]
        run, x = Run(trainer, sorted(clients), Path(folder)), dict(trainer.run.model.state())
        before = [run.accuracy(x)]
        for number in range(1, HONEST + 1):
            x = run.round(number, x)
            before.append(run.accuracy(x))
        print("honest rounds:", ", ".join(f"{100 * each:.1f}" for each in before), flush=True)
        print("| factor | after the attack | one honest round later |\n|--:|--:|--:|")
        for factor in FACTORS:
            after = [run.round(HONEST + 1, x, factor)]
            after.append(run.round(HONEST + 2, after[-1]))
            print(
                f"| {factor:g} | " + " | ".join(f"{100 * run.accuracy(each):.1f}" for each in after) + " |", flush=True
            )
        print("| factor, in every round | 1st | 2nd | 3rd |\n|--:|--:|--:|--:|")
        for factor in LASTING:
            said, y = [], x
            for number in range(HONEST + 1, HONEST + 1 + ROUNDS):
                y = run.round(number, y, factor)
                said.append(f"{100 * run.accuracy(y):.1f}")
            print(f"| {factor:g} | " + " | ".join(said) + " |", flush=True)
        print(f"{time.process_time() - began:.0f} s of CPU")


if __name__ == "__main__":
    main()
