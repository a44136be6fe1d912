"""The fold: a plain reference, the same bits whatever the order, the blocks and the threads, and flat memory."""

import hashlib
import mmap
import tracemalloc
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.adapters import payload
from fedpeft.adapters.spec import TensorSpec
from fedpeft.aggregation import BlockStrategy, Doubles, Options, Strategy, UpdateFacts, strategy
from fedpeft.codecs import BLOCK_ELEMENTS
from fedpeft.errors import Internal
from fedpeft.rounds.folding import contributions
from fedpeft.rounds.folding.contributions import Contribution, Overflow
from fedpeft.rounds.folding.fold import Folded, fold, fold_sums, fold_tensors, weigh

SPECS = (TensorSpec("a", (7, 3)), TensorSpec("b", ()), TensorSpec("c", (50,)))
NAMES = ["fedadagrad", "fedadam", "fedavg", "fedavgm", "fedyogi"]
ENCODINGS = ["float32", "float16", "bfloat16", "sparse+float32", "sparse+float16", "sparse+bfloat16"]

Arrays = dict[str, np.ndarray]


def arrays(seed: int, specs: Sequence[TensorSpec] = SPECS) -> Arrays:
    rng = np.random.default_rng(seed)
    return {s.name: np.asarray(rng.standard_normal(s.shape), np.float32) for s in specs}


def contribution(client: str, examples: int, tensors: Arrays, encoding: str = "float32") -> Contribution:
    specs = [TensorSpec(name, values.shape) for name, values in tensors.items()]
    manifest, data = payload.encode(tensors, specs, encoding)
    return Contribution(client, UpdateFacts(examples), manifest, memoryview(data))


def cohort(n: int, encoding: str = "float32", specs: Sequence[TensorSpec] = SPECS) -> list[Contribution]:
    return [contribution(f"client-{i:02}", 10 + 7 * i, arrays(i, specs), encoding) for i in range(n)]


def bits(folded: Folded) -> dict[str, bytes]:
    out = {name: values.tobytes() for name, values in folded.adapter.items()}
    return out | {f"{s}/{n}": kept.tobytes() for s, slot in folded.state.items() for n, kept in slot.items()}


def reference(
    contributions: Sequence[Contribution], rule: Strategy, base: Arrays, state: Mapping[str, Mapping[str, Doubles]]
) -> Arrays:
    """The same arithmetic, a whole tensor at a time."""
    ordered = sorted(contributions, key=lambda c: c.client)
    decoded = [payload.decode(c.manifest, c.payload) for c in ordered]
    out = {}
    for name, x in base.items():
        total = np.zeros(x.size)
        for one, tensors in zip(ordered, decoded, strict=True):
            total = total + tensors[name].reshape(-1).astype(np.float64) * rule.weigh(one.facts)
        delta = total / sum(rule.weigh(c.facts) for c in ordered)
        old = {s: state[s][name] if s in state else rule.initial(s, x.size) for s in rule.slots}
        stepped, _ = rule.step(x.reshape(-1).astype(np.float64), delta, old)
        out[name] = stepped.astype(np.float32).reshape(x.shape)
    return out


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("name", NAMES)
def test_equals_the_reference_bit_for_bit_over_rounds(name: str, encoding: str) -> None:
    rule, base, state = strategy(name, {}), arrays(99), {}
    for number in range(3):
        sent = cohort(2 + number, encoding)
        folded = fold(sent, SPECS, rule, base, state)
        expected = reference(sent, rule, base, state)
        assert {n: a.tobytes() for n, a in folded.adapter.items()} == {n: a.tobytes() for n, a in expected.items()}
        base, state = folded.adapter, folded.state
    assert all(a.dtype == np.float32 and a.shape == s.shape for a, s in zip(base.values(), SPECS, strict=True))


