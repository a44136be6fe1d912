"""FedYogi: v - (1 - b2) Delta^2 sign(v - Delta^2) (2003.00295, algorithm 2)."""

from __future__ import annotations

import numpy as np

from fedpeft.aggregation import Doubles, strategies
from fedpeft.aggregation.adaptive import Adaptive, DecayOptions


@strategies.register("fedyogi")
class FedYogi(Adaptive):
    """FedAdam whose v moves by the size of Delta^2 alone, so that it forgets large changes slowly."""

    Options = DecayOptions
    options: DecayOptions

    def second(self, v: Doubles, square: Doubles) -> Doubles:
        """See `Adaptive.second`."""
        return v - (1 - self.options.beta2) * square * np.sign(v - square)
