"""The faults of `experiments/faults` do what they say, and nothing else."""

from __future__ import annotations

import importlib.util
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from fedpeft.aggregation import UpdateFacts, strategies
from fedpeft.algorithms import RoundStart, algorithms
from fedpeft.data.division import Division
from fedpeft.data.examples import Examples
from fedpeft.data.partitions import skew
from fedpeft.peft.method import methods
from fedpeft.registry import Registry

FAULTS = Path(__file__).parents[2] / "experiments" / "faults"


def loaded(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Imports a file of the faults without registering anything in this process."""
    for registry in (algorithms, methods, strategies):
        registry.names()  # what is built in has registered before nothing does
    monkeypatch.setattr(Registry, "register", lambda self, name: lambda item: item)
    spec = importlib.util.spec_from_file_location(f"tested_{name}", FAULTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def faults(monkeypatch):
    return loaded("faults", monkeypatch)


def trained(faults: ModuleType, rounds: list[int], *, leaks: bool | None) -> list[torch.Tensor]:
    """Minimises |p|^2 for so many steps in each round; the momentum is the optimizer's own, or the algorithm's."""
    ends = []
    for steps in rounds:
        parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        own = leaks is None
        decay, momentum = (1e-4, 0.9) if own else (0.0, 0.0)
        optimizer = torch.optim.SGD([parameter], lr=0.01, momentum=momentum, weight_decay=decay, nesterov=own)
        algorithm = faults.LeakingMomentum(faults.MomentumOptions(leaks=bool(leaks)))
        algorithm.start(RoundStart({"p": parameter}, 0.01, {}, {}))
        for _ in range(steps):
            parameter.grad = 2 * parameter.detach()
            if not own:
                algorithm.after_gradient()
            optimizer.step()
        ends.append(parameter.detach())
    return ends


def test_momentum_that_starts_anew_is_the_optimizers_and_one_that_leaks_is_not(faults):
    right = trained(faults, [3, 4], leaks=None)
    torch.testing.assert_close(trained(faults, [3, 4], leaks=False), right)
    faults._velocity.clear()
    first, second = trained(faults, [3, 4], leaks=True)
    torch.testing.assert_close(first, right[0])
    assert (second - right[1]).abs().max() > 0.01, "the second client begins with the first one's momentum"


def test_a_dead_adapter_gets_no_gradient_at_either_weight(faults):
    bottleneck = faults.Adapter.inject.__globals__["Bottleneck"](8, 2, torch.Generator())
    with torch.no_grad():
        bottleneck.down.weight.zero_()
    bottleneck(torch.randn(4, 8)).square().sum().backward()
    assert not bottleneck.up.weight.grad.any() and not bottleneck.down.weight.grad.any()
    assert bottleneck.up.bias.grad.any()


def test_statistics_differ_in_evaluation_alone(faults):
    other = faults.OtherStatistics()
    pixels = torch.rand(2, 3, 4, 4)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (faults.IMAGENET_MEAN, faults.IMAGENET_STD))
    inputs = (pixels - mean) / std
    assert other.train().before(other, (inputs,))[0] is inputs
    torch.testing.assert_close(other.eval().before(other, (inputs,))[0], 2 * pixels - 1)


def test_weights_are_those_of_whole_batches(faults):
    strategy = faults.FedAvgWholeBatches(faults.WholeBatchesOptions(batch_size=16))
    assert [strategy.weigh(UpdateFacts(n)) for n in (1, 16, 17)] == [16.0, 16.0, 32.0]


def test_noise_has_the_stated_deviation_whatever_the_gradient(faults):
    parameter = torch.nn.Parameter(torch.zeros(20_000))
    parameter.grad = torch.full_like(parameter, 1e6)
    algorithm = faults.UnaccountedNoise(faults.NoiseOptions(sigma=3.378))
    algorithm.start(RoundStart({"p": parameter}, 0.01, {}, {}))
    torch.manual_seed(0)
    algorithm.after_gradient()
    assert parameter.grad.mean().item() == pytest.approx(1e6, rel=1e-4), "nothing was clipped"
    assert parameter.grad.double().std().item() == pytest.approx(3.378, rel=0.05)


def test_a_division_for_other_rows_loses_the_skew(monkeypatch):
    labels = np.random.default_rng(0).integers(0, 10, 4000)
    data = Examples(np.zeros((4000, 1), np.uint8), labels, tuple(map(str, range(10))))
    division = Division("dirichlet", clients=16, alpha=0.1, examples=2000)
    meant = skew(labels, division.of(data, 3).parts, 10)
    own = Division._divided
    try:
        loaded("lost_skew", monkeypatch)
        lost = skew(labels, division.of(data, 3).parts, 10)
        with pytest.raises(ValueError, match=r"give simulation\.examples"):
            replace(division, examples=None).of(data, 3)
    finally:
        Division._divided = own
    assert meant.total_variation > 0.5
    assert lost.total_variation < meant.total_variation / 3
    assert math.isclose(meant.gini, lost.gini, abs_tol=0.2), "sizes are skewed as before"
