"""The budget of a run: the epsilon that its ledger has spent, by the accountant of dp-accounting. Pure.

    epsilon = PLD accountant of the events of all committed rounds, at privacy.delta

Rounds are composed plainly, as if every client took part in each: those of a round are sampled from the clients that
happen to be there, by a seed that the run file holds, and no theorem on amplification by sampling is about that.

Only rounds whose result was published are in the ledger, and that is right: noise that was drawn in a fold which was
not committed, because the process was killed or another server was faster, went nowhere. What it made is no version;
no call sends it, and the file is removed. The folds that were cut off say nothing about the updates either: no
interruption looks at what was drawn.
"""

from __future__ import annotations

import bisect
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache

from fedpeft.config import MOST_NOISE, PrivacyConfig, RunConfig
from fedpeft.errors import ConfigInvalid
from fedpeft.formatting import counted
from fedpeft.privacy.events import Event, Noised

_INTERVAL = 1e-4
"""dp-accounting's own discretisation of privacy losses; results are upper bounds."""
_FINE = 200.0
"""Epsilon up to which it is used; it is coarser beyond, in proportion, where nobody is protected any more."""


class BudgetSpent(Exception):
    """Another round would spend more epsilon than the run may; the message is a sentence."""


def epsilon(events: Iterable[Event], delta: float) -> float:
    """Returns the epsilon of a ledger; 0 if it has no noised release. Takes a second where it is large."""
    releases = Counter(event.noise_multiplier for event in events if isinstance(event, Noised))
    return _composed(tuple(sorted(releases.items())), delta)


def local_epsilon(noise_multiplier: float, updates: int, delta: float) -> float:
    """Returns the epsilon of a client that has sent so many updates with noise of its own.

    Other data in place of all of its data (`REPLACE_ONE`): two clipped updates are up to twice the bound apart.
    """
    return _composed(((noise_multiplier / 2, updates),), delta) if updates else 0.0


@lru_cache(maxsize=64)
def _composed(releases: tuple[tuple[float, int], ...], delta: float) -> float:
    """Returns the epsilon of Gaussian mechanisms: so many of each noise multiplier."""
    if not releases:
        return 0.0
    import dp_accounting
    from dp_accounting.pld import PLDAccountant

    together = 1 / math.sqrt(sum(count / z**2 for z, count in releases))
    rough = dp_accounting.get_epsilon_gaussian(together, delta)
    interval = _INTERVAL * max(1.0, rough / _FINE)
    accountant = PLDAccountant(dp_accounting.NeighboringRelation.REPLACE_SPECIAL, interval)
    for z, count in releases:
        accountant.compose(dp_accounting.SelfComposedDpEvent(dp_accounting.GaussianDpEvent(z), count))
    return float(accountant.get_epsilon(delta))


@lru_cache(maxsize=16)
def noise_for(target_epsilon: float, delta: float, releases: int) -> float:
    """Returns the least noise multiplier, to six digits, with which so many releases spend at most an epsilon.

    Infinity where `MOST_NOISE` does not suffice.
    """
    import dp_accounting

    def units_of(exact_epsilon: float) -> int:
        exact: float = dp_accounting.get_sigma_gaussian(exact_epsilon, delta) * math.sqrt(releases)
        return int(min(math.ceil(exact * 10**digits), limit))

    def spent(units: int) -> float:
        return _composed(((round(units / 10**digits, digits), releases),), delta)

    def is_enough(units: int) -> bool:
        return spent(units) <= target_epsilon

    guess = dp_accounting.get_sigma_gaussian(target_epsilon, delta) * math.sqrt(releases)
    digits = 5 - math.floor(math.log10(guess))
    limit = math.floor(MOST_NOISE * 10**digits)
    # What is accounted for is on a grid, and above the exact epsilon by what hardly depends on the noise: an evaluation
    # takes seconds where rounds are many, and most searches end with the third.
    excess = spent(units_of(target_epsilon)) - target_epsilon
    enough = units_of(max(target_epsilon - excess, target_epsilon / 2))
    below, step = enough - 1, 1
    while not is_enough(enough):
        if enough >= limit:
            return math.inf
        below, enough, step = enough, min(enough + step, limit), 2 * step
    while below > 0 and is_enough(below):
        below, enough, step = max(0, below - step), below, 2 * step
    units = bisect.bisect_left(range(below + 1, enough), True, key=is_enough) + below + 1
    return float(round(units / 10**digits, digits))


def calibrated(config: RunConfig) -> RunConfig:
    """Returns a run with its noise multiplier, which is worked out where the run file gives a budget only.

    Not that of single examples, which each client works out from the number of its own.

    Raises:
        ConfigInvalid: If the budget needs more noise than `noise_multiplier` may be.
    """
    privacy = config.privacy
    if privacy is None or privacy.mechanism in (None, "example") or privacy.noise_multiplier is not None:
        return config
    assert privacy.target_epsilon is not None and privacy.delta is not None  # the settings were checked
    z = noise_for(privacy.target_epsilon, privacy.delta, config.rounds.count)
    z *= 2 if privacy.mechanism == "local" else 1
    if z > MOST_NOISE:
        text = f"needs a noise multiplier of {z:,.6g} over {counted(config.rounds.count, 'round')}, and at most "
        text += f"{MOST_NOISE:,g} is taken; raise it or privacy.delta, or hold fewer rounds"
        raise ConfigInvalid(f"privacy.target_epsilon {text}", (("privacy.target_epsilon", text),))
    worked_out = PrivacyConfig.model_validate(privacy.model_dump() | {"noise_multiplier": z})
    return config.model_copy(update={"privacy": worked_out})


def overspent(config: RunConfig, past: Sequence[Event], number: int) -> str:
    """Returns the reason not to publish round `number` after some events, in a sentence; empty if there is none."""
    privacy = config.privacy
    if privacy is None or privacy.mechanism != "central" or not (z := privacy.noise_multiplier):
        return ""
    spent = epsilon([*past, Noised(1.0, z, 1, 1)], privacy.delta or 0.0)
    return beyond(privacy, spent, f"round {number}")


def locally_overspent(config: RunConfig, sent: int) -> str:
    """Returns the reason for a client that has sent so many updates to send no other; empty if there is none."""
    privacy = config.privacy
    if privacy is None or privacy.mechanism != "local" or not (z := privacy.noise_multiplier):
        return ""
    spent = local_epsilon(z, sent + 1, privacy.delta or 0.0)
    return beyond(privacy, spent, f"update {sent + 1} of this client")


def beyond(privacy: PrivacyConfig, spent: float, what: str) -> str:
    """Returns in a sentence that with something an epsilon would be spent that is beyond the target; else nothing."""
    if privacy.target_epsilon is None or spent <= privacy.target_epsilon:
        return ""
    return (
        f"the privacy budget is spent: with {what} epsilon would be {spent:.4g}, and privacy.target_epsilon of this "
        f"run is {privacy.target_epsilon:g}"
    )
