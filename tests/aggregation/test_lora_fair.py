"""LoRA-FAIR: the product of the factors is nearer to the mean of the products than that of their means."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from fedpeft.adapters.spec import AdapterSpec, TensorSpec
from fedpeft.aggregation import Doubles, GroupStrategy, strategy
from fedpeft.config import parse_config

RANK, INPUTS, OUTPUTS = 3, 11, 7
SHARES = (0.2, 0.5, 0.3)
RUN = parse_config({"model": {"name": "vit_tiny_patch16_224", "classes": ["a", "b"]}, "peft": {"method": "lora"}})


def rule(regularization: float = 1e-9) -> GroupStrategy:
    found = strategy("lora_fair", {"regularization": regularization})
    assert isinstance(found, GroupStrategy)
    return found


class Layer:
    """A LoRA layer, and the changes of three clients."""

    def __init__(self, same_a: bool = False) -> None:
        draw = np.random.default_rng(3)
        self.base = [draw.standard_normal((RANK, INPUTS)), draw.standard_normal((OUTPUTS, RANK))]
        self.changes = [[draw.standard_normal(values.shape) for values in self.base] for _ in SHARES]
        if same_a:
            for change in self.changes:
                change[0] = self.changes[0][0]

    def read(self) -> Iterator[tuple[float, list[Doubles]]]:
        yield from zip(SHARES, self.changes, strict=True)

    @property
    def wanted(self) -> Doubles:
        """The mean of the clients' products B A."""
        return sum(p * (self.base[1] + b) @ (self.base[0] + a) for p, (a, b) in self.read())  # type: ignore[return-value]

    def after(self, deltas: list[Doubles]) -> tuple[Doubles, Doubles]:
        a, b = (x + delta for x, delta in zip(self.base, deltas, strict=True))
        return a, b

    def means(self) -> list[Doubles]:
        return [sum(p * change[i] for p, change in self.read()) for i in (0, 1)]  # type: ignore[misc]


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
    layer.changes = [layer.base for _ in SHARES]
    assert not any(delta.any() for delta in rule().reduce(layer.base, layer.read))


def test_pairs_are_found_by_name_and_an_adapter_without_any_is_refused() -> None:
    names = ["b.lora_A.weight", "b.lora_B.weight", "head.weight", "c.lora_A.weight"]
    assert rule().groups(names) == [("b.lora_A.weight", "b.lora_B.weight")]
    with_pair, without = (AdapterSpec.of("lora", [TensorSpec(n, (1, 1)) for n in some]) for some in (names, names[2:]))
    assert rule().misfit(RUN, with_pair) is None
    field, why = rule().misfit(RUN, without) or ("", "")
    assert field == "aggregation.strategy" and "needs A and B of a LoRA layer" in why
