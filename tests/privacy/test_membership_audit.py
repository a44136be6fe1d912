"""An audit of noise in steps, in one run with many canaries (2305.08846): who was in the data is guessed afterwards.

A canary's gradient is all in a value of its own, the most that an example can do. Of so many canaries each is in the
data by the toss of a coin; those with the largest and the smallest sums of gradients are guessed. More right guesses
than epsilon allows would prove the statement wrong.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from scipy.stats import binom
from torch import nn

from fedpeft.config import TrainingConfig
from fedpeft.privacy.example_level import Steps, example_epsilon
from fedpeft.training.example_gradients import ExampleGradients, ExampleNoise
from fedpeft.training.poisson import PoissonOrder

CANARIES, DELTA = 800, 1e-5


class Canaries:
    """A task whose examples have a value each; their gradients are far above any bound."""

    example = "canary"

    def transform(self, batch: Any, dataset: Any) -> Any:
        return batch

    def loss(self, module: nn.Module, batch: Any) -> torch.Tensor:
        return 100 * cast(torch.Tensor, module(batch["values"])).squeeze(1)


def lower_bound(right: int, guesses: int, canaries: int, delta: float, doubt: float = 0.001) -> float:
    """Returns the epsilon below which so many right guesses have a probability of at most `doubt`."""

    def probability(epsilon: float) -> float:
        law = binom(guesses, 1 / (1 + np.exp(-epsilon)))
        below = law.cdf(right - 1) - law.cdf(right - 1 - np.arange(1, canaries + 1))
        return float(law.sf(right - 1) + 2 * canaries * delta * (below / np.arange(1, canaries + 1)).max())

    low, high = 0.0, 20.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if probability(middle) < doubt else (low, middle)
    return low


def audited(z: float, batch_size: int, steps: int, guesses: int) -> tuple[float, int]:
    """Returns what can be proved of epsilon, and the number of examples."""
    module = nn.Linear(CANARIES, 1, bias=False)
    model: Any = SimpleNamespace(module=module, names={"weight": "weight"})
    there = np.random.default_rng().random(CANARIES) < 0.5
    rows = np.flatnonzero(there)
    expected = min(batch_size, len(rows))
    hiding = ExampleGradients(
        cast(Any, Canaries()), model, ExampleNoise(1.0, z), expected, torch.float32, torch.device("cpu")
    )
    total, every = np.zeros(CANARIES), torch.eye(CANARIES)
    for batch in PoissonOrder(TrainingConfig(batch_size=batch_size, steps=steps), len(rows)):
        hiding.compute(cast(Any, SimpleNamespace(dataset=None, micro=1000)), {"values": every[rows[batch]]})
        assert module.weight.grad is not None
        total += module.weight.grad.double().numpy()[0]
    order = np.argsort(total)
    right = int(there[order[-guesses // 2 :]].sum() + (~there[order[: guesses // 2]]).sum())
    return lower_bound(right, guesses, CANARIES, DELTA), len(rows)


@pytest.mark.parametrize(("z", "batch_size", "steps"), [(1.0, CANARIES, 1), (1.0, 200, 4)])
def test_no_more_can_be_proved_of_a_training_than_is_stated(z: float, batch_size: int, steps: int) -> None:
    proved, examples = audited(z, batch_size, steps, 120)
    assert proved < example_epsilon(z, batch_size, [Steps(examples, steps)], DELTA)
    assert proved > 0.1 or steps > 1, "the audit sees nothing"


def test_the_audit_finds_noise_that_is_too_small() -> None:
    proved, examples = audited(1.5 / 5, CANARIES, 1, 400)
    assert proved > example_epsilon(1.5, CANARIES, [Steps(examples, 1)], DELTA)


def test_the_bound_of_perfect_guesses_is_that_of_their_number() -> None:
    assert lower_bound(100, 100, 100, 0.0) == pytest.approx(np.log(1 / (0.001 ** (-1 / 100) - 1)), abs=1e-3)
    assert lower_bound(50, 100, 100, 0.0) == pytest.approx(0.0, abs=1e-6)
