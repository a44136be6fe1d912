"""Noise at the server: its size and source, what a client can change of the sum, and a bound that follows quantiles."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.adapters import payload
from fedpeft.adapters.spec import AdapterSpec, TensorSpec
from fedpeft.aggregation import UpdateFacts, strategy
from fedpeft.config import RunConfig, parse_config
from fedpeft.errors import ConfigInvalid, Internal
from fedpeft.privacy import central, noise
from fedpeft.privacy.central import Central, NoisedSum
from fedpeft.privacy.events import Adapted, Noised
from fedpeft.privacy.round_privacy import round_privacy_of
from fedpeft.rounds.combinations import check_combination, misfits
from fedpeft.rounds.folding.contributions import Contribution
from fedpeft.rounds.folding.fold import fold_tensors

BIAS = AdapterSpec.of("bias", [TensorSpec("head.weight", (2, 3))])
PRIVATE = {"clip_norm": 1.0, "mechanism": "central", "noise_multiplier": 1.0, "delta": 1e-3}


def run(clients: int = 4, aggregation: dict[str, Any] | None = None, **privacy: Any) -> RunConfig:
    data = {
        "model": {"name": "vit_tiny_patch16_224", "classes": ["a", "b"]},
        "peft": {"method": "bias"},
        "rounds": {"clients": clients},
        "aggregation": aggregation or {},
        "privacy": {**PRIVATE, **privacy},
    }
    return parse_config(data)


def mechanism(clients: int = 4, **privacy: Any) -> Central:
    found = round_privacy_of(run(clients, **privacy)).central
    assert found is not None
    return found


def test_noise_is_standard_normal_and_differs_every_time() -> None:
    values = noise.gaussian(400_001)
    assert values.shape == (400_001,) and np.isfinite(values).all()
    assert abs(values.mean()) < 6 / math.sqrt(values.size)
    assert abs(values.std() - 1) < 6 / math.sqrt(2 * values.size)
    for bound, share in ((1.0, 0.682689), (2.0, 0.954500), (3.0, 0.997300)):
        assert np.mean(np.abs(values) < bound) == pytest.approx(share, abs=0.004)
    halves = values[:200_000], values[200_001:]
    assert abs(np.corrcoef(*halves)[0, 1]) < 0.015, "the two halves come of the same uniforms, and do not go together"
    assert not np.array_equal(values[:9], noise.gaussian(9)) and noise.gaussian(0).size == 0


def test_noise_comes_from_the_system_and_from_no_generator_that_has_a_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise.os, "urandom", lambda size: b"\xff" * size)
    np.testing.assert_allclose(noise.gaussian(4), 0.0, atol=1e-7)
    monkeypatch.setattr(noise.os, "urandom", lambda size: bytes(size))
    assert float(np.abs(noise.gaussian(2)).max()) == pytest.approx(math.sqrt(2 * 53 * math.log(2)))


def silent(size: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.zeros(size)


def contribution(client: str, values: np.ndarray[Any, np.dtype[np.float32]], spec: AdapterSpec) -> Contribution:
    manifest, data = payload.encode({"w": values}, spec.sent(1), "float32")
    return Contribution(client, UpdateFacts(7), manifest, memoryview(data))


@given(seed=st.integers(0, 10_000), scale=st.floats(1e-3, 1e3), quantile=st.booleans())
def test_one_client_moves_the_sum_by_at_most_the_bound(seed: int, scale: float, quantile: bool) -> None:
    """The sensitivity: any client's update in place of zero, with everything else of the fold as it is."""
    draw, spec = np.random.default_rng(seed), AdapterSpec.of("m", [TensorSpec("w", (50,))])
    found = mechanism(3, clip_norm=0.7, **({"quantile": 0.5} if quantile else {}))
    updates = {c: (scale * draw.standard_normal(50)).astype(np.float32) for c in "abc"}
    if not quantile:  # then the client scales, and the server refuses what is larger
        updates = {
            c: (v * np.float32(min(1, 0.6999 / np.linalg.norm(v)))).astype(np.float32) for c, v in updates.items()
        }

    def summed(**changed: np.ndarray[Any, np.dtype[np.float32]]) -> np.ndarray[Any, np.dtype[np.float64]]:
        now = {**updates, **changed}
        norms = {c: float(np.linalg.norm(v.astype(np.float64))) for c, v in now.items()}
        rule = found.noised_sum(norms, (), 50)
        quiet = NoisedSum(rule.weights, rule.divisor, replace(rule.noise, sigma=0.0))
        parts = [contribution(c, v, spec) for c, v in now.items()]
        base = {"w": np.zeros(50, np.float32)}
        rule_of = strategy("fedavg", {})
        (folded,) = fold_tensors(parts, spec.shared, rule_of, base, {}, clips=True, noised=quiet)
        return folded.values.astype(np.float64) * rule.divisor

    whole = summed()
    for client in "abc":
        moved = np.linalg.norm(whole - summed(**{client: np.zeros(50, np.float32)}))
        assert moved <= 0.7 * (1 + 1e-6)


