"""A setting that has no effect beside others is refused, for whoever gave it expects one; what was accepted is read."""

from __future__ import annotations

from typing import Any

import pytest

from fedpeft.config import parse_config
from fedpeft.config.overrides import merged, united
from fedpeft.errors import ConfigInvalid
from fedpeft.rpc.wire import config_from_proto, config_to_proto

GOOD: dict[str, Any] = {"model": {"name": "m", "classes": ["a", "b"]}, "peft": {"method": "bias"}}


@pytest.mark.parametrize(
    ("section", "given", "fault"),
    [
        ("simulation", {"alpha": 0.5}, "simulation.alpha: partition iid takes none; leave it out"),
        ("simulation", {"partition": "shards", "alpha": 0.5}, "simulation.alpha: partition shards takes none"),
        ("simulation", {"column": "site", "alpha": 0.5}, "simulation.alpha: partition natural takes none"),
        ("simulation", {"partition": "dirichlet", "shards": 3}, "simulation.shards: partition dirichlet takes none"),
        ("simulation", {"variant": "balanced"}, "simulation.variant: partition iid has no variant 'balanced'"),
        ("simulation", {"workers": 2}, "simulation.workers: engine inprocess has none"),
        ("training", {"optimizer": "adamw", "momentum": 0.5}, "training.momentum: adamw takes none; leave it out"),
        ("codec", {"density": 0.5}, 'codec.density: float32 takes none; leave it out, or give up = "sparse"'),
        ("codec", {"up": "int8", "values": "int8"}, "codec.values: int8 takes none"),
    ],
)
def test_a_setting_without_effect_is_refused(section: str, given: dict[str, Any], fault: str) -> None:
    with pytest.raises(ConfigInvalid) as caught:
        parse_config({**GOOD, section: given})
    assert str(caught.value).startswith(fault)


@pytest.mark.parametrize(
    ("section", "given"),
    [
        ("simulation", {"partition": "quantity", "alpha": 0.5, "variant": "lognormal"}),
        ("simulation", {"partition": "shards", "shards": 3}),
        ("simulation", {"engine": "processes", "workers": 2}),
        ("codec", {"up": "sparse", "density": 0.5, "values": "int8"}),
    ],
)
def test_with_effect_it_is_taken_and_a_configuration_written_out_whole_too(section: str, given: dict[str, Any]) -> None:
    config = parse_config({**GOOD, section: given})
    assert parse_config(config.model_dump(mode="json")) == config
    plain = parse_config(GOOD)
    assert parse_config({**plain.model_dump(mode="json"), "simulation": {"partition": "iid", "alpha": 0.1}}).simulation


def test_a_run_that_was_accepted_stays_readable() -> None:
    data = {**GOOD, "codec": {"up": "int8", "density": 0.5}}
    config = parse_config(data, accepted=True)
    assert config.codec.density == 0.5
    assert config_from_proto(config_to_proto(config)) == config


@pytest.mark.parametrize("over", [merged, united])
@pytest.mark.parametrize(
    ("section", "base", "override", "left"),
    [
        ("simulation", {"clients": 4, "partition": "dirichlet", "alpha": 0.5}, {"partition": "iid"}, {"clients": 4}),
        ("simulation", {"partition": "dirichlet", "alpha": 0.5}, {"partition": "dirichlet"}, {"alpha": 0.5}),
        ("simulation", {"alpha": 0.5}, {"partition": "dirichlet"}, {"alpha": 0.5}),
        ("training", {"schedule": "step", "schedule_drops": 3}, {"schedule": "constant"}, {}),
        ("simulation", {"partition": "shards", "shards": 3}, {"partition": "dirichlet", "alpha": 1.0}, {"alpha": 1.0}),
        ("simulation", {"engine": "processes", "workers": 2, "clients": 4}, {"engine": "inprocess"}, {"clients": 4}),
        ("codec", {"up": "sparse", "density": 0.5, "down": "int8"}, {"up": "int8"}, {"down": "int8"}),
        ("training", {"optimizer": "sgd", "momentum": 0.5}, {"optimizer": "adamw"}, {}),
        ("rounds", {"policy": "buffered", "concurrency": 4, "count": 2}, {"policy": "synchronous"}, {"count": 2}),
        ("codec", {"error_feedback": False, "up": "sparse"}, {"up": "uniform2"}, {"error_feedback": False}),
    ],
)
def test_options_of_a_value_go_with_it(over, section, base, override, left) -> None:
    assert over({section: base}, {section: override})[section] == {**left, **override}


@pytest.mark.parametrize(
    ("section", "base", "override", "left"),
    [
        ("training", {"momentum": 0.95, "epochs": 2}, {"optimizer": "adamw"}, {"epochs": 2}),
        ("simulation", {"column": "site", "clients": 3}, {"partition": "iid"}, {"clients": 3}),
        ("codec", {"density": 0.5}, {"up": "sparse"}, {"density": 0.5}),
    ],
)
def test_options_beside_no_name_are_those_of_the_default_where_it_has_them(section, base, override, left) -> None:
    assert merged({section: base}, {section: override})[section] == {**left, **override}
    assert united({section: base}, {section: override})[section] == {**base, **override}, "which is meant is not known"
