"""Messages that say what a client in another language must not have to guess."""

from __future__ import annotations

import pytest

from fedpeft.config import TrainingConfig, parse_config
from fedpeft.errors import ConfigInvalid
from fedpeft.rounds.schedule import training_of
from fedpeft.rpc.wire import config_from_proto, config_to_proto, training_data, training_to_proto


@pytest.mark.parametrize(
    ("given", "epochs", "steps"), [({}, 1, None), ({"epochs": 4}, 4, None), ({"steps": 9}, None, 9)]
)
def test_settings_have_either_epochs_or_steps(given: dict[str, int], epochs: int | None, steps: int | None) -> None:
    message = training_to_proto(TrainingConfig.model_validate(given))
    said = {name: getattr(message, name) if message.HasField(name) else None for name in ("epochs", "steps")}
    assert said == {"epochs": epochs, "steps": steps}


def test_a_local_algorithm_goes_with_the_run_and_with_every_ticket_and_its_whole_numbers_stay_whole() -> None:
    said = {"name": "scaffold", "population": 64}
    model = {"name": "vit_tiny_patch16_224", "classes": ["a", "b"]}
    run = parse_config({"model": model, "peft": {"method": "bias"}, "training": {"algorithm": said}})
    assert config_from_proto(config_to_proto(run)) == run
    settings = TrainingConfig.model_validate(training_data(training_to_proto(run.training)))
    assert settings.algorithm == run.training.algorithm
    assert settings.algorithm is not None and settings.algorithm.options == {"population": 64}
    plain = parse_config({"model": model, "peft": {"method": "bias"}})
    assert not config_to_proto(plain).training.HasField("algorithm"), "a run without one has the bytes that it had"


def test_a_schedule_goes_with_the_run_and_only_its_rate_with_a_ticket() -> None:
    said = {"schedule": "step", "warmup_rounds": 2, "final_factor": 0.1, "schedule_drops": 3, "clip_gradient_norm": 0.5}
    model = {"name": "vit_tiny_patch16_224", "classes": ["a", "b"]}
    run = parse_config({"model": model, "peft": {"method": "bias"}, "training": said})
    assert config_from_proto(config_to_proto(run)) == run
    settings = TrainingConfig.model_validate(training_data(training_to_proto(training_of(run, 4))))
    assert settings == TrainingConfig(epochs=1, learning_rate=training_of(run, 4).learning_rate, clip_gradient_norm=0.5)
    kept = {"augmentation": "none", "keep_features": True}
    run = parse_config({"model": model, "peft": {"method": "head"}, "training": kept})
    assert config_from_proto(config_to_proto(run)) == run
    assert TrainingConfig.model_validate(training_data(training_to_proto(run.training))).keep_features
    plain = parse_config({"model": model, "peft": {"method": "bias"}})
    message = config_to_proto(plain).training
    assert not any(map(message.HasField, said)), "a run without has the bytes that it had"
    assert "keep_features" not in {field.name for field, _ in message.ListFields()}


@pytest.mark.parametrize("section", ["", "training", "codec"])
def test_a_configuration_with_a_field_of_a_newer_version_is_refused(section: str) -> None:
    """Unnoticed it would be a run of other settings than the others hold."""
    model = {"name": "vit_tiny_patch16_224", "classes": ["a", "b"]}
    message = config_to_proto(parse_config({"model": model, "peft": {"method": "bias"}}))
    newer = getattr(message, section) if section else message
    newer.MergeFromString(b"\xb8\x3e\x01")  # field 999, a number, 1
    with pytest.raises(ConfigInvalid, match=rf"field 999 of {section or 'the run'}; update the software") as refused:
        config_from_proto(message)
    assert refused.value.fields == ((section, "field 999 is of a newer version"),)
