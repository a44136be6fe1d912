"""Clients of unequal ranks: their products enter exactly, and only a strategy that takes them accepts their updates."""

from __future__ import annotations

import numpy as np
import pytest

from fedpeft.adapters import payload
from fedpeft.adapters.spec import AdapterSpec, TensorSpec
from fedpeft.aggregation import UpdateFacts, strategy
from fedpeft.aggregation.low_rank.ranks import cut, limited, of_rank, padded
from fedpeft.config import parse_config
from fedpeft.errors import ConfigInvalid, ManifestInvalid
from fedpeft.rounds.acceptance import check_tensors
from fedpeft.rounds.combinations import check_combination
from fedpeft.rounds.folding.contributions import Contribution
from fedpeft.rounds.folding.fold import fold

from .lora_layers import INPUTS, OUTPUTS, RANK, SHARES
from .test_residual import MADE, RUN, held, specs, version

RANKS = (1, RANK, 2)
Arrays = dict[str, np.ndarray]


def sent(rank: int | None) -> tuple[TensorSpec, ...]:
    return of_rank([t for t in specs(OUTPUTS) if t.roles != MADE], rank)


def factors(now: Arrays, client: int) -> Arrays:
    """The tensors of a client after training: what it got, cut to its rank, and a change."""
    draw, own = np.random.default_rng([9, client]), sent(RANKS[client])
    return {t.name: cut(now, [t])[t.name] + draw.standard_normal(t.shape).astype(np.float32) for t in own}


def cohort(now: Arrays) -> list[Contribution]:
    found = []
    for client, share in enumerate(SHARES):
        own, after = sent(RANKS[client]), factors(now, client)
        change = {name: values - cut(now, own)[name] for name, values in after.items()}
        manifest, data = payload.encode(change, own, "float32")
        found.append(Contribution(f"c{client}", UpdateFacts(int(10 * share)), manifest, memoryview(data)))
    return found


def wanted(now: Arrays) -> np.ndarray:
    """The mean of what clients hold, in plain NumPy, without a zero anywhere."""
    total = now["x.residual.up"].astype(float) @ now["x.residual.down"].astype(float)
    for client, share in enumerate(SHARES):
        own = factors(now, client)
        total += share * own["x.lora_B.weight"].astype(float) @ own["x.lora_A.weight"].astype(float)
    return total


@pytest.mark.parametrize("name", ["fedex_lora", "flora"])
def test_the_mean_is_exact_with_mixed_ranks(name: str) -> None:
    now = version(OUTPUTS)
    after = fold(cohort(now), specs(OUTPUTS), strategy(name, {}), now, {}).adapter
    np.testing.assert_allclose(held(after), wanted(now), rtol=0, atol=2e-6 * np.abs(wanted(now)).max())


def test_flexlora_is_the_nearest_of_the_runs_rank_with_mixed_ranks() -> None:
    now, plain = version(OUTPUTS), specs(OUTPUTS)[:3]
    now["x.residual.up"][:] = 0
    after = fold(cohort(now), plain, strategy("flexlora", {}), now, {}).adapter
    product = after["x.lora_B.weight"].astype(float) @ after["x.lora_A.weight"].astype(float)
    left_out = np.linalg.svd(wanted(now), compute_uv=False)[RANK:]
    assert ((wanted(now) - product) ** 2).sum() == pytest.approx((left_out**2).sum(), rel=1e-5)


def test_a_client_holds_zeros_beyond_its_rank() -> None:
    now = version(OUTPUTS)
    mine = limited(now, specs(OUTPUTS), 2)
    a, b = mine["x.lora_A.weight"], mine["x.lora_B.weight"]
    assert not a[2:].any() and not b[:, 2:].any()
    assert np.array_equal(b @ a, b[:, :2] @ a[:2]) and np.array_equal(a[:2], now["x.lora_A.weight"][:2])
    assert all(mine[name] is now[name] for name in ("head.weight", "x.residual.down", "x.residual.up"))
    assert limited(now, specs(OUTPUTS), None) == now == limited(now, specs(OUTPUTS), 99)
    own = cut(mine, sent(2))
    assert own["x.lora_A.weight"].shape == (2, INPUTS) and own["x.lora_B.weight"].shape == (OUTPUTS, 2)
    assert all(np.array_equal(padded(own, sent(None))[name], mine[name]) for name in mine)


def manifest(*shapes: tuple[int, ...]) -> payload.Manifest:
    names = ("head.weight", "x.lora_A.weight", "x.lora_B.weight")
    some = [TensorSpec(name, shape) for name, shape in zip(names, shapes, strict=True)]
    return payload.encode({t.name: np.ones(t.shape, np.float32) for t in some}, some, "float32")[0]


@pytest.mark.parametrize(("name", "method"), [("flora", "lora_residual"), ("flexlora", "lora")])
def test_an_update_has_one_rank_up_to_the_runs(name: str, method: str) -> None:
    run = parse_config({**RUN, "peft": {"method": method}, "aggregation": {"strategy": name}})
    spec = AdapterSpec.of(method, specs(4))
    for rank in (1, 2, RANK):
        check_tensors(manifest((2, 3), (rank, INPUTS), (OUTPUTS, rank)), 1, run, spec)
    for a, b, said in (
        ((1, INPUTS), (OUTPUTS, 2), r"lora_B\.weight has shape \(7, 2\); the spec says \(7, 1\)"),
        ((RANK + 1, INPUTS), (OUTPUTS, RANK + 1), r"lora_A\.weight has shape \(4, 11\); the spec says \(3, 11\)"),
        ((2, INPUTS - 1), (OUTPUTS, 2), r"lora_A\.weight has shape \(2, 10\); the spec says \(2, 11\)"),
        ((2 * INPUTS,), (OUTPUTS, 2), r"lora_A\.weight has shape \(22,\); the spec says \(3, 11\)"),
    ):
        with pytest.raises(ManifestInvalid, match=said):
            check_tensors(manifest((2, 3), a, b), 1, run, spec)


def test_a_strategy_that_takes_means_of_factors_takes_one_rank() -> None:
    run = parse_config({**RUN, "peft": {"method": "lora"}, "simulation": {"ranks": [1, 3]}})
    spec = AdapterSpec.of("lora", specs(4)[:3])
    with pytest.raises(ManifestInvalid, match=r"has shape \(2, 11\); the spec says \(3, 11\)"):
        check_tensors(manifest((2, 3), (2, INPUTS), (OUTPUTS, 2)), 1, run, spec)
    said = r"simulation\.ranks are of clients .* does not take; these do: fedex_lora"
    with pytest.raises(ConfigInvalid, match=said):
        check_combination(run, spec)
