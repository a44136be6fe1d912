"""Strategies against the formulas of their papers, written out once more."""

from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pydantic import ValidationError

from fedpeft.aggregation import Doubles, Strategy, UpdateFacts, strategies, strategy
from fedpeft.errors import ConfigInvalid

NAMES = ["fedadagrad", "fedadam", "fedavg", "fedavgm", "fedyogi"]
doubles = arrays(np.float64, 5, elements=st.floats(-1e6, 1e6))


def run(rule: Strategy, x: Doubles, deltas: Iterable[Doubles]) -> tuple[Doubles, dict[str, Doubles]]:
    state = {slot: rule.initial(slot, x.size) for slot in rule.slots}
    for delta in deltas:
        x, state = rule.step(x, delta, state)
    return x, state


def test_the_registry_has_the_five() -> None:
    assert set(NAMES) <= set(strategies.names())


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_examples(name: str) -> None:
    assert strategy(name, {}).weigh(UpdateFacts(17, 3.0, 0.9)) == 17.0


@pytest.mark.parametrize("name", NAMES)
@given(x=doubles, delta=doubles)
def test_arguments_are_left_alone_and_blocks_do_not_matter(name: str, x: Doubles, delta: Doubles) -> None:
    rule = strategy(name, {})
    state = {slot: rule.initial(slot, x.size) for slot in rule.slots}
    copies = x.copy(), delta.copy(), {slot: kept.copy() for slot, kept in state.items()}
    whole, after = rule.step(x, delta, state)
    assert sorted(after) == sorted(rule.slots)
    np.testing.assert_array_equal(x, copies[0])
    np.testing.assert_array_equal(delta, copies[1])
    for slot, kept in state.items():
        np.testing.assert_array_equal(kept, copies[2][slot])
    pieces = [
        rule.step(x[i : i + 2], delta[i : i + 2], {s: k if k.size == 1 else k[i : i + 2] for s, k in state.items()})[0]
        for i in (0, 2, 4)
    ]
    np.testing.assert_array_equal(np.concatenate(pieces), whole)


@given(x=doubles, delta=doubles)
def test_fedavg(x: Doubles, delta: Doubles) -> None:
    np.testing.assert_array_equal(run(strategy("fedavg", {}), x, [delta])[0], x + delta)
    half = strategy("fedavg", {"server_learning_rate": 0.5})
    np.testing.assert_array_equal(run(half, x, [delta])[0], x + 0.5 * delta)


def test_fedavgm_steps_tend_to_delta_over_one_minus_momentum() -> None:
    rule, delta = strategy("fedavgm", {"momentum": 0.9, "server_learning_rate": 0.5}), np.array([1.0, -2.0])
    x, state = run(rule, np.zeros(2), [delta] * 400)
    after, _ = rule.step(x, delta, state)
    np.testing.assert_allclose(after - x, 0.5 * delta / (1 - 0.9), rtol=1e-12)


@given(x=doubles, delta=doubles)
def test_fedavgm_without_momentum_is_fedavg(x: Doubles, delta: Doubles) -> None:
    rule = strategy("fedavgm", {"momentum": 0.0})
    np.testing.assert_array_equal(run(rule, x, [delta, delta])[0], x + delta + delta)


@given(x=doubles, delta=doubles)
def test_first_step_of_fedadam(x: Doubles, delta: Doubles) -> None:
    """m = 0, v = tau^2: x + eta (1 - b1) D / (sqrt(b2 tau^2 + (1 - b2) D^2) + tau)."""
    eta, b1, b2, tau = 0.1, 0.9, 0.99, 1e-3
    rule = strategy("fedadam", {"server_learning_rate": eta})
    expected = x + eta * (1 - b1) * delta / (np.sqrt(b2 * tau**2 + (1 - b2) * delta**2) + tau)
    np.testing.assert_allclose(run(rule, x, [delta])[0], expected, rtol=1e-12, atol=1e-15)


@given(x=doubles, delta=doubles)
def test_first_step_of_fedyogi(x: Doubles, delta: Doubles) -> None:
    eta, b1, b2, tau = 0.1, 0.9, 0.99, 1e-3
    rule = strategy("fedyogi", {"server_learning_rate": eta})
    v = tau**2 - (1 - b2) * delta**2 * np.sign(tau**2 - delta**2)
    expected = x + eta * (1 - b1) * delta / (np.sqrt(v) + tau)
    np.testing.assert_allclose(run(rule, x, [delta])[0], expected, rtol=1e-12, atol=1e-15)


@given(x=doubles, delta=doubles)
def test_two_steps_of_fedadagrad(x: Doubles, delta: Doubles) -> None:
    eta, tau = 0.1, 1e-3
    rule = strategy("fedadagrad", {"server_learning_rate": eta})
    first = x + eta * delta / (np.sqrt(tau**2 + delta**2) + tau)
    expected = first + eta * delta / (np.sqrt(tau**2 + 2 * delta**2) + tau)
    np.testing.assert_allclose(run(rule, x, [delta, delta])[0], expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", ["fedadam", "fedyogi", "fedadagrad"])
def test_v_starts_at_tau_squared_and_m_at_zero(name: str) -> None:
    rule = strategy(name, {"tau": 0.05})
    assert rule.initial("v", 3).tolist() == [0.05**2] * 3
    assert rule.initial("m", 3).tolist() == [0.0] * 3


def test_v_of_yogi_stays_positive() -> None:
    rule = strategy("fedyogi", {})
    deltas = np.random.default_rng(0).standard_normal((500, 5)) * np.logspace(-8, 3, 5)
    x, state = run(rule, np.zeros(5), deltas)
    assert (state["v"] >= 0).all() and np.isfinite(x).all()


def test_bias_correction_is_adams_own() -> None:
    """Three steps of Adam (1412.6980, algorithm 1), with -D as the gradient."""
    eta, b1, b2, tau = 0.1, 0.9, 0.99, 1e-3
    deltas = np.random.default_rng(1).standard_normal((3, 4))
    x, m, v = np.ones(4), np.zeros(4), np.zeros(4)
    for t, delta in enumerate(deltas, 1):
        m, v = b1 * m + (1 - b1) * delta, b2 * v + (1 - b2) * delta**2
        x = x + eta * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + tau)
    rule = strategy("fedadam", {"server_learning_rate": eta, "bias_correction": True})
    after, state = run(rule, np.ones(4), deltas)
    np.testing.assert_allclose(after, x, rtol=1e-13)
    assert state["steps"].tolist() == [3.0]


def test_options_are_checked() -> None:
    with pytest.raises(ConfigInvalid, match=r"no aggregation strategy 'fedsgd'; there are: .*fedavg"):
        strategy("fedsgd", {})
    for options in ({"momentum": 1.0}, {"momentum": -0.1}, {"beta1": 0.9}, {"server_learning_rate": 0}):
        with pytest.raises(ValidationError):
            strategy("fedavgm", options)
    for options in ({"tau": 0}, {"beta2": 1}, {"server_learning_rate": float("nan")}):
        with pytest.raises(ValidationError):
            strategy("fedadam", options)
