"""The rate of every round against NumPy's arrays of all rounds at once."""

from __future__ import annotations

import numpy as np
import pytest

from fedpeft.adapters.spec import AdapterSpec, TensorSpec
from fedpeft.config import RunConfig, TrainingConfig, parse_config
from fedpeft.errors import ConfigInvalid
from fedpeft.rounds.combinations import check_combination
from fedpeft.rounds.schedule import factor, training_of

RUN = {"model": {"name": "vit_tiny_patch16_224", "classes": ["a", "b"]}, "peft": {"method": "bias"}}


def run(count: int, **training: object) -> RunConfig:
    return parse_config({**RUN, "rounds": {"count": count}, "training": {"learning_rate": 0.3, **training}})


def falling(schedule: str, rounds: int, final: float, drops: int) -> np.ndarray:
    """Returns the factors of the rounds after warm-up."""
    match schedule:
        case "linear":
            return np.linspace(1, final, rounds)
        case "cosine":
            return final + (1 - final) * (1 + np.cos(np.linspace(0, np.pi, rounds))) / 2
        case "step":
            begins = np.ceil(np.arange(1, drops + 1) * rounds / (drops + 1))
            return np.geomspace(1, final, drops + 1)[np.searchsorted(begins, np.arange(rounds), "right")]
        case _:
            return np.ones(rounds)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "step"])
@pytest.mark.parametrize(("count", "warmup"), [(10, 0), (10, 3), (97, 20), (5, 1)])
@pytest.mark.parametrize(("final", "drops"), [(0.01, 2), (0.5, 3), (1.0, 1)])
def test_every_round_has_the_rate_of_its_schedule(
    schedule: str, count: int, warmup: int, final: float, drops: int
) -> None:
    said: dict[str, object] = {"schedule": schedule}
    said |= {"warmup_rounds": warmup} if warmup else {}
    said |= {"final_factor": final} if schedule != "constant" else {}
    said |= {"schedule_drops": drops} if schedule == "step" else {}
    config = run(count, **said)
    found = [training_of(config, number).learning_rate for number in range(1, count + 1)]
    rising = np.arange(1, warmup + 1) / (warmup + 1)
    expected = 0.3 * np.concatenate([rising, falling(schedule, count - warmup, final, drops)])
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert found[warmup] == 0.3, "the first round after warm-up has the rate that is written"


def test_final_factor_and_drops_have_defaults() -> None:
    said = {"schedule": "step"}
    assert [training_of(run(9, **said), n).learning_rate for n in (1, 3, 4, 6, 7, 9)] == pytest.approx(
        [0.3, 0.3, 0.03, 0.03, 0.003, 0.003], rel=1e-12
    )
    assert training_of(run(9, schedule="linear"), 9).learning_rate == pytest.approx(0.003, rel=1e-12)


def test_a_round_s_settings_have_a_rate_and_no_schedule_and_are_otherwise_the_run_s() -> None:
    config = run(8, schedule="cosine", warmup_rounds=2, final_factor=0.1, steps=7, clip_gradient_norm=2.0)
    settings = training_of(config, 5)
    assert TrainingConfig.model_validate(settings.model_dump(exclude_none=True)) == settings
    assert settings == TrainingConfig(learning_rate=settings.learning_rate, steps=7, clip_gradient_norm=2.0)
    assert 0.03 < settings.learning_rate < 0.3
    plain = run(8)
    assert training_of(plain, 3) is plain.training


def test_a_round_beyond_the_last_has_the_last_one_s_rate_and_one_round_the_first_s() -> None:
    falls = TrainingConfig(schedule="linear", final_factor=0.25)
    assert factor(falls, 99, 10) == factor(falls, 10, 10) == 0.25
    assert factor(falls, 1, 1) == 1.0


@pytest.mark.parametrize(
    ("training", "place"),
    [
        ({"final_factor": 0.1}, r'training: final_factor is not a setting of schedule = "constant"'),
        (
            {"schedule": "cosine", "schedule_drops": 2},
            r'training: schedule_drops is not a setting of schedule = "cosine"',
        ),
        ({"schedule": "cosine", "final_factor": 0.0}, r"training\.final_factor: "),
        ({"schedule": "exponential"}, r"training\.schedule: "),
        ({"clip_gradient_norm": 0.0}, r"training\.clip_gradient_norm: "),
    ],
)
def test_settings_that_mean_nothing_are_refused(training: dict[str, object], place: str) -> None:
    with pytest.raises(ConfigInvalid, match=place):
        run(10, **training)


@pytest.mark.parametrize(
    ("training", "field", "text"),
    [
        ({"warmup_rounds": 6}, "training.warmup_rounds", "is 6; a run of 6 rounds never comes to"),
        ({"schedule": "step", "schedule_drops": 6}, "training.schedule_drops", "have room for 5"),
        ({"schedule": "step", "warmup_rounds": 4}, "training.schedule_drops", "is 2; the 2 rounds after warm-up"),
    ],
)
def test_a_run_too_short_for_its_schedule_is_refused_when_it_is_created(
    training: dict[str, object], field: str, text: str
) -> None:
    bias = AdapterSpec.of("bias", [TensorSpec("head.weight", (2, 3))])
    with pytest.raises(ConfigInvalid, match=text) as caught:
        check_combination(run(6, **training), bias)
    assert caught.value.fields[0][0] == field
    check_combination(run(7, **training), bias)
