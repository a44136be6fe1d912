"""FedEx-LoRA: the mean of the factors, and a residual that makes the mean of the products exact (2410.09432).

    A = sum p_i A_i,    B = sum p_i B_i,    R <- R + sum p_i (B_i - B)(A_i - A)

so that W + s (B A + R) is the mean of what the clients hold. The authors add R to each client's W, as a matrix of out x
in. Here it stays in factors, U V of method `lora_residual`, and a version has all of it. Its rank grows by at most
(clients - 1) x rank a round. A round is exact while that fits into `residual_rank`, and always if that is the smaller
side of the layer; else the smallest singular values are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from fedpeft.aggregation import Changes, Doubles, strategies
from fedpeft.aggregation.low_rank.factor_pairs import ResidualStrategy
from fedpeft.aggregation.low_rank.stacked_factors import Stack


@strategies.register("fedex_lora")
class FedExLora(ResidualStrategy):
    """FedAvg, and for each LoRA layer a residual."""

    def reduce(self, base: Sequence[Doubles], changes: Changes) -> list[Doubles]:
        """See `GroupStrategy.reduce`."""
        mean_a, mean_b = (np.zeros_like(values) for values in base[:2])
        for share, (change_a, change_b) in changes():
            mean_a += share * change_a
            mean_b += share * change_b

        def centred() -> Iterator[tuple[float, Doubles, Doubles]]:
            for share, (change_a, change_b) in changes():
                yield share, change_b - mean_b, change_a - mean_a

        return [mean_a, mean_b, *self.added(base, Stack.of(centred(), len(mean_b), mean_a.shape[1]))]
