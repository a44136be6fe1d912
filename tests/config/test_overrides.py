"""Overrides of a run file: what they set, and what they take away."""

import pytest

from fedpeft.config.overrides import joined, merged, parse_overrides, united
from fedpeft.errors import ConfigInvalid

RUN = {
    "peft": {"method": "lora", "rank": 4},
    "training": {"learning_rate": 0.1, "algorithm": {"name": "fedprox", "mu": 1.0}},
    "aggregation": {"strategy": "fedadam", "tau": 0.01},
}


def test_a_field_is_set_and_the_others_stay():
    changed = merged(RUN, {"training": {"learning_rate": 0.2, "algorithm": {"mu": 2.0}}, "rounds": {"count": 3}})
    assert changed["training"] == {"learning_rate": 0.2, "algorithm": {"name": "fedprox", "mu": 2.0}}
    assert changed["rounds"] == {"count": 3}
    assert changed["peft"] == {"method": "lora", "rank": 4}
    assert RUN["training"]["learning_rate"] == 0.1, "the run file itself is not changed"


@pytest.mark.parametrize(
    ("over", "section", "left"),
    [
        ({"peft": {"method": "bias"}}, "peft", {"method": "bias"}),
        ({"peft": {"method": "lora", "alpha": 2.0}}, "peft", {"method": "lora", "rank": 4, "alpha": 2.0}),
        ({"aggregation": {"strategy": "fedavg"}}, "aggregation", {"strategy": "fedavg"}),
        (
            {"training": {"algorithm": {"name": "plain"}}},
            "training",
            {"learning_rate": 0.1, "algorithm": {"name": "plain"}},
        ),
    ],
)
def test_options_go_with_the_name_that_they_stood_beside(over, section, left):
    assert merged(RUN, over)[section] == left


def test_an_option_stays_whether_it_is_set_before_or_after_its_name():
    settings = ["peft.rank=8", "peft.method=lora", "training.algorithm.mu=0.5", "training.algorithm.name=fedprox"]
    found = parse_overrides(settings)
    assert found == parse_overrides(settings[::-1])
    assert found == {
        "peft": {"rank": 8, "method": "lora"},
        "training": {"algorithm": {"mu": 0.5, "name": "fedprox"}},
    }


def test_of_two_names_the_later_one_takes_the_options_of_the_other_away():
    assert united({"peft": {"method": "lora", "rank": 8}}, {"peft": {"method": "bias"}}) == {"peft": {"method": "bias"}}
    assert united({"peft": {"rank": 8}}, {"peft": {"method": "lora"}}) == {"peft": {"rank": 8, "method": "lora"}}


def test_settings_are_values_of_toml_or_else_text():
    settings = ["training.learning_rate=0.005", "peft.method=lora", "rounds.count = 3", 'model.classes=["a", "b"]']
    assert parse_overrides([*settings, "name=two words", "codec.error_feedback=false"]) == {
        "training": {"learning_rate": 0.005},
        "peft": {"method": "lora"},
        "rounds": {"count": 3},
        "model": {"classes": ["a", "b"]},
        "name": "two words",
        "codec": {"error_feedback": False},
    }
    assert parse_overrides(["name=0\nseed=1"]) == {"name": "0\nseed=1"}, "one setting sets one field"


@pytest.mark.parametrize("setting", ["rounds.count", "=3", "a..b=3", "two words=3", "[rounds]\ncount=3", ""])
def test_what_is_no_setting_is_refused(setting):
    with pytest.raises(ConfigInvalid, match=r"is no (setting|key)"):
        parse_overrides([setting])


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        (["rounds.count=1", "rounds.count=2"], "rounds.count"),
        (["rounds.count=1", "rounds={count=1}"], "rounds.count"),
        (["privacy.noise_multiplier=1", "privacy=false"], "privacy"),
        (["name=a", "rounds.seed=1", "name=a"], "name"),
    ],
)
def test_a_field_that_is_set_twice_is_refused(settings, field):
    with pytest.raises(ConfigInvalid, match=rf"^{field} is set twice; give it once$"):
        parse_overrides(settings)


def test_overrides_that_share_a_section_are_joined():
    one, other = {"rounds": {"count": 3}}, {"rounds": {"seed": 5}, "name": "x"}
    assert joined(one, other) == {"rounds": {"count": 3, "seed": 5}, "name": "x"}
    assert one == {"rounds": {"count": 3}}
    with pytest.raises(ConfigInvalid, match=r"^rounds\.seed is set twice"):
        joined({"rounds": {"seed": 6}}, other)
