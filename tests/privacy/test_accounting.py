"""The budget is what dp-accounting says of the events, and a noise multiplier that is worked out keeps it."""

from __future__ import annotations

import math
from typing import Any

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant

from fedpeft.config import RoundsConfig, RunConfig, parse_config
from fedpeft.errors import ConfigInvalid
from fedpeft.privacy import accounting
from fedpeft.privacy.accounting import calibrated, epsilon, noise_for, overspent
from fedpeft.privacy.events import Adapted, Clipped, Event, Noised

ZERO_OUT = dp_accounting.NeighboringRelation.REPLACE_SPECIAL


def on_paper(delta: float, *releases: tuple[float, int]) -> float:
    """Returns the epsilon of so many Gaussian mechanisms of each noise multiplier, composed by hand."""
    accountant = PLDAccountant(ZERO_OUT)
    for z, count in releases:
        accountant.compose(dp_accounting.GaussianDpEvent(z), count)
    return accountant.get_epsilon(delta)


def noised(z: float) -> Noised:
    return Noised(1.0, z, 8, 7)


def run(**privacy: Any) -> RunConfig:
    model = {"name": "vit_tiny_patch16_224", "classes": ["a", "b"]}
    given = {"clip_norm": 1.0, "mechanism": "central", "delta": 1e-5, **privacy}
    return parse_config({"model": model, "peft": {"method": "bias"}, "rounds": {"count": 5}, "privacy": given})


def test_epsilon_is_that_of_an_accountant_on_paper() -> None:
    ledger: list[Event] = [Clipped(1.0, 7), *[noised(4.0)] * 6, Adapted(0.5, 0.4, 7), noised(8.0)]
    assert epsilon(ledger, 1e-5) == pytest.approx(on_paper(1e-5, (4.0, 6), (8.0, 1)), abs=1e-9)
    assert epsilon([Clipped(1.0, 7)], 1e-5) == 0.0 == epsilon([], 1e-5)


def test_epsilon_is_an_upper_bound_close_to_the_exact_one() -> None:
    """Gaussian mechanisms compose to one, whose epsilon has a closed form (1805.06530)."""
    exact = dp_accounting.get_epsilon_gaussian(4.0 / 6**0.5, 1e-5)
    assert exact <= epsilon([noised(4.0)] * 6, 1e-5) < exact * (1 + 1e-3)


def test_an_epsilon_that_protects_nobody_is_still_worked_out() -> None:
    """And before anybody waits for long, or the memory is full."""
    assert 4e5 < epsilon([noised(0.01)] * 80, 1e-5) < 5e5


def test_the_noise_that_a_target_needs_keeps_it_and_is_the_least() -> None:
    z = noise_for(2.0, 1e-5, 50)
    assert on_paper(1e-5, (z, 50)) <= 2.0 < on_paper(1e-5, (z - 1e-4, 50))
    assert len(f"{z:.12g}".replace(".", "")) <= 7, "a number that a person can read"


def test_the_noise_is_found_in_few_steps_and_is_the_least(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of the sixth digit at a time takes hours where the accountant's grid is coarse, as with epsilon 1000."""
    tried: list[float] = []

    def composed(releases: tuple[tuple[float, int], ...], delta: float) -> float:
        ((z, _),) = releases
        tried.append(z)
        return 1.0 if z < wanted else 0.5

    monkeypatch.setattr(accounting, "_composed", composed)
    exact = dp_accounting.get_sigma_gaussian(0.9, 1e-5)
    for wanted in (0.0, exact * 1.0001, exact * 1.7, 9_000.0):
        tried.clear()
        noise_for.cache_clear()
        z = noise_for(0.9, 1e-5, 1)
        assert z >= wanted and z - max(wanted, exact) < 1e-5 and len(tried) < 70
    wanted = math.inf
    noise_for.cache_clear()
    assert noise_for(0.9, 1e-5, 1) == math.inf


def test_a_run_with_a_target_has_the_noise_for_all_of_its_rounds() -> None:
    found = calibrated(run(target_epsilon=3.0))
    assert found.privacy is not None and found.privacy.noise_multiplier == noise_for(3.0, 1e-5, 5)
    ledger = [noised(found.privacy.noise_multiplier)] * 4
    assert overspent(found, ledger, 5) == ""
    assert "with round 6 epsilon would be 3" in overspent(found, [*ledger, ledger[0]], 6)
    given = run(target_epsilon=3.0, noise_multiplier=9.0)
    assert calibrated(given) is given, "noise that is given is taken, and the target is a limit"


def test_a_target_that_needs_more_noise_than_a_run_may_have_is_refused() -> None:
    config = run(mechanism="local", target_epsilon=0.05, delta=1e-6)
    config = config.model_copy(update={"rounds": RoundsConfig(count=10_000)})
    with pytest.raises(ConfigInvalid, match=r"needs a noise multiplier of 13,854\.3 over 10,000 rounds") as caught:
        calibrated(config)
    assert [field for field, _ in caught.value.fields] == ["privacy.target_epsilon"]


def test_without_a_limit_nothing_is_overspent() -> None:
    assert overspent(run(noise_multiplier=0.1), [noised(0.1)] * 9, 10) == ""


def test_an_accountant_is_only_loaded_where_there_is_noise() -> None:
    assert "dp_accounting" not in vars(accounting)
