"""FedNova: the sum of gradient factors, equal steps, and the fixed point that unequal steps do not move."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedpeft.aggregation import UpdateFacts, strategy
from fedpeft.aggregation.fednova import accumulated


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("steps", [1, 2, 7, 40])
def test_a_is_the_change_that_torchs_sgd_makes_of_a_constant_gradient(steps: int, momentum: float) -> None:
    x = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    sgd = torch.optim.SGD([x], lr=0.1, momentum=momentum, nesterov=momentum > 0)
    for _ in range(steps):
        x.grad = torch.ones(1, dtype=torch.float64)
        sgd.step()
    assert accumulated(steps, momentum) == pytest.approx(-x.item() / 0.1, rel=1e-12)


def delta(facts: list[UpdateFacts], changes: list[float]) -> float:
    rule = strategy("fednova", {})
    weights = [rule.weigh(each) for each in facts]
    mean = sum(weight * change for weight, change in zip(weights, changes, strict=True)) / rule.divisor(facts, weights)
    return float(rule.step(np.zeros(1), np.array([mean]), {})[0][0])


def test_equal_steps_are_fedavg() -> None:
    facts = [UpdateFacts(n, 5.0, 0.9) for n in (10, 30)]
    assert delta(facts, [1.0, -2.0]) == pytest.approx((10 * 1.0 + 30 * -2.0) / 40, rel=1e-12)


@pytest.mark.parametrize("name", ["fednova", "fedavg"])
def test_unequal_steps_on_quadratics_end_at_the_optimum_of_all_with_fednova_alone(name: str) -> None:
    """f_i = (x - c_i)^2 / 2 with 20 and 1 local steps; the optimum of equal examples is the middle of the two c."""
    rate, centers, steps = 0.001, (0.0, 1.0), (20, 1)
    facts = [UpdateFacts(10, float(n)) for n in steps]
    rule = strategy(name, {})
    weights = [rule.weigh(each) for each in facts]
    x = np.zeros(1)
    for _ in range(5000):
        changes = [(c - x[0]) * (1 - (1 - rate) ** n) for c, n in zip(centers, steps, strict=True)]
        mean = sum(w * change for w, change in zip(weights, changes, strict=True)) / rule.divisor(facts, weights)
        x, _ = rule.step(x, np.array([mean]), {})
    assert bool(abs(x[0] - 0.5) < 0.01) is (name == "fednova"), x
