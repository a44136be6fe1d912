"""FedBuff: fresh updates are FedAvg's, stale ones move less."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.adapters.payload import encode
from fedpeft.adapters.spec import TensorSpec
from fedpeft.aggregation import UpdateFacts, strategy
from fedpeft.rounds.folding.contributions import Contribution
from fedpeft.rounds.folding.fold import fold

SPEC = TensorSpec("w", (3,))
BASE = {"w": np.array([1.0, -2.0, 0.5], np.float32)}


def folded(name: str, changes: list[list[float]], staleness: list[int], **options: float) -> np.ndarray:
    contributions = []
    for place, (change, stale) in enumerate(zip(changes, staleness, strict=True)):
        manifest, data = encode({"w": np.array(change, np.float32)}, [SPEC], "float32")
        contributions.append(Contribution(f"c{place}", UpdateFacts(10, staleness=stale), manifest, memoryview(data)))
    return fold(contributions, [SPEC], strategy(name, options), BASE, {}).adapter["w"]


@given(st.lists(st.lists(st.floats(-9, 9, width=32), min_size=3, max_size=3), min_size=1, max_size=5))
def test_a_buffer_of_fresh_updates_is_fedavg(changes: list[list[float]]) -> None:
    fresh = [0] * len(changes)
    # FedAvg's weights are the equal numbers of examples: the sum is ten times as large, and so rounded otherwise.
    np.testing.assert_allclose(
        folded("fedbuff", changes, fresh), folded("fedavg", changes, fresh), rtol=1e-6, atol=1e-6
    )


def test_an_update_three_versions_behind_moves_the_adapter_by_half() -> None:
    change = [0.5, 0.25, -1.0]
    np.testing.assert_array_equal(folded("fedbuff", [change], [3]) - BASE["w"], np.float32(change) / 2)


def test_equal_staleness_does_not_cancel_out() -> None:
    moved = folded("fedbuff", [[1, 1, 1], [3, 3, 3]], [8, 8]) - BASE["w"]
    np.testing.assert_allclose(moved, np.full(3, 2 / 3), rtol=1e-6)


def test_the_exponent_says_how_much_staleness_counts() -> None:
    assert strategy("fedbuff", {"staleness_exponent": 0.0}).weigh(UpdateFacts(7, staleness=99)) == 1.0
    assert strategy("fedbuff", {"staleness_exponent": 1.0}).weigh(UpdateFacts(7, staleness=3)) == pytest.approx(0.25)
