"""Updates: top-k over the whole update, and error feedback that loses nothing."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays as any_array

from fedpeft.adapters import payload
from fedpeft.adapters.spec import TensorSpec
from fedpeft.adapters.updates import PreparedUpdate, prepare, top_k
from fedpeft.config import CodecConfig
from fedpeft.errors import StateInvalid, TrainingFailed

SPECS = (TensorSpec("a", (40, 5)), TensorSpec("b", (30,)), TensorSpec("c", ()))
TOTAL = 231

LOSSY = [
    CodecConfig(up="sparse", density=0.1),
    CodecConfig(up="sparse", density=0.3, values="float16"),
    CodecConfig(up="sparse", density=0.01, values="bfloat16"),
    CodecConfig(up="float16"),
    CodecConfig(up="bfloat16"),
]

Arrays = dict[str, np.ndarray]


def change(seed: int) -> Arrays:
    rng = np.random.default_rng(seed)
    return {s.name: np.asarray(rng.standard_normal(s.shape) * 1e-3, np.float32) for s in SPECS}


def decoded(update: PreparedUpdate) -> Arrays:
    payload.check_payload(update.manifest, memoryview(update.payload))
    return payload.decode(update.manifest, memoryview(update.payload))


def sum_of(parts: list[Arrays]) -> Arrays:
    return {s.name: np.sum([p[s.name].astype(np.float64) for p in parts if s.name in p], axis=0) for s in SPECS}


@pytest.mark.parametrize("codec", LOSSY, ids=lambda c: f"{c.encoding}-{c.density}")
def test_what_was_sent_and_what_is_left_are_all_there_was(codec: CodecConfig) -> None:
    deltas, sent, residual = [change(i) for i in range(20)], [], None
    for number, delta in enumerate(deltas):
        update = prepare(delta, residual, SPECS, codec)
        counted = number % 5 != 3  # every fifth update is late
        if counted:
            sent.append(decoded(update))
        residual = update.residual_if_counted if counted else update.residual_if_not
    total, accounted = sum_of(deltas), sum_of([*sent, residual])
    for name, values in total.items():
        np.testing.assert_allclose(accounted[name], values, rtol=1e-6, atol=1e-8)
    assert any(np.any(a) for a in residual.values())


def test_dense_float32_is_exact() -> None:
    update = prepare(change(1), None, SPECS, CodecConfig())
    for name, values in change(1).items():
        np.testing.assert_array_equal(decoded(update)[name], values)
        np.testing.assert_array_equal(update.residual_if_not[name], values)
    assert update.residual_if_counted == {}


def test_a_late_update_goes_up_with_the_next() -> None:
    first = prepare(change(1), None, SPECS, CodecConfig())
    second = prepare(change(2), first.residual_if_not, SPECS, CodecConfig())
    for name, values in decoded(second).items():
        np.testing.assert_array_equal(values, change(1)[name] + change(2)[name])


@pytest.mark.parametrize("up", ["float32", "sparse"])
def test_without_error_feedback_nothing_is_left(up: str) -> None:
    codec = CodecConfig(up=up, error_feedback=False)
    update = prepare(change(1), change(2), SPECS, codec)
    assert update.residual_if_counted == update.residual_if_not == {}
    assert update.payload == prepare(change(1), None, SPECS, CodecConfig(up=up)).payload


def test_tensors_of_other_rounds_keep_their_residual() -> None:
    old = change(3)
    update = prepare(change(1), old, SPECS[:1], CodecConfig())
    assert [e.name for e in update.manifest.entries] == ["a"]
    assert set(update.residual_if_counted) == {"b", "c"}
    assert set(update.residual_if_not) == {"a", "b", "c"}
    for name in ("b", "c"):
        np.testing.assert_array_equal(update.residual_if_counted[name], old[name])


def test_inputs_are_left_alone() -> None:
    delta, residual = change(1), change(2)
    prepare(delta, residual, SPECS, LOSSY[1])
    for name in delta:
        np.testing.assert_array_equal(delta[name], change(1)[name])
        np.testing.assert_array_equal(residual[name], change(2)[name])


@pytest.mark.parametrize("density", [0.001, 0.1, 0.5, 1.0])
def test_density_counts_over_the_whole_update(density: float) -> None:
    delta = change(1)
    delta["a"] *= 100  # so all that is kept comes from here while there is enough
    kept = decoded(prepare(delta, None, SPECS, CodecConfig(up="sparse", density=density)))
    assert sum(int(np.count_nonzero(a)) for a in kept.values()) == max(1, round(density * TOTAL))
    if density < 0.5:
        assert not kept["b"].any() and not kept["c"].any()


small = any_array(np.float32, 12, elements=st.sampled_from([0, -0.0, 1, -1, 2, -2, 1e-40, 3e38]).map(np.float32))


@given(a=small, b=small, k=st.integers(1, 30))
def test_top_k_keeps_the_first_of_equals(a: np.ndarray, b: np.ndarray, k: int) -> None:
    specs = (TensorSpec("a", (3, 4)), TensorSpec("b", (12,)))
    chosen = top_k({"a": a.reshape(3, 4), "b": b}, specs, k)
    whole = np.concatenate([a, b])
    first = np.argsort(-np.abs(whole), kind="stable")[:k]
    expected = np.zeros(24, np.float32)
    expected[first] = whole[first]
    np.testing.assert_array_equal(np.concatenate([chosen["a"].reshape(-1), chosen["b"]]), expected)


def test_top_k_of_many() -> None:
    x = np.random.default_rng(0).standard_normal(3_000_000).astype(np.float32)
    chosen = top_k({"a": x}, [TensorSpec("a", x.shape)], 12_345)["a"]
    threshold = np.partition(np.abs(x), -12_345)[-12_345]
    np.testing.assert_array_equal(chosen, np.where(np.abs(x) >= threshold, x, 0))
    assert np.count_nonzero(chosen) == 12_345


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("feedback", [True, False])
def test_a_change_that_is_not_finite(bad: float, feedback: bool) -> None:
    delta = change(1)
    delta["b"][7] = bad
    with pytest.raises(TrainingFailed, match="change of tensor b is not finite"):
        prepare(delta, None, SPECS, CodecConfig(error_feedback=feedback))


def test_a_sum_that_overflows() -> None:
    huge = {s.name: np.full(s.shape, 3e38, np.float32) for s in SPECS}
    with pytest.raises(TrainingFailed, match="tensor a is not finite"):
        prepare(huge, huge, SPECS, CodecConfig())


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(TrainingFailed, match=r"left \(5, 40\) for tensor a, not \(40, 5\)"):
        prepare({**change(1), "a": change(1)["a"].T}, None, SPECS, CodecConfig())
    with pytest.raises(TrainingFailed, match="nothing for tensor c"):
        prepare({"a": change(1)["a"], "b": change(1)["b"]}, None, SPECS, CodecConfig())
    with pytest.raises(StateInvalid, match="residual of tensor b has shape"):
        prepare(change(1), {"b": np.zeros(3, np.float32)}, SPECS, CodecConfig())


def test_what_float16_cannot_hold_goes_up_later() -> None:
    spec = TensorSpec("a", (1,))
    first = prepare({"a": np.array([100_000], np.float32)}, None, [spec], CodecConfig(up="float16"))
    assert first.residual_if_counted["a"].tolist() == [100_000 - 65_504]
