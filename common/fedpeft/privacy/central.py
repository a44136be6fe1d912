"""Central differential privacy of clients: the Gaussian mechanism at the server, once a round (1710.06963).

    Delta = (sum of w_i Delta_i + N(0, sigma^2 I)) / m,    w_i = min(1, C / ||Delta_i||),    sigma = z C

The unit of protection is a client, with all that it sends in the run. Two runs are neighbours if in one of them a
client takes part with updates that add nothing (`REPLACE_SPECIAL`, zero-out). All weigh alike, and m is the number of
clients that a round wants (`rounds.clients`), not of those that came: so a client changes the sum by at most C, and
nothing else of the result.

With a quantile the bound follows the clients' norms (1905.03871): the number of updates within this round's C is
published with noise as well, and moves the bound of the next round.

    b = (sum of (1[||Delta_i|| <= C] - 1/2) + N(0, s^2)) / m + 1/2,    C' = C exp(-eta (b - gamma))
    z_sum = (z^-2 - (2 s)^-2)^(-1/2)

A client changes the centred count by at most 1/2. The sum has the noise z_sum C, with this round's C; both together are
as private as one Gaussian mechanism of z, which is what the event says.

Sum and result are multiples of a grid, see `fedpeft.privacy.noise`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedpeft.config import DEFAULT_QUANTILE_RATE, PrivacyConfig
from fedpeft.privacy.events import Adapted, Event, Noised
from fedpeft.privacy.noise import GriddedNoise, gaussian

_LEAST, _MOST = 1e-9, 1e9
"""Range of an adapted bound, that of `privacy.clip_norm`."""


@dataclass(frozen=True, slots=True)
class NoisedSum:
    """The rule of one round: what each update is multiplied by, and the noise of the sum.

    Attributes:
        weights: Factors by client, at most 1.
        divisor: m.
        noise: Of the sum.
    """

    weights: Mapping[str, float]
    divisor: int
    noise: GriddedNoise

    def publish(self, sums: NDArray[np.float64]) -> None:
        """Adds noise to a block of the sum, in place, and divides it: what is left is safe to publish."""
        self.noise.add(sums, self.divisor)


@dataclass(frozen=True, slots=True)
class Central:
    """The mechanism of a run.

    Attributes:
        privacy: Its settings, with a noise multiplier.
        cohort: m.
    """

    privacy: PrivacyConfig
    cohort: int

    @property
    def noise_multiplier(self) -> float:
        """Noise of the round as a whole: z."""
        return self.privacy.noise_multiplier or math.inf

    @property
    def count_sigma(self) -> float:
        """Standard deviation of the count's noise: s, infinite where nothing is counted."""
        if self.privacy.quantile is None:
            return math.inf
        return self.privacy.quantile_noise or max(self.cohort / 20, self.noise_multiplier)

    @property
    def sum_multiplier(self) -> float:
        """Noise of the sum: z_sum, and z where nothing is counted."""
        return 1 / math.sqrt(self.noise_multiplier**-2 - (2 * self.count_sigma) ** -2)

    def bound(self, past: Iterable[Event]) -> float:
        """Returns the bound C of the round that follows some events, oldest first."""
        bound = self.privacy.clip_norm or 0.0
        for event in past:
            if isinstance(event, Adapted):
                bound = event.bound
        return bound

    def noised_sum(self, norms: Mapping[str, float], past: Sequence[Event], values: int) -> NoisedSum:
        """Returns the rule of a round.

        Args:
            norms: Euclidean norms of the updates by client; within the bound where it does not adapt.
            past: Events of the rounds before.
            values: Values in an update.
        """
        bound = self.bound(past)
        # The norms are floats too: a factor that is a little smaller keeps the product within the bound for sure.
        factors = {c: 1.0 if norm <= bound else bound / norm * (1 - 2.0**-40) for c, norm in norms.items()}
        return NoisedSum(factors, self.cohort, GriddedNoise.of(bound, self.sum_multiplier, values))

    def events(self, norms: Iterable[float], past: Sequence[Event]) -> tuple[Event, ...]:
        """Returns the events of a round with updates of these norms; draws the noise of the count."""
        norms, bound = list(norms), self.bound(past)
        noised = Noised(bound, self.noise_multiplier, self.cohort, len(norms))
        if self.privacy.quantile is None:
            return (noised,)
        centred = sum(0.5 if norm <= bound else -0.5 for norm in norms)
        share = (centred + self.count_sigma * float(gaussian(1)[0])) / self.cohort + 0.5
        return noised, Adapted(self.next_bound(bound, share), share, len(norms))

    def next_bound(self, bound: float, unclipped: float) -> float:
        """Returns the bound C' after a round with bound C, of which a share was within it."""
        quantile = self.privacy.quantile
        assert quantile is not None
        rate = self.privacy.quantile_rate or DEFAULT_QUANTILE_RATE
        return min(max(bound * math.exp(-rate * (unclipped - quantile)), _LEAST), _MOST)