def test_fedavg_is_numpys_weighted_average() -> None:
    sent, base = cohort(8), arrays(99)
    folded = fold(sent, SPECS, strategy("fedavg", {}), base, {})
    for spec in SPECS:
        mean = np.average([arrays(i)[spec.name] for i in range(8)], axis=0, weights=[c.facts.examples for c in sent])
        np.testing.assert_allclose(folded.adapter[spec.name], base[spec.name] + mean, rtol=1e-6, atol=1e-6)
    assert folded.weights == {f"client-{i:02}": 10.0 + 7 * i for i in range(8)}


@pytest.mark.parametrize("encoding", ENCODINGS)
@given(data=st.data(), block=st.integers(1, 80))
def test_order_and_blocks_do_not_matter(encoding: str, data: st.DataObject, block: int) -> None:
    sent, base, rule = cohort(5, encoding), arrays(99), strategy("fedadam", {})
    shuffled = data.draw(st.permutations(sent))
    expected = bits(fold(sent, SPECS, rule, base, {}))
    got: dict[str, bytes] = {}
    for folded in fold_tensors(shuffled, SPECS, rule, base, {}, block=block):
        got[folded.spec.name] = folded.values.tobytes()
        got |= {f"{slot}/{folded.spec.name}": kept.tobytes() for slot, kept in folded.state.items()}
    assert got == expected


def test_threads_do_not_matter() -> None:
    specs = tuple(TensorSpec(f"t{i}", (BLOCK_ELEMENTS + 11 * i,)) for i in range(6))
    sent, base, rule = cohort(4, "bfloat16", specs), arrays(99, specs), strategy("fedyogi", {})
    expected = bits(fold(sent, specs, rule, base, {}))
    with ThreadPoolExecutor(4) as pool:
        folds = pool.map(lambda spec: bits(fold(sent, [spec], rule, base, {})), specs)
        assert {key: value for one in folds for key, value in one.items()} == expected


def test_one_client_gets_its_own_weights() -> None:
    base = arrays(1)
    delta = {name: values * np.float32(2.0**-6) for name, values in arrays(2).items()}
    folded = fold([contribution("only", 3, delta)], SPECS, strategy("fedavg", {}), base, {})
    for name, values in folded.adapter.items():
        np.testing.assert_array_equal(values, base[name] + delta[name])


