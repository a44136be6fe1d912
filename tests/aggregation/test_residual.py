"""FedEx-LoRA and FLoRA: what clients hold after a round is the exact mean, while the residual has room for it."""

from __future__ import annotations

import numpy as np
import pytest

from fedpeft.adapters import payload
from fedpeft.adapters.spec import AdapterSpec, TensorRole, TensorSpec
from fedpeft.aggregation import GroupStrategy, UpdateFacts, strategy
from fedpeft.config import parse_config
from fedpeft.errors import ConfigInvalid
from fedpeft.rounds.combinations import check_combination
from fedpeft.rounds.folding.contributions import Contribution, Overflow
from fedpeft.rounds.folding.fold import Folded, fold, fold_tensors

from .lora_layers import INPUTS, OUTPUTS, RANK, SHARES

RUN = {"model": {"name": "vit_tiny_patch16_224", "classes": ["a", "b"]}}
MADE = (TensorRole.DERIVED,)


def specs(residual_rank: int) -> tuple[TensorSpec, ...]:
    return (
        TensorSpec("head.weight", (2, 3)),
        TensorSpec("x.lora_A.weight", (RANK, INPUTS)),
        TensorSpec("x.lora_B.weight", (OUTPUTS, RANK)),
        TensorSpec("x.residual.down", (residual_rank, INPUTS), MADE),
        TensorSpec("x.residual.up", (OUTPUTS, residual_rank), MADE),
    )


def version(residual_rank: int) -> dict[str, np.ndarray]:
    """Version 0, with a B that is not zero and a residual that is not either."""
    draw = np.random.default_rng(5)
    return {t.name: draw.standard_normal(t.shape).astype(np.float32) for t in specs(residual_rank)}


def cohort(number: int, residual_rank: int, scale: float = 1.0) -> list[Contribution]:
    sent, found = [t for t in specs(residual_rank) if t.roles != MADE], []
    for client, share in enumerate(SHARES):
        draw = np.random.default_rng([number, client])
        change = {t.name: scale * draw.standard_normal(t.shape).astype(np.float32) for t in sent}
        manifest, data = payload.encode(change, sent, "float32")
        found.append(Contribution(f"c{client}", UpdateFacts(int(10 * share)), manifest, memoryview(data)))
    return found


def held(tensors: dict[str, np.ndarray]) -> np.ndarray:
    """The matrix that a layer adds to W, without its scale, float64."""
    ends = ("lora_A.weight", "lora_B.weight", "residual.down", "residual.up")
    a, b, v, u = (tensors[f"x.{end}"].astype(float) for end in ends)
    return b @ a + u @ v


def mean(before: dict[str, np.ndarray], clients: list[Contribution]) -> np.ndarray:
    total = np.zeros((OUTPUTS, INPUTS))
    for share, each in zip(SHARES, clients, strict=True):
        change = payload.decode(each.manifest, each.payload)
        total += share * held({name: x.astype(float) + change.get(name, 0.0) for name, x in before.items()})
    return total


@pytest.mark.parametrize("name", ["fedex_lora", "flora"])
def test_every_round_is_the_exact_mean_where_the_residual_has_the_smaller_side(name: str) -> None:
    now = version(OUTPUTS)
    first = now
    for number in (1, 2, 3):
        clients = cohort(number, OUTPUTS)
        wanted = mean(now, clients)
        after = fold(clients, specs(OUTPUTS), strategy(name, {}), now, {}).adapter
        np.testing.assert_allclose(held(after), wanted, rtol=0, atol=2e-6 * np.abs(wanted).max())
        average = fold(clients, specs(OUTPUTS), strategy("fedavg", {}), now, {}).adapter
        assert np.abs(held(average) - wanted).max() > 0.1, "the mean of the factors is another one"
        np.testing.assert_array_equal(after["head.weight"], average["head.weight"])
        if name == "fedex_lora":
            assert np.array_equal(after["x.lora_A.weight"], average["x.lora_A.weight"])
            assert np.array_equal(after["x.lora_B.weight"], average["x.lora_B.weight"])
        else:
            assert all(np.array_equal(after[f"x.{n}.weight"], first[f"x.{n}.weight"]) for n in ("lora_A", "lora_B"))
        now = after


@pytest.mark.parametrize("name", ["fedex_lora", "flora"])
def test_a_residual_without_room_is_the_nearest_one(name: str) -> None:
    room, now = 4, version(4)
    clients = cohort(1, room)
    after = fold(clients, specs(room), strategy(name, {}), now, {}).adapter
    product = after["x.lora_B.weight"].astype(float) @ after["x.lora_A.weight"].astype(float)
    wanted = mean(now, clients)
    left_out = np.linalg.svd(wanted - product, compute_uv=False)[room:]
    assert ((wanted - held(after)) ** 2).sum() == pytest.approx((left_out**2).sum(), rel=1e-5)


@pytest.mark.parametrize("name", ["fedex_lora", "flora"])
def test_the_same_bits_in_any_order_and_block(name: str) -> None:
    clients, now, rule = cohort(1, 4), version(4), strategy(name, {})
    expected = fold(clients, specs(4), rule, now, {}).adapter
    for block in (1, 5, 1000):
        folded = {f.spec.name: f.values for f in fold_tensors(clients[::-1], specs(4), rule, now, {}, block)}
        assert Folded(folded, {}, {}).adapter.keys() == expected.keys()
        assert all(folded[name].tobytes() == expected[name].tobytes() for name in expected)


def test_a_residual_beyond_float32_names_the_largest_client() -> None:
    clients, now = cohort(1, 4), version(4)
    clients[1] = cohort(1, 4, scale=1e20)[1]
    with pytest.raises(Overflow, match=r"tensor x\.residual\.(up|down) would leave the range") as caught:
        fold(clients, specs(4), strategy("flora", {}), now, {})
    assert caught.value.client == "c1"


def test_a_residual_needs_its_method_and_the_method_its_strategy() -> None:
    with_residual = AdapterSpec.of("lora_residual", specs(4))
    plain = AdapterSpec.of("lora", specs(4)[:3])
    for name in ("fedex_lora", "flora"):
        run = parse_config({**RUN, "peft": {"method": "lora_residual"}, "aggregation": {"strategy": name}})
        check_combination(run, with_residual)
        with pytest.raises(ConfigInvalid, match="needs a residual that the server derives; method 'lora' has none"):
            check_combination(run, plain)
    other = parse_config({**RUN, "peft": {"method": "lora_residual"}})
    with pytest.raises(ConfigInvalid, match=r"'fedavg', which does not make .*; these do: fedex_lora, flora"):
        check_combination(other, with_residual)
    assert isinstance(strategy("flora", {}), GroupStrategy)
