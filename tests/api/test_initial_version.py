"""Adapter version 0: what can be known to be wrong is refused before a model is built."""

from __future__ import annotations

from typing import Any, NoReturn

import pytest

from fedpeft.api.initial_version import first_version
from fedpeft.config import parse_config
from fedpeft.errors import ConfigInvalid, ModelInvalid
from fedpeft.models import backbones

TINY = {"name": "vit_tiny_patch16_224", "weights": "none", "image_size": 32, "classes": ["a", "b"], "depth": 1}
RIGHT: dict[str, Any] = {"model": TINY, "peft": {"method": "bias"}}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"aggregation": {"strategy": "lora_fair"}}, "aggregation.strategy"),
        ({"simulation": {"clients": 2, "engine": "no-such"}}, "simulation.engine"),
        ({"rounds": {"policy": "fedbuff"}}, "rounds.policy"),
        ({"peft": {"method": "bias", "no_such": 1}}, "peft.no_such"),
    ],
)
def test_a_run_that_cannot_work_is_refused_before_its_model_is_built(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], field: str
) -> None:
    monkeypatch.setattr(backbones, "build", _must_not_be_built)
    with pytest.raises(ConfigInvalid) as caught:
        first_version(parse_config(RIGHT | change))
    assert field in [path for path, _ in caught.value.fields]


def test_a_model_that_there_is_not_is_refused_likewise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbones, "build", _must_not_be_built)
    with pytest.raises(ModelInvalid, match="no_such_model"):
        first_version(parse_config(RIGHT | {"model": TINY | {"name": "no_such_model"}}))


def test_the_spec_that_was_checked_is_that_of_the_model() -> None:
    from fedpeft.api.initial_version import checked_spec

    config = parse_config(RIGHT)
    assert first_version(config).spec == checked_spec(config)


def _must_not_be_built(*_: object) -> NoReturn:
    raise AssertionError("a model was built")
