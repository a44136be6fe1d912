"""FlexLoRA: the nearest product of the rank to the mean of the clients' products."""

from __future__ import annotations

import numpy as np
import pytest

from fedpeft.adapters.spec import AdapterSpec, TensorSpec
from fedpeft.aggregation import GroupStrategy, strategy
from fedpeft.config import RunConfig, parse_config

from .lora_layers import OUTPUTS, RANK, Layer

PAIR = AdapterSpec.of("lora", [TensorSpec("b.lora_A.weight", (1, 2)), TensorSpec("b.lora_B.weight", (3, 1))])


def rule(balanced: bool = False) -> GroupStrategy:
    found = strategy("flexlora", {"balanced": balanced})
    assert isinstance(found, GroupStrategy)
    return found


def run(error_feedback: bool) -> RunConfig:
    model = {"name": "vit_tiny_patch16_224", "classes": ["a", "b"]}
    codec = {"error_feedback": error_feedback}
    return parse_config({"model": model, "peft": {"method": "lora"}, "codec": codec})


@pytest.mark.parametrize("balanced", [False, True])
def test_the_error_is_that_of_the_singular_values_left_out(balanced: bool) -> None:
    layer = Layer()
    a, b = layer.after(rule(balanced).reduce(layer.base, layer.read))
    s = np.linalg.svd(layer.wanted, compute_uv=False)
    assert len(s) == OUTPUTS and (np.abs(s[RANK:]) > 0.1).all(), "something must be left out"
    assert ((layer.wanted - b @ a) ** 2).sum() == pytest.approx((s[RANK:] ** 2).sum(), rel=1e-12)
    lengths = np.sqrt(s[:RANK]) if balanced else np.ones(RANK)
    np.testing.assert_allclose(np.linalg.norm(a, axis=1), lengths, rtol=1e-12)


def test_a_mean_of_the_rank_is_met_exactly() -> None:
    layer = Layer(same_a=True)
    a, b = layer.after(rule().reduce(layer.base, layer.read))
    np.testing.assert_allclose(b @ a, layer.wanted, rtol=0, atol=1e-12)


def test_a_direction_of_which_nothing_was_learned_can_still_be_learned() -> None:
    """A zero in both factors would stop every gradient."""
    layer = Layer()
    for change in layer.changes:
        change[1][:, 1:] = -layer.base[1][:, 1:]
        change[0][:] = 0
    a, b = layer.after(rule().reduce(layer.base, layer.read))
    np.testing.assert_allclose(b @ a, layer.wanted, rtol=0, atol=1e-12)
    assert not b[:, 1:].any() and np.array_equal(a[1:], layer.base[0][1:])


def test_what_a_client_kept_of_an_update_has_no_place_in_turned_factors() -> None:
    assert rule().misfit(run(False), PAIR) is None
    field, why = rule().misfit(run(True), PAIR) or ("", "")
    assert field == "codec.error_feedback" and "must be false" in why
