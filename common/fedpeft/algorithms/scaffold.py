"""SCAFFOLD (1910.06378), option II: control variates correct the drift of clients with different data.

    step       y <- y - lr (g - c_i + c)
    end        c_i+ = c_i - c + (x - y) / (K lr)
    client     sends y - x and c_i+ - c_i, keeps c_i+ once the server has counted the update
    server     c <- c + (1 / N) sum (c_i+ - c_i)

x are the received values, K the optimizer steps, N all clients of the federation, also those that are not sampled: c
stays the mean of all c_i. The formula of c_i+ holds for plain SGD only; its L2 decay counts as part of the gradient.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from fedpeft.adapters.spec import AdapterSpec, Section
from fedpeft.aggregation import strategy
from fedpeft.algorithms import AlgorithmOptions, LocalAlgorithm, RoundEnd, RoundStart, algorithms
from fedpeft.codecs import codecs
from fedpeft.config import RunConfig
from fedpeft.config_errors import Fault

CONTROL = "control"


class ScaffoldOptions(AlgorithmOptions):
    """Options of SCAFFOLD."""

    population: Annotated[int, Field(ge=1, le=1_000_000)]
    """Clients of the whole federation (N), sampled or not."""


@algorithms.register("scaffold")
class Scaffold(LocalAlgorithm):
    """Corrects every gradient by c - c_i."""

    Options = ScaffoldOptions
    options: ScaffoldOptions
    groups = (CONTROL,)
    needs_one_version = True

    def sections(self) -> tuple[Section, ...]:
        """See `LocalAlgorithm.sections`; exact, so that c stays the mean of what the clients hold."""
        return (Section(CONTROL, float(self.options.population), "float32"),)

    @property
    def population(self) -> int:
        """See `LocalAlgorithm.population`."""
        return self.options.population

    def misfit(self, config: RunConfig, spec: AdapterSpec) -> Fault | None:
        """See `LocalAlgorithm.misfit`; c corrects the mean of the clients' changes, and whole ones."""
        training, rounds = config.training, config.rounds
        if training.optimizer != "sgd" or training.momentum:
            said = "optimizer" if training.optimizer != "sgd" else "momentum"
            return f"training.{said}", f'is {getattr(training, said)!r}; plain steps are needed: "sgd", momentum = 0.0'
        name, up = config.aggregation.strategy, config.codec.up
        if not strategy(name, config.aggregation.options).is_weighted_mean:
            return "aggregation.strategy", f"is {name!r}; one that takes the weighted mean is needed, as fedavg does"
        if codecs.get(config.codec.encoding).is_sparse:
            return (
                "codec.up",
                f"is {up!r}; what it leaves out would be corrected twice, by residual and by c; use a dense encoding",
            )
        if self.options.population < rounds.clients:
            population = f"is {self.options.population}, fewer than the {rounds.clients} clients of a round"
            return "training.algorithm.population", population
        return None

    def start(self, start: RoundStart) -> None:
        """See `LocalAlgorithm.start`."""
        self._parameters, self._rate = start.parameters, start.learning_rate
        self._received = {name: p.detach().clone() for name, p in start.parameters.items()}
        self._own, self._all = start.state[CONTROL], start.sections[CONTROL]
        self._correction = {name: self._all[name] - self._own[name] for name in start.parameters}

    def after_gradient(self) -> None:
        """See `LocalAlgorithm.after_gradient`."""
        for name, parameter in self._parameters.items():
            if parameter.grad is None:
                parameter.grad = self._correction[name].clone()
            else:
                parameter.grad.add_(self._correction[name])

    def finish(self, steps: int) -> RoundEnd:
        """See `LocalAlgorithm.finish`."""
        own, change = {}, {}
        for name, parameter in self._parameters.items():
            # c_i+ - c_i first: server and client add the same float32 values.
            change[name] = (self._received[name] - parameter.detach()) / (steps * self._rate) - self._all[name]
            own[name] = self._own[name] + change[name]
        return RoundEnd({CONTROL: own}, {CONTROL: change})
