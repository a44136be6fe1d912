"""FedAdam: v = b2 v + (1 - b2) Delta^2 (2003.00295, algorithm 2).

With `bias_correction`, which the paper leaves out, the step is Adam's own (1412.6980, algorithm 1): v starts at 0, and
both moments are divided by 1 - b^t, t the number of steps that the tensor itself took.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fedpeft.aggregation import Doubles, strategies
from fedpeft.aggregation.adaptive import Adaptive, DecayOptions


class FedAdamOptions(DecayOptions):
    """Options of FedAdam."""

    bias_correction: bool = False
    """Adam's correction of both moments; not in the paper."""


@strategies.register("fedadam")
class FedAdam(Adaptive):
    """Steps in the measure of a value's recent changes."""

    Options = FedAdamOptions
    options: FedAdamOptions
    slots = ("m", "v", "steps")

    def second(self, v: Doubles, square: Doubles) -> Doubles:
        """See `Adaptive.second`."""
        return self.options.beta2 * v + (1 - self.options.beta2) * square

    def initial(self, slot: str, size: int) -> Doubles:
        """See `Strategy.initial`."""
        if slot == "steps":
            return np.zeros(1)
        if slot == "v" and self.options.bias_correction:
            return np.zeros(size)
        return super().initial(slot, size)

    def step(self, x: Doubles, delta: Doubles, state: Mapping[str, Doubles]) -> tuple[Doubles, dict[str, Doubles]]:
        """See `Strategy.step`."""
        m, v = self.moments(delta, state)
        steps = state["steps"] + 1
        after = {"m": m, "v": v, "steps": steps}
        if not self.options.bias_correction:
            return self.move(x, m, v), after
        t = float(steps[0])
        corrected = m / (1 - self.options.beta1**t), v / (1 - self.options.beta2**t)
        return self.move(x, *corrected), after
