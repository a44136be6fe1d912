"""The budget of clients whose training hides single examples."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import dp_accounting
import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant

from fedpeft.adapters.payload import Manifest
from fedpeft.adapters.spec import AdapterSpec, TensorSpec
from fedpeft.config import RunConfig, TrainingConfig, parse_config
from fedpeft.errors import BudgetExhausted, ConfigInvalid, TrainingFailed
from fedpeft.privacy.accounting import calibrated
from fedpeft.privacy.example_level import Steps, example_epsilon, example_noise
from fedpeft.rounds.combinations import check_combination
from fedpeft.rounds.groups import SENT
from fedpeft.rounds.local_job import Groups, LocalJob, Version
from fedpeft.rounds.schedule import training_of
from fedpeft.rpc import wire
from fedpeft.training.local_budget import LocalBudget

BIAS = AdapterSpec.of("bias", [TensorSpec("head.weight", (2, 3))])


def run(**sections: Any) -> RunConfig:
    privacy = {"clip_norm": 1.0, "mechanism": "example", "noise_multiplier": 1.5, "delta": 1e-3}
    return parse_config(
        {
            "model": {"name": "vit_tiny_patch16_224", "classes": ["a", "b"]},
            "peft": {"method": "bias"},
            **sections,
            "training": {"batch_size": 16, **sections.get("training", {})},
            "privacy": {**privacy, **sections.get("privacy", {})},
        }
    )


def on_paper(z: float, *parts: tuple[float, int], interval: float = 1e-3, delta: float = 1e-3) -> float:
    accountant = PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE, interval)
    for rate, steps in parts:
        accountant.compose(dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(z)), steps)
    return float(accountant.get_epsilon(delta))


def job(config: RunConfig, state: Groups | None = None) -> LocalJob:
    return LocalJob("a", 1, 7, config.training, Version(Manifest((), 0, b""), Path("none")), state or {})


def test_epsilon_is_that_of_an_accountant_on_paper() -> None:
    for z, examples, steps in ((1.5, 125, 8), (1.0, 125, 96), (2.0, 10, 5)):
        rate = min(1.0, 16 / examples)
        found = example_epsilon(z, 16, [Steps(examples, steps)], 1e-3)
        assert found == pytest.approx(on_paper(z, (rate, steps)), abs=1e-9)
        assert found == pytest.approx(on_paper(z, (rate, steps), interval=1e-4), abs=1e-3)
    both = example_epsilon(1.5, 16, [Steps(125, 8), Steps(200, 13), Steps(125, 8)], 1e-3)
    assert both == pytest.approx(on_paper(1.5, (16 / 200, 13), (16 / 125, 16)), abs=1e-9)
    assert example_epsilon(1.5, 16, [], 1e-3) == 0.0


def test_a_client_works_out_the_noise_that_lasts_for_all_rounds_and_no_more() -> None:
    config = run(rounds={"count": 12}, privacy={"noise_multiplier": None, "target_epsilon": 5.0})
    assert calibrated(config) is config, "nobody else knows how many examples a client has"
    for examples in (20, 125):
        steps = -(-examples // 16)
        z, rate = example_noise(config, examples, steps), 16 / examples
        assert on_paper(z, (rate, 12 * steps)) <= 5.0 < on_paper(z * 0.995, (rate, 12 * steps))
        state: Groups = {}
        for _ in range(12):
            budget = LocalBudget.of(config, job(config, state), examples)
            assert budget.noise is not None and budget.noise.noise_multiplier == z
            state = budget.state
        assert budget.epsilon == pytest.approx(on_paper(z, (rate, 12 * steps)), abs=1e-9)
        with pytest.raises(BudgetExhausted, match=r"with round 1 of this client epsilon would be 5\.\d+, and"):
            LocalBudget.of(config, job(config, state), examples)


@pytest.mark.parametrize(("target", "examples", "steps"), [(0.2, 100_000, 1), (100.0, 20, 5), (5.0, 4, 3)])
def test_noise_is_found_for_budgets_of_any_size(target: float, examples: int, steps: int) -> None:
    config = run(rounds={"count": 2}, privacy={"noise_multiplier": None, "target_epsilon": target})
    z = example_noise(config, examples, steps)
    assert 0.02 < z < 100 and example_epsilon(z, 16, [Steps(examples, 2 * steps)], 1e-3) <= target


def test_a_client_goes_on_with_what_it_spent_and_with_its_noise_when_its_data_grow() -> None:
    config = run(rounds={"count": 4}, privacy={"noise_multiplier": None, "target_epsilon": 5.0})
    first = LocalBudget.of(config, job(config), 100)
    second = LocalBudget.of(config, job(config, first.state), 200)
    assert second.noise == first.noise is not None
    held = second.state[SENT]
    assert held["examples"].tolist() == [100, 200] and held["steps"].tolist() == [7, 13]
    assert all(values.dtype == np.float32 for values in held.values())
    z = first.noise.noise_multiplier
    assert second.epsilon == pytest.approx(on_paper(z, (0.08, 13), (0.16, 7)), abs=1e-9)
    assert second.codec == config.codec, "what an encoding leaves of a noised update may go up later"


@pytest.mark.parametrize("other", [{"batch_size": 1}, {"precision": "float16"}])
def test_a_ticket_cannot_change_what_past_steps_are_accounted_for_with(other: dict[str, Any]) -> None:
    config = run(training={"batch_size": 100})
    first = LocalBudget.of(config, job(config), 100)
    asked = replace(job(config, first.state), settings=config.training.model_copy(update=other))
    (key,) = other
    with pytest.raises(TrainingFailed, match=f"round 1 asks for training.{key} = .*, and the run has"):
        LocalBudget.of(config, asked, 100)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"privacy": {"noise_multiplier": 30.0}}, "noise 1.5, then 30"),
        ({"training": {"batch_size": 1}}, "batch size 16, then 1"),
        ({"privacy": {"delta": 5e-3}}, "delta 0.001, then 0.005"),
        ({"privacy": {"target_epsilon": 50.0}}, "target 0, then 50"),
    ],
)
def test_a_run_that_comes_back_with_other_terms_is_refused(changed: dict[str, Any], words: str) -> None:
    """The past would be accounted for under terms that it was not spent under."""
    first = LocalBudget.of(run(), job(run()), 100)
    other = run(**changed)
    with pytest.raises(TrainingFailed, match=f"privacy budget in this run under other settings .{words}"):
        LocalBudget.of(other, job(other, first.state), 100)


@pytest.mark.parametrize("examples", [1000, 2500])
def test_a_delta_that_protects_no_example_of_a_client_trains_nothing(examples: int) -> None:
    with pytest.raises(TrainingFailed, match=f"privacy.delta is 0.001, .* one of {examples:,} examples: it must"):
        LocalBudget.of(run(), job(run()), examples)
    assert LocalBudget.of(run(), job(run()), 999).epsilon


@pytest.mark.parametrize("training", [{}, {"precision": "bfloat16", "schedule": "cosine"}])
def test_the_settings_of_a_ticket_are_those_of_the_run_after_their_way_to_a_client(training: dict[str, Any]) -> None:
    config = run(rounds={"count": 4}, training=training)
    there = wire.config_from_proto(wire.config_to_proto(config))
    ticket = wire.training_data(wire.training_to_proto(training_of(config, 2)))
    task = replace(job(there), round=2, settings=TrainingConfig.model_validate(ticket))
    assert LocalBudget.of(there, task, 100).epsilon == pytest.approx(on_paper(1.5, (0.16, 7)), abs=1e-9)


def test_more_steps_of_a_ticket_are_spent_and_leave_the_noise_as_it_was() -> None:
    config = run(rounds={"count": 4}, privacy={"noise_multiplier": None, "target_epsilon": 5.0})
    first = LocalBudget.of(config, job(config), 100)
    longer = replace(job(config, first.state), settings=config.training.model_copy(update={"epochs": 2}))
    second = LocalBudget.of(config, longer, 100)
    assert second.noise == first.noise is not None
    z = first.noise.noise_multiplier
    assert second.epsilon == pytest.approx(on_paper(z, (0.16, 21)), abs=1e-9)


def test_what_does_not_go_with_noise_of_the_steps_is_refused_by_field() -> None:
    for training, field in (
        ({"clip_gradient_norm": 1.0}, "clip_gradient_norm"),
        ({"precision": "float16"}, "precision"),
    ):
        with pytest.raises(ConfigInvalid, match=f"training.{field} is") as caught:
            check_combination(run(training=training), BIAS)
        assert [name for name, _ in caught.value.fields] == [f"training.{field}"]
    with pytest.raises(ConfigInvalid, match="quantile needs mechanism"):
        run(privacy={"quantile": 0.5})
    with pytest.raises(ConfigInvalid, match="needs noise_multiplier or target_epsilon"):
        run(privacy={"noise_multiplier": None})
    for algorithm in (
        {"name": "fedprox", "mu": 0.1},
        {"name": "scaffold", "population": 8},
    ):  # they see noised gradients
        check_combination(run(training={"algorithm": algorithm, "momentum": 0.0}), BIAS)
