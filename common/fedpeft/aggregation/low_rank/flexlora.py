"""FlexLoRA: the mean of the products B A, brought back to the rank of the run by its singular values (2402.11505).

    M = sum p_i B_i A_i = U S V^T,    B = U_r S_r,  A = V_r^T

|M - B A|^2 is the sum of the squares of the singular values left out, the least that a product of the rank can have
(Eckart and Young). It sends no byte more than FedAvg. As in the
authors' code, S goes into B, so that the rows of A have the length 1, about that of LoRA's own start; or half of it
into each. A layer of which nothing was learned in some direction keeps the A it had there, and a B of zero: were both
zero, no gradient would ever reach them.

The factors turn with every version, so that values of one version mean nothing in the next: what a client kept of an
update cannot be added to a later one, and error feedback is refused.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedpeft.adapters.spec import AdapterSpec
from fedpeft.aggregation import Changes, Doubles, Options, strategies
from fedpeft.aggregation.low_rank.factor_pairs import FactorStrategy, products
from fedpeft.config import RunConfig
from fedpeft.config_errors import Fault


class FlexLoraOptions(Options):
    """Options of FlexLoRA."""

    balanced: bool = False
    """Square roots of the singular values in A and in B, instead of all in B."""


@strategies.register("flexlora")
class FlexLora(FactorStrategy):
    """The nearest product of the rank to the mean of the products, for each LoRA layer."""

    Options = FlexLoraOptions
    options: FlexLoraOptions

    def misfit(self, config: RunConfig, spec: AdapterSpec) -> Fault | None:
        """See `Strategy.misfit`."""
        if config.codec.error_feedback:
            text = "is true; strategy 'flexlora' turns the factors in every version, so it must be false"
            return super().misfit(config, spec) or ("codec.error_feedback", text)
        return super().misfit(config, spec)

    def reduce(self, base: Sequence[Doubles], changes: Changes) -> list[Doubles]:
        """See `GroupStrategy.reduce`."""
        u, s, v = products(base, changes).svd()
        rank = min(len(base[0]), len(s))
        inside = np.sqrt(s[:rank, None]) if self.options.balanced else np.ones((rank, 1))
        a, b = base[0].copy(), np.zeros_like(base[1])
        a[:rank] = v[:rank] * inside
        b[:, :rank] = (u[:rank] * s[:rank, None] / inside).T
        return [a - base[0], b - base[1]]