@given(examples=st.lists(st.integers(1, 10**9 // 4), min_size=1, max_size=6))
def test_equal_updates_give_that_update(examples: list[int]) -> None:
    sent = [contribution(f"c{i}", n, arrays(2)) for i, n in enumerate(examples)]
    folded = fold(sent, SPECS, strategy("fedavg", {}), {n: np.zeros_like(a) for n, a in arrays(2).items()}, {})
    for name, values in folded.adapter.items():
        np.testing.assert_allclose(values, arrays(2)[name], rtol=1e-7)


def test_clients_of_different_encodings_fold_together() -> None:
    mixed = [contribution(f"c{i}", 5, arrays(i), encoding) for i, encoding in enumerate(ENCODINGS)]
    folded = fold(mixed, SPECS, strategy("fedavg", {}), arrays(99), {})
    expected = reference(mixed, strategy("fedavg", {}), arrays(99), {})
    assert all(folded.adapter[n].tobytes() == expected[n].tobytes() for n in expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_that_was_not_sent_stays_with_its_state(name: str) -> None:
    rule, options = strategy(name, {}), {"bias_correction": True}
    if name == "fedadam":
        rule = strategy(name, options)
    first = fold(cohort(2), SPECS, rule, arrays(99), {})
    half = [contribution(f"c{i}", 4, {"a": arrays(i)["a"], "c": arrays(i)["c"]}) for i in range(2)]
    second = fold(half, SPECS, rule, first.adapter, first.state)
    assert second.adapter["b"].tobytes() == first.adapter["b"].tobytes()
    for slot in rule.slots:
        assert second.state[slot]["b"].tobytes() == first.state[slot]["b"].tobytes()
        assert second.state[slot]["a"].tobytes() != first.state[slot]["a"].tobytes()


def test_what_was_never_sent_has_the_initial_state() -> None:
    rule = strategy("fedadam", {})
    folded = fold([contribution("c", 1, {"a": arrays(0)["a"]})], SPECS, rule, arrays(99), {})
    assert folded.state["v"]["c"].tolist() == [1e-6] * 50
    assert folded.state["steps"]["c"].tolist() == [0.0]
    assert folded.state["steps"]["a"].tolist() == [1.0]


def test_a_value_beyond_float32_is_refused_and_names_the_client_with_the_largest_part() -> None:
    most = np.float32(np.finfo(np.float32).max)
    spec = TensorSpec("a", (3,))
    base = {"a": np.array([0, most, -most], np.float32)}
    small, large = np.array([most, 1, 1], np.float32), np.array([0, most, 0], np.float32)
    cohort = [contribution("b", 1, {"a": small}), contribution("c", 10**9, {"a": large})]
    for block in (1, 2, 1024):
        with pytest.raises(Overflow, match="tensor a would leave the range of float32") as caught:
            list(fold_tensors(cohort, [spec], strategy("fedavg", {}), base, {}, block))
        assert caught.value.client == "c"
    clipped = list(fold_tensors(cohort, [spec], strategy("fedavg", {}), base, {}, clips=True))
    assert clipped[0].values.tolist()[1:] == base["a"].tolist()[1:]


def test_a_sum_beyond_its_range_names_the_largest_part_where_sums_have_their_weights_already() -> None:
    spec = TensorSpec("a", (3,))
    edge = contribution("edge", 40_000, {"a": np.array([1e6, 0, 0], np.float32)}, "sum128")
    single = contribution("single", 1, {"a": np.array([np.nextafter(np.float32(2**33), np.float32(0)), 0, 0])})
    for cohort in ([edge, single], [single, edge]):
        with pytest.raises(Overflow, match="tensor a would leave the range of exact sums") as caught:
            list(fold_sums(cohort, [spec], strategy("fedavg", {})))
        assert caught.value.client == "single"


LORA = (TensorSpec("x.lora_A.weight", (2, 5)), TensorSpec("x.lora_B.weight", (4, 2)), TensorSpec("head.weight", (3, 4)))


@pytest.mark.parametrize("name", ["median", "lora_fair", "flexlora", "fednova"])
def test_a_strategy_that_sees_more_than_the_mean_gives_the_same_bits_in_any_order_and_block(name: str) -> None:
    rule, base = strategy(name, {}), arrays(99, LORA)
    sent = cohort(4, specs=LORA)
    expected = bits(fold(sent, LORA, rule, base, {}))
    for block in (1, 3, 1000):
        folded = {each.spec.name: each.values for each in fold_tensors(sent[::-1], LORA, rule, base, {}, block)}
        assert bits(Folded(folded, {}, {})) == expected


def test_the_median_of_a_cohort() -> None:
    sent = cohort(5)
    folded = fold(sent, SPECS, strategy("median", {}), arrays(99), {})
    changes = [payload.decode(each.manifest, each.payload) for each in sent]
    for name, x in arrays(99).items():
        wanted = x + np.median(np.stack([change[name] for change in changes]).astype(np.float64), axis=0)
        np.testing.assert_array_equal(folded.adapter[name], wanted.astype(np.float32))


def test_lora_fair_corrects_b_and_leaves_the_other_tensors_to_the_mean() -> None:
    sent, base = cohort(3, specs=LORA), arrays(99, LORA)
    fair, average = (fold(sent, LORA, strategy(name, {}), base, {}).adapter for name in ("lora_fair", "fedavg"))
    same = {name: np.allclose(fair[name], average[name], rtol=1e-6) for name in fair}
    assert same == {"x.lora_A.weight": True, "x.lora_B.weight": False, "head.weight": True}


def test_a_block_of_all_clients_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedpeft.rounds.folding import updates as module

    monkeypatch.setattr(module, "SIDE_BY_SIDE_BYTES", 8 * 5 * 2)
    sizes = set()

    class Sized(BlockStrategy):
        def reduce(self, block: Doubles, weights: Doubles) -> Doubles:
            sizes.add(block.shape)
            return block[0]

        def step(self, x: Doubles, delta: Doubles, state: Mapping[str, Doubles]) -> tuple[Doubles, dict[str, Doubles]]:
            return x + delta, {}

    fold(cohort(5), SPECS, Sized(Options()), arrays(99), {})
    assert sizes == {(5, 2), (5, 1)}


class Broken(Strategy):
    def weigh(self, facts: UpdateFacts) -> float:
        return {1: 0.0, 2: float("inf")}.get(facts.examples, 1.0)

    def step(self, x: Doubles, delta: Doubles, state: Mapping[str, Doubles]) -> tuple[Doubles, dict[str, Doubles]]:
        return x * np.nan, {}


def test_more_updates_than_a_sum_is_exact_for_are_not_added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contributions, "MOST_ADDED", 3)
    rule, base = strategy("fedavg", {}), arrays(0)
    assert len(list(fold_tensors(cohort(3), SPECS, rule, base, {}, exact=True))) == len(SPECS)
    for exact in (
        lambda: list(fold_sums(cohort(4), SPECS, rule)),
        lambda: list(fold_tensors(cohort(4), SPECS, rule, base, {}, exact=True)),
    ):
        with pytest.raises(Internal, match="4 updates; an exact sum is of 3 at most"):
            exact()


def test_faults_of_a_cohort() -> None:
    good, average, broken = cohort(2), strategy("fedavg", {}), Broken(Options())
    with pytest.raises(Internal, match="0 updates of 0 clients"):
        fold([], SPECS, average, arrays(99), {})
    with pytest.raises(Internal, match="3 updates of 2 clients"):
        fold([*good, good[0]], SPECS, average, arrays(99), {})
    with pytest.raises(Internal, match="client z has other tensors"):
        fold([*good, contribution("z", 1, {"a": arrays(0)["a"]})], SPECS, average, arrays(99), {})
    for examples in (1, 2):
        with pytest.raises(Internal, match="client c weighs"):
            weigh([contribution("c", examples, arrays(0))], broken)
    with pytest.raises(Internal, match="tensor a not finite"):
        fold(good, SPECS, broken, arrays(99), {})


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_squared_norm(encoding: str) -> None:
    specs = [TensorSpec("a", (3, BLOCK_ELEMENTS)), TensorSpec("b", (5,))]
    one = cohort(1, encoding, specs)[0]
    decoded = payload.decode(one.manifest, one.payload)
    expected = sum(float((a.astype(np.float64) ** 2).sum()) for a in decoded.values())
    assert payload.squared_norm(one.manifest, one.payload) == pytest.approx(expected, rel=1e-12)


def test_memory_does_not_grow_with_clients(tmp_path: Path) -> None:
    """Beyond the result, what is held is some blocks, for 4 clients or 64; mapped pages are given back."""
    specs = [TensorSpec(f"t{i}", (4 * BLOCK_ELEMENTS,)) for i in range(2)]
    base, rule = arrays(99, specs), strategy("fedavg", {})
    manifest, data = payload.encode(arrays(1, specs), specs, "sparse+float16")
    path = tmp_path / "payload"
    path.write_bytes(data)
    peaks, released = [], []
    for n in (4, 64):
        with path.open("rb") as file:
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

        def give_back(mapping: mmap.mmap = mapping) -> None:
            mapping.madvise(mmap.MADV_DONTNEED)
            released.append(mapping)

        sent = [Contribution(f"c{i:02}", UpdateFacts(1), manifest, memoryview(mapping), give_back) for i in range(n)]
        tracemalloc.start()
        try:
            digest = hashlib.sha256()
            for folded in fold_tensors(sent, specs, rule, base, {}):
                digest.update(folded.values)
                del folded
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert peaks[1] < peaks[0] + 60 * 8192
    assert peaks[1] < specs[0].size * 4 + 8 * BLOCK_ELEMENTS * 8
    assert released
