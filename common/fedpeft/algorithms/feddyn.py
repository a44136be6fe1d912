"""FedDyn at the client: a pull towards the received values, and lambda_i, the gradient that the client has at the end.

A client minimises f_i(y) + a / 2 ||y - x||^2 - <lambda_i, y> from the received x (2111.04263, algorithm 1), so the
gradient of each step is

    g + a (y - x) - lambda_i,    and at the end    lambda_i <- lambda_i - a (y - x)

lambda_i is kept divided by a. The server's half is the strategy of the same name, and neither is anything alone. Once
all clients end at x, lambda_i is the gradient of f_i, and the mean of all is zero: the optimum of all is a fixed point,
however different the f_i are. Any optimizer will do; with SGD the L2 decay counts as part of f_i. The paper's code
divides a by a client's part of all examples, and clips gradients at 10 (`training.clip_gradient_norm` clips g alone);
here a is the same for all.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from fedpeft.adapters.spec import AdapterSpec
from fedpeft.aggregation.feddyn import FEDDYN
from fedpeft.algorithms import AlgorithmOptions, LocalAlgorithm, RoundEnd, RoundStart, algorithms
from fedpeft.codecs import codecs
from fedpeft.config import RunConfig
from fedpeft.config_errors import Fault
from fedpeft.privacy.transforms import transforms_of

MULTIPLIER = "multiplier"


class FedDynOptions(AlgorithmOptions):
    """Options of FedDyn at the client."""

    alpha: Annotated[float, Field(gt=0, le=1000)] = 0.01
    """Strength of the pull (a); the paper takes 0.001 to 0.1."""


@algorithms.register(FEDDYN)
class FedDyn(LocalAlgorithm):
    """Adds the gradients of the proximal and of the linear term."""

    Options = FedDynOptions
    options: FedDynOptions
    groups = (MULTIPLIER,)
    needs_one_version = True

    def misfit(self, config: RunConfig, spec: AdapterSpec) -> Fault | None:
        """See `LocalAlgorithm.misfit`; the server must add the very changes that clients take off their lambda_i."""
        name, up = config.aggregation.strategy, config.codec.up
        if name != FEDDYN:
            return (
                "aggregation.strategy",
                f"is {name!r}; {FEDDYN!r} is needed, which corrects by the mean of all lambda_i",
            )
        if codecs.get(config.codec.encoding).is_sparse:
            return "codec.up", f"is {up!r}; what it leaves out would be missing in h; use a dense encoding"
        if config.codec.error_feedback:
            text = (
                "is true; an update that did not count would come again with the next one, and be in h alone; use false"
            )
            return "codec.error_feedback", text
        for transform in transforms_of(config):
            return transform.field, "would take away from h what clients keep in lambda_i"
        return None

    def start(self, start: RoundStart) -> None:
        """See `LocalAlgorithm.start`."""
        self._parameters, self._own = start.parameters, start.state[MULTIPLIER]
        self._received = {name: p.detach().clone() for name, p in start.parameters.items()}
        self._aim = {name: values + self._own[name] for name, values in self._received.items()}

    def after_gradient(self) -> None:
        """See `LocalAlgorithm.after_gradient`."""
        for name, parameter in self._parameters.items():
            pull = (parameter.detach() - self._aim[name]).mul_(self.options.alpha)
            if parameter.grad is None:
                parameter.grad = pull
            else:
                parameter.grad.add_(pull)

    def finish(self, steps: int) -> RoundEnd:
        """See `LocalAlgorithm.finish`."""
        changes = {name: p.detach() - self._received[name] for name, p in self._parameters.items()}
        return RoundEnd({MULTIPLIER: {name: self._own[name] - change for name, change in changes.items()}})
