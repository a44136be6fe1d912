"""LoRA-FAIR: the product of the factors is nearer to the mean of the products than that of their means."""

from __future__ import annotations

import numpy as np
import pytest

from fedpeft.adapters.spec import AdapterSpec, TensorSpec
from fedpeft.aggregation import GroupStrategy, strategy
from fedpeft.config import parse_config

from .lora_layers import Layer

RUN = parse_config({"model": {"name": "vit_tiny_patch16_224", "classes": ["a", "b"]}, "peft": {"method": "lora"}})


def rule(regularization: float = 1e-9) -> GroupStrategy:
    found = strategy("lora_fair", {"regularization": regularization})
    assert isinstance(found, GroupStrategy)
    return found


@pytest.mark.parametrize("regularization", [1e-9, 0.01, 1.0])
def test_the_error_is_smaller_than_that_of_the_means(regularization: float) -> None:
    layer = Layer()
    a, b = layer.after(rule(regularization).reduce(layer.base, layer.read))
    plain_a, plain_b = layer.after(layer.means())
    np.testing.assert_allclose(a, plain_a, rtol=1e-12)
    assert np.linalg.norm(layer.wanted - b @ a) < np.linalg.norm(layer.wanted - plain_b @ plain_a)


def test_without_regularization_it_is_the_projection_on_the_rows_of_a() -> None:
    layer = Layer()
    a, b = layer.after(rule().reduce(layer.base, layer.read))
    np.testing.assert_allclose(b @ a, layer.wanted @ np.linalg.pinv(a) @ a, rtol=1e-6)


def test_equal_a_give_the_mean_of_the_products() -> None:
    layer = Layer(same_a=True)
    a, b = layer.after(rule().reduce(layer.base, layer.read))
    np.testing.assert_allclose(b @ a, layer.wanted, rtol=1e-6)


def test_factors_of_zero_are_left_alone() -> None:
    layer = Layer()
    layer.base = [np.zeros_like(values) for values in layer.base]
    layer.changes = [layer.base for _ in layer.changes]
    assert not any(delta.any() for delta in rule().reduce(layer.base, layer.read))


def test_pairs_are_found_by_name_and_an_adapter_without_any_is_refused() -> None:
    names = ["b.lora_A.weight", "b.lora_B.weight", "head.weight", "c.lora_A.weight"]
    assert rule().groups(names) == [("b.lora_A.weight", "b.lora_B.weight")]
    with_pair, without = (AdapterSpec.of("lora", [TensorSpec(n, (1, 1)) for n in some]) for some in (names, names[2:]))
    assert rule().misfit(RUN, with_pair) is None
    field, why = rule().misfit(RUN, without) or ("", "")
    assert field == "aggregation.strategy" and "needs A and B of a LoRA layer" in why
