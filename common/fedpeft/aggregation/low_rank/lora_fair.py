"""LoRA-FAIR: the mean of A, and a B corrected so that B A is near the mean of the products (2411.14961).

    M = sum p_i B_i A_i,    dB = (M - Bbar Abar) Abar^T (Abar Abar^T + lambda I)^-1,    A = Abar, B = Bbar + dB

The mean of the factors alone is not the mean of what the clients learned: M - Bbar Abar = sum p_i (B_i - Bbar)(A_i -
Abar). The paper minimises a cosine distance by gradient steps; this is the ridge regression on the same residual, in
closed form, with solutions of the size rank x rank only. It sends no byte more than FedAvg.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np
from pydantic import Field

from fedpeft.aggregation import Changes, Doubles, Options, strategies
from fedpeft.aggregation.low_rank.factor_pairs import FactorStrategy
from fedpeft.aggregation.low_rank.stacked_factors import times


class LoraFairOptions(Options):
    """Options of LoRA-FAIR."""

    regularization: Annotated[float, Field(gt=0, le=1e6)] = 0.01
    """lambda, as a share of the mean of the diagonal of Abar Abar^T: the larger, the less B is corrected."""


@strategies.register("lora_fair")
class LoraFair(FactorStrategy):
    """FedAvg, and for each LoRA layer a correction of B."""

    Options = LoraFairOptions
    options: LoraFairOptions

    def reduce(self, base: Sequence[Doubles], changes: Changes) -> list[Doubles]:
        """See `GroupStrategy.reduce`."""
        mean_a, mean_b = (np.zeros_like(values) for values in base)
        for share, (change_a, change_b) in changes():
            mean_a += share * change_a
            mean_b += share * change_b
        abar = base[0] + mean_a
        residual = np.zeros_like(base[1])  # (M - Bbar Abar) Abar^T, [out, rank]
        for share, (change_a, change_b) in changes():
            residual += times(share * (change_b - mean_b), _gram(change_a - mean_a, abar))
        square = _gram(abar, abar)
        ridge = self.options.regularization * np.trace(square) / len(square)
        if ridge == 0:  # Abar is zero: so is the residual
            return [mean_a, mean_b]
        return [mean_a, mean_b + _solved(square + ridge * np.eye(len(square)), residual)]


# No BLAS below, as in `stacked_factors`.


def _gram(left: Doubles, right: Doubles) -> Doubles:
    """Returns left right^T of [rank, in] each, [rank, rank]."""
    return np.array([[(one * other).sum() for other in right] for one in left])


def _solved(square: Doubles, right: Doubles) -> Doubles:
    """Returns right square^-1 of a positive definite [rank, rank], by elimination without pivots."""
    square, right = square.copy(), right.T.copy()  # symmetric: square X^T = right^T
    for place in range(len(square)):
        for below in range(place + 1, len(square)):
            factor = square[below, place] / square[place, place]
            square[below, place:] -= factor * square[place, place:]
            right[below] -= factor * right[place]
    for place in reversed(range(len(square))):
        for above in range(place + 1, len(square)):
            right[place] -= square[place, above] * right[above]
        right[place] /= square[place, place]
    return right.T.copy()
