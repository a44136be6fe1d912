"""The guarantee of a run says the same wherever it is shown, and nothing where there is none."""

from __future__ import annotations

from typing import Any

from fedpeft.api import views
from fedpeft.api.following import RunSnapshot
from fedpeft.privacy.statement import in_words
from fedpeft.v1 import run_pb2
from fedpeft_operator.console.shown.run import tiles


def a_run(**privacy: Any) -> run_pb2.Run:
    config = run_pb2.RunConfig(rounds=run_pb2.RoundsConfig(count=3), privacy=run_pb2.PrivacyConfig(**privacy))
    return run_pb2.Run(id="run-1", version=2, config=config)


PRIVATE = a_run(clip_norm=1.0, mechanism="central", noise_multiplier=4.5, delta=1e-5, target_epsilon=3.0)


def test_epsilon_is_what_all_rounds_have_spent() -> None:
    stated = views.privacy(PRIVATE, [{"privacy_epsilon": 1.25}, {"privacy_epsilon": 2.5}, {}])
    assert stated is not None and stated["epsilon"] == 2.5
    assert in_words(stated) == "epsilon 2.5 of 3 spent at delta 1e-05, unit: client (zero-out), central noise"
    before = views.privacy(PRIVATE, [])
    assert before is not None and before["epsilon"] == 0.0


def test_without_a_limit_none_is_said() -> None:
    stated = views.privacy(a_run(mechanism="central", noise_multiplier=4.5, delta=1e-5), [{"privacy_epsilon": 7.0}])
    assert stated is not None and stated["target_epsilon"] is None
    assert in_words(stated).startswith("epsilon 7 spent at delta 1e-05")


def test_a_run_without_noise_has_no_guarantee() -> None:
    assert views.privacy(a_run(clip_norm=1.0), [{"privacy_epsilon": 1.0}]) is None
    assert "privacy" not in views.run_json(a_run(clip_norm=1.0), [], None)
    assert "Epsilon spent" not in [tile.label for tile in tiles(RunSnapshot(a_run()), [])]


def test_the_page_of_a_run_has_it() -> None:
    assert views.run_json(PRIVATE, [], None)["privacy"]["unit"] == "client"
    (tile,) = [tile for tile in tiles(RunSnapshot(PRIVATE), []) if tile.label == "Epsilon spent"]
    assert (tile.value, tile.beside) == ("0", "of 3, delta 1e-05; unit: client (zero-out)")
