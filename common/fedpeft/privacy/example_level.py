"""The budget of a client whose training hides single examples: the Poisson-subsampled Gaussian mechanism. Pure.

    epsilon = PLD accountant of the steps of all its rounds, at privacy.delta
    step    = each of n examples in the batch with probability min(1, batch_size / n), then noise of z clip_norm

Two data sets are neighbours if one has an example more (`ADD_OR_REMOVE_ONE`). Each client has its own budget: it
depends on its number of examples. Rounds without it cost it nothing, and no amplification by its being sampled for a
round is claimed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from fedpeft.config import PrivacyConfig, RunConfig

_INTERVAL = 1e-3
"""Discretisation of privacy losses; results are upper bounds, above those of a finer one by less than a thousandth."""
_COARSE = 1e-2
"""The same where a noise multiplier is searched for."""
_LITTLE = 0.2**2
"""Square of the noise multiplier below which it is coarser: nobody is protected any more."""
_LEAST = math.log(0.02)
"""Logarithm of a noise multiplier that hides nothing, below which none is searched for."""
_NOTHING = 1e-9
"""Epsilon that stands for 0 where its logarithm is taken."""
_MARGIN = 1.0005
"""Factor by which a noise multiplier grows that was found too small by the finer accountant."""


@dataclass(frozen=True, slots=True)
class Steps:
    """Steps of one client over data of one size.

    Attributes:
        examples: Number of examples, which the sampling rate depends on.
        count: Number of steps.
    """

    examples: int
    count: int


def example_epsilon(noise_multiplier: float, batch_size: int, ledger: Sequence[Steps], delta: float) -> float:
    """Returns the epsilon of a client that has made these steps; 0 without any."""
    together: dict[float, int] = {}
    for steps in ledger:
        rate = sampling_rate(batch_size, steps.examples)
        together[rate] = together.get(rate, 0) + steps.count
    return _composed(noise_multiplier, tuple(sorted(together.items())), delta) if together else 0.0


def sampling_rate(batch_size: int, examples: int) -> float:
    """Returns the probability with which an example is in a batch."""
    return min(1.0, batch_size / examples)


def no_protection(privacy: PrivacyConfig, examples: int) -> str:
    """Returns in a sentence that a delta protects no example of a client with so many; empty if it may."""
    delta = privacy.delta or 0.0
    if privacy.mechanism != "example" or delta * examples < 1:
        return ""
    return (
        f"privacy.delta is {delta:g}, which is no protection for one of {examples:,} examples: it must be far below "
        f"1 / {examples:,}"
    )


def example_noise(config: RunConfig, examples: int, steps: int) -> float:
    """Returns the noise multiplier of a client with so many examples, of which a round makes so many steps.

    That of the run, or where it gives a budget only, the least with which the client keeps it in all rounds.
    """
    privacy = config.privacy
    assert privacy is not None and privacy.delta is not None  # the settings were checked
    if privacy.noise_multiplier is not None:
        return privacy.noise_multiplier
    assert privacy.target_epsilon is not None
    rate = sampling_rate(config.training.batch_size, examples)
    return _noise_for(privacy.target_epsilon, privacy.delta, rate, steps * config.rounds.count)


@lru_cache(maxsize=256)
def _composed(z: float, steps: tuple[tuple[float, int], ...], delta: float, interval: float = _INTERVAL) -> float:
    import dp_accounting
    from dp_accounting.pld import PLDAccountant

    interval *= max(1.0, _LITTLE / z**2)
    accountant = PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE, interval)
    for rate, count in steps:
        step = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(z))
        accountant.compose(dp_accounting.SelfComposedDpEvent(step, count))
    return float(accountant.get_epsilon(delta))


@lru_cache(maxsize=256)
def _noise_for(target: float, delta: float, rate: float, steps: int) -> float:
    """Returns the least noise multiplier, to about a thousandth, with which so many steps stay within an epsilon."""
    from scipy.optimize import brentq  # dp-accounting needs it too

    every = ((rate, steps),)

    def excess(log_z: float) -> float:
        return math.log(max(_composed(math.exp(log_z), every, delta, _COARSE), _NOTHING) / target)

    low, high = -0.5, 0.5
    while excess(high) > 0:
        low, high = high, high + 1
    while excess(low) <= 0 and low > _LEAST:
        low, high = low - 1, low
    if low <= _LEAST:
        return math.exp(high)
    z = math.exp(brentq(excess, low, high, xtol=_MARGIN - 1))
    while _composed(z, every, delta) > target:
        z *= _MARGIN
    return float(z)
