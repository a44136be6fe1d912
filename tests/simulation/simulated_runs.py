"""Run files, clients and faults of simulated runs of a tiny model."""

import numpy as np

from fedpeft.adapters.adapter_file import open_adapter
from fedpeft.config import RunConfig, parse_config
from fedpeft.errors import TrainingFailed
from fedpeft.simulation import clients_of
from fedpeft.training.local_round import LoadedRun

from ..data.test_sources import NAMES

MODEL = {"name": "vit_tiny_patch16_224", "weights": "none", "image_size": 32, "depth": 1, "classes": list(NAMES)}


def config(method="bias", **sections) -> RunConfig:
    sections.setdefault("rounds", {"count": 2, "clients": 3, "seed": 7})
    return parse_config(
        {
            "model": MODEL,
            "peft": {"method": method},
            "training": {"batch_size": 8, "learning_rate": 0.05},
            **sections,
        }
    )


def clients(folders):
    return dict(clients_of(folders, config())[0])


def tensors(out):
    with open_adapter(out / "adapter.safetensors") as file:
        return file.info, {name: file[name] for name in file}


def same(first, second):
    return first.keys() == second.keys() and all(np.array_equal(first[k], second[k]) for k in first)


def without_clock(value):
    """Returns a report without what differs from one repetition to the next."""
    timed = {"created_at", "opened_at", "committed_at", "deadline", "seconds", "images_per_second"}
    if isinstance(value, dict):
        return {key: without_clock(item) for key, item in value.items() if key not in timed}
    return [without_clock(item) for item in value] if isinstance(value, list) else value


def failing(monkeypatch, names, numbers=range(100)):
    """Makes training fail for some clients, as it does where the loss is not finite."""
    real = LoadedRun.train

    def train(self, job, *arguments, **options):
        if job.client in names and job.round in numbers:
            raise TrainingFailed("the loss is nan in step 1; lower the learning rate")
        return real(self, job, *arguments, **options)

    monkeypatch.setattr(LoadedRun, "train", train)
