"""Norms of honest updates beside the median that they are screened by, in federations as skewed as they come.

    python benchmarks/norms.py --data cifar10/train.parquet [--weights FILE] [--only WORDS] [--out FILE.json]

Each federation is a simulated run with `norm_factor = 0`: nothing is excluded, so every norm is seen. The model is the
first two blocks of a ViT-tiny at 32 pixels, of `--weights` or random. A row says, of all updates of all rounds, what
the 99.9th percentile and the largest ratio of norm to reference are, the same of norm by allowance (what
`fedpeft.rounds.screening` compares with the factor), and how many updates the default factor would exclude.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import structlog
import torch
from numpy.typing import NDArray

from fedpeft import simulation
from fedpeft.config import RunConfig, parse_config
from fedpeft.data import partitions
from fedpeft.data.sources.interface import Selection, Source
from fedpeft.data.sources.opening import open_source
from fedpeft.rounds.screening import FACTOR, ROUNDS, Extent, bound, local_steps, median

Rows = NDArray[np.int64]
Json = dict[str, Any]

SIDE, DEPTH = 32, 2
"""Pixels of a side and blocks of the model."""
ROWS = 1600
"""Images that ten clients share, where a federation states no sizes."""
SPREAD = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 10_000)
PHONES = (*[8] * 15, 10_000)
"""Fifteen phones that make one step each, and a hospital that makes 157."""


@dataclass(frozen=True)
class Federation:
    """One federation.

    Attributes:
        division: iid, dirichlet, one-class, or sizes.
        alpha: Of dirichlet.
        sizes: Images of each client, for sizes.
        sections: Sections of the run file that differ from its defaults.
        odd: True if the labels of the first client differ: its update never agrees with the adapter that all make.
    """

    division: str = "dirichlet"
    alpha: float = 0.01
    sizes: Sequence[int] = ()
    sections: Json = field(default_factory=dict)
    odd: bool = False

    def parts(self, labels: Rows) -> list[Rows]:
        """Divides the rows of a data set."""
        some = labels[:ROWS]
        match self.division:
            case "iid":
                return list(partitions.iid(ROWS, 10, 0).parts)
            case "dirichlet":
                return list(partitions.dirichlet(some, 10, self.alpha, 0).parts)
            case "one-class":
                return [np.flatnonzero(some == label) for label in np.unique(some)]
        ends = np.cumsum(self.sizes)
        order = np.random.default_rng(0).permutation(len(labels))
        return [order[end - size : end] for end, size in zip(ends, self.sizes, strict=True)]


TRAININGS: dict[str, Json] = {
    "": {},
    ", rate 0.001": {"learning_rate": 0.001},
    ", rate 0.1": {"learning_rate": 0.1},
    ", no momentum": {"momentum": 0.0},
    ", AdamW": {"optimizer": "adamw", "learning_rate": 0.001},
}
METHODS: dict[str, Json] = {
    ", head": {"method": "head"},
    ", full": {"method": "full"},
    ", LoRA": {"method": "lora", "rank": 4},
    ", adapter": {"method": "adapter"},
    ", prompt": {"method": "prompt"},
}
SPARSE = {"codec": {"up": "sparse", "density": 0.01, "error_feedback": True}, "rounds": {"clients": 3, "count": 8}}
FEDERATIONS: dict[str, Federation] = {
    **{
        f"15 of 8 images, 1 of 10,000{k}": Federation("sizes", 0, PHONES, {"training": v}) for k, v in TRAININGS.items()
    },
    **{f"1 to 10,000 images{k}": Federation("sizes", 0, SPREAD, {"training": v}) for k, v in TRAININGS.items()},
    "1 to 10,000 images, 20 steps each": Federation("sizes", 0, SPREAD, {"training": {"steps": 20}}),
    "1 to 10,000 images, 100 steps each": Federation(
        "sizes", 0, SPREAD, {"training": {"steps": 100, "batch_size": 16}}
    ),
    **{f"15 of 8 images, 1 of 10,000{k}": Federation("sizes", 0, PHONES, {"peft": v}) for k, v in METHODS.items()},
    "iid": Federation("iid"),
    "Dirichlet 0.1": Federation(alpha=0.1),
    **{f"Dirichlet 0.01{k}": Federation(sections={"training": v}) for k, v in TRAININGS.items()},
    "Dirichlet 0.01, 1 step each": Federation(sections={"training": {"steps": 1}}),
    "Dirichlet 0.01, 100 steps each": Federation(sections={"training": {"steps": 100, "batch_size": 16}}),
    "Dirichlet 0.01, 5 epochs": Federation(sections={"training": {"epochs": 5}}),
    **{f"Dirichlet 0.01{k}": Federation(sections={"peft": v}) for k, v in METHODS.items()},
    "Dirichlet 0.01, sparse 1 %, 3 of 10": Federation(sections=SPARSE),
    "Dirichlet 0.01, FedAvgM": Federation(sections={"aggregation": {"strategy": "fedavgm"}}),
    "Dirichlet 0.01, FedAdam": Federation(sections={"aggregation": {"strategy": "fedadam"}}),
    "iid, 12 rounds, odd labels at one": Federation("iid", sections={"rounds": {"count": 12}}, odd=True),
    "one class each": Federation("one-class"),
    "one class each, sparse 1 %, 3 of 10": Federation("one-class", sections=SPARSE),
}


def run_file(sections: Json, clients: int, rounds: int, classes: Sequence[str], weights: Path | None) -> RunConfig:
    """Returns the run file of a federation."""
    model = {"name": "vit_tiny_patch16_224", "depth": DEPTH, "image_size": SIDE, "classes": list(classes)}
    return parse_config(
        {
            "model": {**model, "weights": str(weights or "none")},
            "peft": sections.get("peft", {"method": "bias"}),
            "codec": sections.get("codec", {}),
            "training": {"augmentation": "none", "precision": "float32", **sections.get("training", {})},
            "rounds": {"count": rounds, "clients": clients, **sections.get("rounds", {})},
            "aggregation": {**sections.get("aggregation", {}), "norm_factor": 0},
        }
    )


def first_blocks(weights: Path, folder: Path) -> Path:
    """Writes the weights of a deeper model without its further blocks."""
    tensors = safetensors.torch.load_file(weights)
    kept = {k: v for k, v in tensors.items() if not k.startswith("blocks.") or int(k.split(".")[1]) < DEPTH}
    safetensors.torch.save_file(kept, folder / "first_blocks.safetensors")
    return folder / "first_blocks.safetensors"


def quiet() -> None:
    """Sets one thread, and no log."""
    torch.set_num_threads(1)
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())


def hold(name: str, data: Path, weights: Path | None) -> Json:
    """Holds a federation's run; returns every update: round, norm, examples, steps."""
    quiet()
    began, federation, source = time.process_time(), FEDERATIONS[name], open_source(data)
    parts = [rows for rows in federation.parts(source.labels) if rows.size]
    count = 2 if federation.sizes else 4
    config = run_file(federation.sections, len(parts), count, source.class_names, weights)
    clients: dict[str, Path | Source] = {f"c{i:02d}": Selection(source, rows) for i, rows in enumerate(parts)}
    if federation.odd:
        first = Selection(source, parts[0])
        first.labels = (first.labels + 1) % len(source.class_names)
        clients["c00"] = first
    with tempfile.TemporaryDirectory() as out:
        report = simulation.simulate(config, clients, Path(out), device="cpu")
    tickets = [(row["version"], ticket) for row in report["rounds"] for ticket in row["tickets"]]
    rounds: dict[int, list[Extent]] = {}
    for number, ticket in tickets:
        steps = local_steps(ticket["examples"], config.training)
        rounds.setdefault(number, []).append(Extent(ticket["update_norm"], steps))
    return {**judged(rounds, report["adapter_parameters"]), "name": name, "cpu_s": time.process_time() - began}


