"""Simulated runs give the bits that they gave."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from .conftest import Golden
from .simulations import SCENARIOS, environment, images, simulated

EXACT = ("records", "adapter", "train_loss", "norms")
"""Results of torch's arithmetic."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield images(tmp_path_factory.mktemp("golden"))
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_simulated_run_gives_the_bits_that_it_gave(name: str, data: Path, tmp_path: Path, golden: Golden) -> None:
    found = simulated(name, data, tmp_path)
    keys = (*EXACT, "payload_bytes") if "sparse" in name else EXACT  # the size of positions depends on the values
    trained = {key: found.pop(key) for key in keys}
    assert golden.holds(f"{name}: bytes, clients", found)
    if golden.record or golden.kept["environment"] == environment():
        assert golden.holds("environment", environment())
        assert golden.holds(f"{name}: training", trained)
        return
    kept = golden.kept[f"{name}: training"]
    assert trained["norms"] == pytest.approx(kept["norms"], rel=0.01)
    assert trained["train_loss"] == pytest.approx(kept["train_loss"], rel=0.01)
