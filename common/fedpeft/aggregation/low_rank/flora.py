"""FLoRA: the clients' products are stacked onto what is frozen, and each round trains factors from their start again.

    R <- R + sum p_i B_i A_i,    A and B as they were,    W + s R is the mean of what the clients hold (2409.05976)

The sum of the products is the product of the stacked factors, so no error is made by averaging, and clients may have
factors of different rank. The authors send the stack, which every client adds to its W. Here it goes onto the residual
U V of method `lora_residual`, which a version has whole; a round is exact while rank x clients more fit into
`residual_rank`, and always if that is the smaller side of the layer; else the smallest singular values are left out.
The authors draw A anew in each round; here it begins each time as it was drawn for the run, and B at zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedpeft.aggregation import Changes, Doubles, strategies
from fedpeft.aggregation.low_rank.factor_pairs import ResidualStrategy, products
from fedpeft.aggregation.low_rank.stacked_factors import Stack


@strategies.register("flora")
class Flora(ResidualStrategy):
    """The residual takes up the mean of the products; A and B begin anew."""

    def reduce(self, base: Sequence[Doubles], changes: Changes) -> list[Doubles]:
        """See `GroupStrategy.reduce`."""
        a, b = base[:2]
        learned = products(base, changes).minus(Stack(b.T, a))
        return [np.zeros_like(a), np.zeros_like(b), *self.added(base, learned)]
