"""FedExP: the step of equal and of orthogonal changes, and of any others as NumPy has it for a whole round at once."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.adapters import payload
from fedpeft.adapters.sections import with_sections
from fedpeft.adapters.spec import AdapterSpec, Section, TensorRole, TensorSpec
from fedpeft.aggregation import Cohort, Strategy, UpdateFacts, strategy
from fedpeft.aggregation.fedexp import FedExp, FedExpOptions
from fedpeft.codecs import BLOCK_ELEMENTS
from fedpeft.config import parse_config
from fedpeft.errors import ConfigInvalid
from fedpeft.rounds.combinations import check_combination
from fedpeft.rounds.folding.contributions import Contribution
from fedpeft.rounds.folding.fold import fold, fold_tensors

SPECS = (TensorSpec("a", (2, 3)), TensorSpec("b", (2,)))
RULE = strategy("fedexp", {"epsilon": 1e-12, "largest_step": 100.0})

Arrays = dict[str, np.ndarray]


def sent(changes: Sequence[np.ndarray], examples: Sequence[int], encoding: str = "float32") -> list[Contribution]:
    """Returns updates of all eight values, in one vector."""
    found = []
    for place, (change, n) in enumerate(zip(changes, examples, strict=True)):
        tensors = {"a": change[:6].reshape(2, 3).astype(np.float32), "b": change[6:].astype(np.float32)}
        manifest, data = payload.encode(tensors, SPECS, encoding)
        found.append(Contribution(f"c{place}", UpdateFacts(n), manifest, memoryview(data)))
    return found


def stepped(updates: list[Contribution], options: dict[str, object] | None = None) -> np.ndarray:
    """Returns the step from zero, in one vector."""
    rule = RULE if options is None else strategy("fedexp", options)
    base = {spec.name: np.zeros(spec.shape, np.float32) for spec in SPECS}
    found = fold(updates, SPECS, rule, base, {}).adapter
    return np.concatenate([found["a"].ravel(), found["b"]]).astype(np.float64)


def test_equal_changes_are_fedavg_to_the_bit() -> None:
    updates = sent([np.arange(8.0)] * 5, [1, 2, 3, 4, 5])
    base = {spec.name: np.ones(spec.shape, np.float32) for spec in SPECS}
    plain, found = (fold(updates, SPECS, rule, base, {}).adapter for rule in (strategy("fedavg", {}), RULE))
    assert all(plain[name].tobytes() == found[name].tobytes() for name in plain)


@pytest.mark.parametrize("n", [2, 3, 8])
def test_orthonormal_changes_are_stepped_by_half_their_number(n: int) -> None:
    """They are spread over both tensors, so neither alone would give it."""
    basis, _ = np.linalg.qr(np.random.default_rng(n).standard_normal((8, 8)))
    found = stepped(sent(basis[:n], [7] * n))
    np.testing.assert_allclose(found, n / 2 * basis[:n].mean(0), rtol=1e-5, atol=1e-7)


@given(
    seed=st.integers(0, 2**32 - 1),
    examples=st.lists(st.integers(1, 50), min_size=1, max_size=6),
    epsilon=st.floats(1e-6, 10.0),
    largest=st.floats(1.0, 4.0),
)
def test_any_round_as_numpy_has_it(seed: int, examples: list[int], epsilon: float, largest: float) -> None:
    changes = np.random.default_rng(seed).standard_normal((len(examples), 8)).astype(np.float32).astype(np.float64)
    p = np.array(examples) / sum(examples)
    mean = p @ changes
    eta = max(1.0, float(p @ np.square(changes).sum(1)) / (2 * (float(mean @ mean) + epsilon)))
    found = stepped(sent(changes, examples), {"epsilon": epsilon, "largest_step": largest})
    np.testing.assert_allclose(found, min(eta, largest) * mean, rtol=1e-5, atol=1e-6)


def test_a_round_of_zeros_stays_and_one_that_cancels_is_bounded() -> None:
    assert not stepped(sent([np.zeros(8)] * 2, [1, 1]), {}).any()
    one, other = np.ones(8), -np.ones(8)
    other[0] = -0.5
    np.testing.assert_allclose(stepped(sent([one, other], [1, 1]), {}), 10.0 * (one + other) / 2, rtol=1e-6)


class Measuring(FedExp):
    """Keeps the norms that it was told."""

    def of_round(self, cohort: Cohort) -> Strategy:
        self.norms = cohort.norms()
        return super().of_round(cohort)


@pytest.mark.parametrize("encoding", ["float32", "sparse+float16"])
def test_order_and_blocks_do_not_matter_to_the_last_bit_of_the_norms(encoding: str) -> None:
    specs = [TensorSpec("a", (30, 30)), TensorSpec("b", (77,))]
    base = {spec.name: np.zeros(spec.shape, np.float32) for spec in specs}
    updates = []
    for place in range(4):
        draw = np.random.default_rng(place)
        tensors = {spec.name: draw.standard_normal(spec.shape).astype(np.float32) for spec in specs}
        manifest, data = payload.encode(tensors, specs, encoding)
        updates.append(Contribution(f"c{place}", UpdateFacts(1 + place), manifest, memoryview(data)))
    found = set()
    for cohort, block in ((updates, BLOCK_ELEMENTS), (updates[::-1], 7), (updates[1:] + updates[:1], 64)):
        rule = Measuring(FedExpOptions())
        stepped = {each.spec.name: each.values.tobytes() for each in fold_tensors(cohort, specs, rule, base, {}, block)}
        found.add((rule.norms, *stepped.values()))
    assert len(found) == 1


def test_tensors_of_other_sections_and_idle_ones_do_not_count() -> None:
    idle = TensorSpec("idle", (2,), (TensorRole.FROZEN,))
    spec = with_sections(AdapterSpec.of("bias", [TensorSpec("a", (4,)), idle]), [Section("control", 4.0, "float32")])
    updates = []
    for place, change in enumerate(np.eye(4, dtype=np.float32)):
        tensors = {"a": change, "control/a": np.full(4, 100.0, np.float32)}
        manifest, data = payload.encode(tensors, spec.sent(1), "float32")
        updates.append(Contribution(f"c{place}", UpdateFacts(1), manifest, memoryview(data)))
    base = {t.name: np.ones(t.shape, np.float32) for t in spec.shared}
    found = fold(updates, spec.shared, strategy("fedexp", {"epsilon": 1e-12}), base, {}).adapter
    np.testing.assert_allclose(found["a"], 1 + 4 / 2 * np.full(4, 0.25), rtol=1e-6)
    assert found["idle"].tolist() == [1.0, 1.0] and found["control/a"].tolist() == [101.0] * 4


def test_memory_does_not_grow_with_clients() -> None:
    specs = [TensorSpec("t", (4 * BLOCK_ELEMENTS,))]
    base = {"t": np.zeros(specs[0].shape, np.float32)}
    manifest, data = payload.encode({"t": np.ones(specs[0].shape, np.float32)}, specs, "float16")
    peaks = []
    for n in (4, 64):
        updates = [Contribution(f"c{i:02}", UpdateFacts(1), manifest, memoryview(data)) for i in range(n)]
        tracemalloc.start()
        for folded in fold_tensors(updates, specs, RULE, base, {}):
            del folded
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 60 * 8192
    assert peaks[1] < specs[0].size * 4 + 8 * BLOCK_ELEMENTS * 8


def test_stale_updates_are_refused_when_a_run_is_created() -> None:
    bias = AdapterSpec.of("bias", [TensorSpec("head.weight", (2, 3))])
    said = {"model": {"name": "vit_tiny_patch16_224", "classes": ["a", "b"]}, "peft": {"method": "bias"}}
    run = {**said, "aggregation": {"strategy": "fedexp"}}
    check_combination(parse_config(run), bias)
    with pytest.raises(ConfigInvalid, match=r"rounds\.policy is 'buffered', .*; strategy 'fedexp' needs those of one"):
        check_combination(parse_config({**run, "rounds": {"policy": "buffered"}}), bias)
