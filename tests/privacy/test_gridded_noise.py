"""The noise of the three mechanisms, from a generator with a seed in place of the operating system's: bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fedpeft.config import PrivacyConfig
from fedpeft.models.tasks import task_of
from fedpeft.privacy import noise
from fedpeft.privacy.central import Central
from fedpeft.privacy.transforms import Clip, LocalNoise
from fedpeft.training.example_gradients import ExampleGradients, ExampleNoise

BOUND, Z, DIVISOR = 0.7, 1.3, 12
SHAPES = {"a": (40, 25), "b": (1001,)}
VALUES = 2001
Arrays = dict[str, NDArray[np.float64]]


def of_sums(sums: Arrays) -> Arrays:
    """A round's sum at the server."""
    privacy = PrivacyConfig(mechanism="central", clip_norm=BOUND, noise_multiplier=Z, delta=1e-5)
    rule = Central(privacy, DIVISOR).noised_sum({}, (), VALUES)
    published = {name: values.reshape(-1).copy() for name, values in sums.items()}
    for values in published.values():
        rule.publish(values)
    return {name: values.reshape(SHAPES[name]) for name, values in published.items()}


def of_update(sums: Arrays) -> Arrays:
    """An update at its client."""
    found, _ = LocalNoise(BOUND, Z).apply({name: values.astype(np.float32) for name, values in sums.items()}, 0.0)
    return {name: values.astype(np.float64) for name, values in found.items()}


def of_step(sums: Arrays) -> Arrays:
    """A step of training with noise for each example."""
    module = torch.nn.ParameterDict({name: torch.nn.Parameter(torch.zeros(SHAPES[name])) for name in SHAPES})
    model = SimpleNamespace(module=module, names={name: name for name in SHAPES})
    steps = ExampleGradients(
        task_of(""),
        model,
        ExampleNoise(BOUND, Z),
        DIVISOR,
        torch.float32,
        torch.device("cpu"),  # type: ignore[arg-type]
    )
    steps._publish({name: torch.from_numpy(values.copy()) for name, values in sums.items()})
    return {name: p.grad.numpy().astype(np.float64) for name, p in module.items() if p.grad is not None}


@pytest.mark.parametrize(("mechanism", "divisor"), [(of_sums, DIVISOR), (of_update, 1), (of_step, DIVISOR)])
def test_the_noise_of_a_source_is_the_same_bits_for_every_mechanism(
    monkeypatch: pytest.MonkeyPatch, mechanism: Callable[[Arrays], Arrays], divisor: int
) -> None:
    draw = np.random.default_rng(5)
    sums = {name: draw.standard_normal(shape) for name, shape in SHAPES.items()}
    monkeypatch.setattr(noise.os, "urandom", np.random.default_rng(7).bytes)
    found = mechanism(sums)
    monkeypatch.setattr(noise.os, "urandom", np.random.default_rng(7).bytes)
    if mechanism is of_update:
        clipped, _ = Clip(BOUND).apply({name: v.astype(np.float32) for name, v in sums.items()}, 2.0**-20)
        sums = {name: values.astype(np.float64) for name, values in clipped.items()}
    grid = 2.0 ** (math.floor(math.log2(BOUND)) - 32)
    sigma = Z * (BOUND + math.sqrt(VALUES) * grid)
    for name, values in sums.items():
        steps = np.rint(values / grid) + noise.gaussian(values.size).reshape(values.shape) * (sigma / grid)
        wanted = np.rint(steps) * (grid / divisor)
        assert np.array_equal(found[name], wanted if mechanism is of_sums else wanted.astype(np.float32)), name
