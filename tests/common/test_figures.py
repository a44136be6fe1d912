from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft import figures
from fedpeft.errors import MetricsInvalid


@given(st.dictionaries(st.text(max_size=200), st.floats(), max_size=70))
def test_what_is_sendable_passes_the_check(given_: dict[str, float]) -> None:
    kept = figures.sendable(given_, figures.MAX_TRAINING)
    figures.check(kept, figures.MAX_TRAINING)
    assert kept.items() <= given_.items()
    if all(map(math.isfinite, given_.values())) and all(0 < len(n.encode()) <= 128 for n in given_):
        assert len(kept) == min(len(given_), figures.MAX_TRAINING)


def test_a_long_class_name_costs_its_own_figure_only() -> None:
    # A run file takes class names of 256 characters.
    scored = {"accuracy": 0.5, "accuracy/" + "x" * 256: 0.25, "accuracy/cat": 0.75}
    assert figures.sendable(scored, figures.MAX_EVALUATION) == {"accuracy": 0.5, "accuracy/cat": 0.75}


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({str(i): 0.0 for i in range(65)}, "65 figures; at most 64 are taken"),
        ({"": 1.0}, "a figure's name has 0 bytes; 1 to 128 are taken"),
        ({"é" * 65: 1.0}, "a figure's name has 130 bytes; 1 to 128 are taken"),
        ({"loss": math.nan}, "the figure loss is nan"),
        ({"loss": -math.inf}, "the figure loss is -inf"),
    ],
)
def test_what_is_refused(wrong: dict[str, float], says: str) -> None:
    with pytest.raises(MetricsInvalid, match=says):
        figures.check(wrong, figures.MAX_TRAINING)