def test_all_weigh_alike_and_the_sum_is_divided_by_the_clients_that_a_round_wants(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(noise, "gaussian", silent)
    rule = mechanism(4).noised_sum({"a": 0.5, "b": 1.0}, (), 2)
    assert dict(rule.weights) == {"a": 1.0, "b": 1.0} and rule.divisor == 4
    sums = np.array([1.0, -3.0])
    rule.publish(sums)
    np.testing.assert_allclose(sums, [0.25, -0.75], atol=1e-9)


def test_the_noise_has_the_size_that_is_accounted_for() -> None:
    rule = mechanism(8, clip_norm=0.5, noise_multiplier=3.0).noised_sum({"a": 0.5}, (), 10_000)
    assert 1.5 <= rule.noise.sigma < 1.5 * (1 + 1e-7)
    sums = np.zeros(200_000)
    rule.publish(sums)
    assert sums.std() == pytest.approx(1.5 / 8, rel=0.01)
    steps = sums / (rule.noise.grid / 8)
    np.testing.assert_allclose(steps, np.rint(steps), atol=1e-3)  # nothing below the grid is left of what was summed


def test_a_bound_that_adapts_shares_the_noise_between_sum_and_count() -> None:
    found = mechanism(100, quantile=0.5)
    assert found.count_sigma == 5.0 and found.sum_multiplier == pytest.approx(1.005038, abs=1e-6)
    again = 1 / math.sqrt(found.sum_multiplier**-2 + (2 * found.count_sigma) ** -2)
    assert again == pytest.approx(1.0, rel=1e-12)
    assert mechanism(8, quantile=0.5).count_sigma == 1.0, "a twentieth of eight clients would be too little"
    noised, adapted = found.events([0.5] * 100, ())
    assert isinstance(noised, Noised) and isinstance(adapted, Adapted)
    assert (noised.bound, noised.noise_multiplier, noised.divisor, noised.count) == (1.0, 1.0, 100, 100)
    later = found.noised_sum({"a": 0.1}, (noised, adapted), 1)
    assert later.noise.sigma == pytest.approx(found.sum_multiplier * adapted.bound, rel=1e-6), (
        "of its own round's bound"
    )


@pytest.mark.parametrize("first", [0.05, 1.0, 40.0])
def test_a_bound_that_adapts_converges_to_norms_that_are_all_the_same(
    first: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From both sides. With clipped ones counted in place of unclipped ones it runs away."""
    monkeypatch.setattr(central, "gaussian", silent)
    found, events = mechanism(10, clip_norm=first, quantile=0.5), list[Any]()
    for _ in range(200):
        events += found.events([0.1] * 10, events)
    assert found.bound(events) == pytest.approx(0.1, rel=0.11)


def test_an_update_above_a_bound_that_adapts_is_scaled_by_the_server() -> None:
    rule = mechanism(2, quantile=0.5).noised_sum({"a": 0.5, "b": 4.0}, (), 1)
    assert rule.weights["a"] == 1.0 and 4.0 * rule.weights["b"] <= 1.0
    assert rule.weights["b"] == pytest.approx(0.25, rel=1e-9)


def test_noise_is_only_added_where_the_updates_enter_by_one_sum() -> None:
    rule = mechanism(1).noised_sum({"a": 0.5}, (), 50)
    spec = AdapterSpec.of("m", [TensorSpec("w", (50,))])
    parts, base = [contribution("a", np.zeros(50, np.float32), spec)], {"w": np.zeros(50, np.float32)}
    for name, clips in (("median", True), ("fedexp", True), ("fedavg", False)):
        with pytest.raises(Internal, match="do not enter by one sum"):
            list(fold_tensors(parts, spec.shared, strategy(name, {}), base, {}, clips=clips, noised=rule))


@pytest.mark.parametrize("name", ["median", "fednova", "fedbuff", "fedexp"])
def test_strategies_that_see_more_than_a_sum_are_refused(name: str) -> None:
    with pytest.raises(ConfigInvalid, match=rf"aggregation\.strategy is '{name}', .* one sum of bounded updates"):
        check_combination(run(aggregation={"strategy": name}), BIAS)


@pytest.mark.parametrize("name", ["fedavg", "fedavgm", "fedadam", "fedyogi", "fedadagrad"])
def test_strategies_that_step_by_one_sum_are_taken(name: str) -> None:
    assert misfits(run(aggregation={"strategy": name, "norm_factor": 0}), BIAS) == []


@pytest.mark.parametrize(
    ("field", "privacy", "aggregation"),
    [
        ("aggregation.norm_factor", {}, {"norm_factor": 30}),
        ("privacy.delta", {"delta": 0.25}, {}),
        ("privacy.quantile_noise", {"quantile": 0.5, "quantile_noise": 0.5}, {}),
        ("privacy.target_epsilon", {"target_epsilon": 0.5}, {}),
    ],
)
def test_what_does_not_go_with_noise_is_refused_by_field(
    field: str, privacy: dict[str, Any], aggregation: dict[str, Any]
) -> None:
    with pytest.raises(ConfigInvalid) as caught:
        check_combination(run(aggregation=aggregation, **privacy), BIAS)
    assert [name for name, _ in caught.value.fields] == [field]


@pytest.mark.parametrize(
    ("text", "privacy"),
    [
        ("delta needs mechanism", {"mechanism": None, "noise_multiplier": None}),
        ('mechanism = "central" needs clip_norm', {"clip_norm": None}),
        ('mechanism = "central" needs delta', {"delta": None}),
        ("needs noise_multiplier or target_epsilon", {"noise_multiplier": None}),
        ("quantile_rate needs quantile", {"quantile_rate": 0.1}),
        ("'central'", {"mechanism": "laplace"}),
    ],
)
def test_settings_that_make_no_mechanism_are_refused(text: str, privacy: dict[str, Any]) -> None:
    with pytest.raises(ConfigInvalid, match=text):
        run(**privacy)
