"""A task with a closed form: example t costs h/2 ||w - t||^2, with the curvature h beside it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from fedpeft.config import ModelConfig, RunConfig, parse_config
from fedpeft.data.examples import Examples
from fedpeft.models.structure import ModelStructure
from fedpeft.models.tasks import Batch, Task


class Point(nn.Module):
    """One parameter, float32[2]."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, -2.0]))


class Quadratic(Task):
    def module(self, config: ModelConfig) -> nn.Module:
        return Point()

    def structure(self, module: nn.Module, config: ModelConfig) -> ModelStructure:
        return ModelStructure()

    def read(self, path: Path) -> Examples:
        return Examples.unlabelled(np.loadtxt(path / "examples.txt", dtype=np.float32, ndmin=2))

    def loss(self, module: nn.Module, batch: Batch) -> torch.Tensor:
        h, t = batch["values"][:, 0], batch["values"][:, 1:]
        return h / 2 * (module.w - t).square().sum(1)


def one(curvature: float, target: tuple[float, float], times: int = 1) -> Examples:
    """Returns a client's data: the same example so many times."""
    return Examples.unlabelled(np.array([[curvature, *target]] * times, np.float32))


def run_file(**sections: object) -> RunConfig:
    """Returns the run file of a quadratic, by default with plain steps of 0.1."""
    training = {"steps": 4, "learning_rate": 0.1, "momentum": 0.0, "weight_decay": 0.0, "batch_size": 8}
    said = {
        "model": {"name": "quadratic:two", "weights": "none"},
        "peft": {"method": "full"},
        **sections,
        "training": training | dict(sections.get("training", {})),  # type: ignore[call-overload]
    }
    return parse_config(said)


PLACES = {"a": (1.0, (4.0, 0.0)), "b": (0.25, (-2.0, 1.0)), "c": (3.0, (0.0, -1.0))}
"""Curvature and target of three sites."""
SITES = {name: one(*place, times=3 if name == "c" else 1) for name, place in PLACES.items()}
"""Their data; c has three times the examples, so a mean by examples is not the mean of the sites."""