def judged(rounds: Mapping[int, Sequence[Extent]], values: int) -> Json:
    """Returns the ratios of all norms to the reference of their round, as they are and by allowance."""
    past: list[Extent] = []
    plain, allowed, excluded = [], [], 0
    for updates in rounds.values():
        limit = bound(updates, past[-ROUNDS:], values, FACTOR)
        assert limit is not None
        assert limit.reference
        plain += [update.norm / limit.reference for update in updates]
        allowed += [update.norm / limit.reference / limit.allowance(update.steps) for update in updates]
        excluded += sum(bool(limit.against(update)) for update in updates)
        past.append(median(updates))
    return {"plain": plain, "allowed": allowed, "excluded": excluded}


def row(found: Json) -> str:
    """Returns a federation's row of the table."""
    plain, allowed = np.array(found["plain"]), np.array(found["allowed"])
    tail = np.quantile(plain, 0.999), plain.max(), np.quantile(allowed, 0.999), allowed.max()
    return (
        f"| {found['name']} | {plain.size} | "
        + " | ".join(f"{each:.1f}" for each in tail)
        + f" | {found['excluded']} |"
    )


def main() -> None:
    """Holds the federations, two at a time, and prints a row of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(2) as pool:
        weights = args.weights and first_blocks(args.weights, Path(folder))
        begun = [pool.submit(hold, name, args.data, weights) for name in FEDERATIONS if args.only in name]
        print("| federation | updates | 99.9 % | largest | by allowance, 99.9 % | largest | excluded |")
        print("|---|--:|--:|--:|--:|--:|--:|", flush=True)
        found = []
        for future in as_completed(begun):
            found.append(future.result())
            print(row(found[-1]), flush=True)
    everything = {key: [ratio for each in found for ratio in each[key]] for key in ("plain", "allowed")}
    print(row({**everything, "name": "all", "excluded": sum(each["excluded"] for each in found)}))
    print(f"{sum(each['cpu_s'] for each in found):.0f} s of CPU")
    if args.out:
        args.out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
