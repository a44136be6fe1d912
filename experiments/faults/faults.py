"""Faults of the FedPEFT study's own experiment code, each as something that a run file can name.

    fedpeft study run experiments/faults/faults.toml --import experiments/faults/faults.py --data cifar10=DIR --out DIR

The product has none of them: this file brings them from outside, and is an example of how one's own parts are brought.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import nn

from fedpeft.aggregation import Options, UpdateFacts, strategies
from fedpeft.aggregation.fedavg import FedAvg, FedAvgOptions
from fedpeft.algorithms import AlgorithmOptions, LocalAlgorithm, RoundStart, algorithms
from fedpeft.models.structure import ModelStructure
from fedpeft.peft.adapter import Adapter
from fedpeft.peft.bias import Bias
from fedpeft.peft.method import methods

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@methods.register("dead_adapter")
class DeadAdapter(Adapter):
    """Both layers of the bottleneck start at zero, so that no gradient reaches either weight: GELU(0) = 0."""

    variants = {}  # noqa: RUF012  # the base class's has its type

    def inject(self, module: nn.Module, structure: ModelStructure, generator: torch.Generator) -> Sequence[nn.Module]:
        """See `Method.inject`."""
        bottlenecks = super().inject(module, structure, generator)
        with torch.no_grad():
            for bottleneck in bottlenecks:
                bottleneck.down.weight.zero_()
        return bottlenecks


class OtherStatistics(nn.Module):
    """Normalises inputs anew with mean and deviation 0.5, unless the model trains."""

    def before(self, model: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Forward pre-hook of a model whose inputs, float [n, 3, h, w], were normalised with ImageNet's figures."""
        if self.training:
            return args
        mean, std = (args[0].new_tensor(figures).view(3, 1, 1) for figures in (IMAGENET_MEAN, IMAGENET_STD))
        return ((args[0] * std + mean - 0.5) / 0.5, *args[1:])


@methods.register("bias_other_statistics")
class BiasOtherStatistics(Bias):
    """Bias tuning whose held-out images are normalised otherwise than those of training."""

    def inject(self, module: nn.Module, structure: ModelStructure, generator: torch.Generator) -> Sequence[nn.Module]:
        """See `Method.inject`."""
        other = OtherStatistics()
        module.add_module("other_statistics", other)  # it follows the model's mode
        module.register_forward_pre_hook(other.before)
        return [other]


class MomentumOptions(AlgorithmOptions):
    """Options of the momentum that is kept."""

    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Of Nesterov SGD."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    """L2."""
    leaks: bool = True
    """False: it starts at zero in every client's round, which equals the optimizer's own."""


_velocity: dict[str, torch.Tensor] = {}
"""The one momentum of all clients of a process, by tensor."""


@algorithms.register("leaking_momentum")
class LeakingMomentum(LocalAlgorithm):
    """Nesterov SGD whose momentum goes on from client to client and round to round; wants `training.momentum` 0."""

    Options = MomentumOptions
    options: MomentumOptions

    def start(self, start: RoundStart) -> None:
        """See `LocalAlgorithm.start`."""
        self._parameters = start.parameters
        if not self.options.leaks:
            _velocity.clear()

    def after_gradient(self) -> None:
        """See `LocalAlgorithm.after_gradient`."""
        for name, parameter in self._parameters.items():
            if parameter.grad is None:
                continue
            gradient = parameter.grad.add(parameter.detach(), alpha=self.options.weight_decay)
            velocity = _velocity.setdefault(name, torch.zeros_like(gradient))
            velocity.mul_(self.options.momentum).add_(gradient)
            parameter.grad.copy_(gradient.add(velocity, alpha=self.options.momentum))


class NoiseOptions(AlgorithmOptions):
    """Options of the noise without a guarantee."""

    sigma: Annotated[float, Field(gt=0)]
    """Standard deviation of the noise on each value of a batch's mean gradient."""


@algorithms.register("unaccounted_noise")
class UnaccountedNoise(LocalAlgorithm):
    """Noise on the mean gradient of a batch, which nothing clipped: whatever is added, no epsilon follows from it."""

    Options = NoiseOptions
    options: NoiseOptions

    def start(self, start: RoundStart) -> None:
        """See `LocalAlgorithm.start`."""
        self._parameters = start.parameters

    def after_gradient(self) -> None:
        """See `LocalAlgorithm.after_gradient`."""
        for parameter in self._parameters.values():
            if parameter.grad is not None:
                parameter.grad.add_(torch.randn_like(parameter.grad), alpha=self.options.sigma)


class WholeBatchesOptions(FedAvgOptions):
    """Options of the mean by whole batches."""

    batch_size: Annotated[int, Field(ge=1)]
    """That of `[training]`."""


@strategies.register("fedavg_whole_batches")
class FedAvgWholeBatches(FedAvg):
    """FedAvg whose weights are examples rounded up to whole batches."""

    Options: type[Options] = WholeBatchesOptions
    options: WholeBatchesOptions

    def weigh(self, facts: UpdateFacts) -> float:
        """See `Strategy.weigh`."""
        return float(math.ceil(facts.examples / self.options.batch_size) * self.options.batch_size)
