"""The study of Table 3 has the paper's budget, and every cell of it is a run that can be created."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedpeft.adapters.spec import AdapterSpec, TensorSpec
from fedpeft.config import parse_config
from fedpeft.privacy.example_level import Steps, example_epsilon, example_noise
from fedpeft.rounds.combinations import check_combination
from fedpeft.studies.study_file import laid_over, load_study

STUDY = Path(__file__).parents[2] / "experiments" / "paper" / "privacy.toml"
SPEC = AdapterSpec.of("bias", [TensorSpec("head.bias", (10,))])


@pytest.mark.parametrize("scale", [None, "gpu", "cpu"])
def test_every_cell_is_a_run_that_can_be_created(scale: str | None) -> None:
    study = load_study(STUDY, scale)
    shared = laid_over(study.run, study.data[study.default_data or ""].run)
    assert list(study.axes["privacy"]) == ["none", "epsilon 5"]
    for method in study.axes["method"].values():
        for point in study.axes["privacy"].values():
            check_combination(parse_config(laid_over(laid_over(shared, method), point)), SPEC)
    given = parse_config(laid_over(laid_over(shared, study.axes["method"]["bias"]), study.axes["privacy"]["epsilon 5"]))
    assert given.privacy is not None
    assert (given.privacy.target_epsilon, given.privacy.delta, given.privacy.clip_norm) == (5.0, 1e-4, 1.0)
    if scale == "cpu":
        z = example_noise(given, 125, 8)
        assert 4.9 < example_epsilon(z, given.training.batch_size, [Steps(125, 8 * 12)], 1e-4) <= 5.0
