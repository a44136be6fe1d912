from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.errors import MetricsInvalid
from fedpeft.rounds import metric_values

COUNTS = metric_values.RANGES.keys() - {"accuracy", "clip_factor"}


@given(st.dictionaries(st.text(max_size=200), st.floats(), max_size=70))
def test_what_is_sendable_passes_the_check(given_: dict[str, float]) -> None:
    kept, dropped = metric_values.sendable(given_, metric_values.MAX_TRAINING)
    assert len(kept) + len(dropped) == len(given_)
    metric_values.check(kept, metric_values.MAX_TRAINING)
    assert kept.items() <= given_.items()
    known = any(name in metric_values.RANGES or name.startswith("accuracy/") for name in given_)
    if all(map(math.isfinite, given_.values())) and all(0 < len(n.encode()) <= 128 for n in given_) and not known:
        assert len(kept) == min(len(given_), metric_values.MAX_TRAINING)


def test_a_long_class_name_costs_its_own_figure_only() -> None:
    # A run file takes class names of 256 characters.
    scored = {"accuracy": 0.5, "accuracy/" + "x" * 256: 0.25, "accuracy/cat": 0.75}
    kept, dropped = metric_values.sendable({**scored, "loss": math.nan}, metric_values.MAX_EVALUATION)
    assert kept == {"accuracy": 0.5, "accuracy/cat": 0.75}
    assert dropped == (
        "a figure's name has 265 bytes; 1 to 128 are taken",
        "the figure loss is nan; it must be finite",
    )


def test_figures_beyond_the_limit_are_dropped_with_the_reason() -> None:
    kept, dropped = metric_values.sendable({f"figure-{n}": 1.0 for n in range(5)}, 3)
    assert list(kept) == ["figure-0", "figure-1", "figure-2"]
    assert dropped == tuple(f"the figure figure-{n} is one of more than 3" for n in (3, 4))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({str(i): 0.0 for i in range(65)}, "65 figures; at most 64 are taken"),
        ({"": 1.0}, "a figure's name has 0 bytes; 1 to 128 are taken"),
        ({"é" * 65: 1.0}, "a figure's name has 130 bytes; 1 to 128 are taken"),
        ({"loss": math.nan}, "the figure loss is nan"),
        ({"loss": -math.inf}, "the figure loss is -inf"),
        ({"loss": -0.5}, "the figure loss is -0.5; 0 to 1,000,000 is taken"),
        ({"accuracy": 7.0}, "the figure accuracy is 7; 0 to 1 is taken"),
        ({"clip_factor": 1.5}, "the figure clip_factor is 1.5; 0 to 1 is taken"),
        ({"accuracy/cat": -0.1}, "the figure accuracy/cat is -0.1; 0 to 1 is taken"),
        *[({name: -1.0}, f"the figure {name} is -1; 0 to ") for name in sorted(COUNTS)],
        *[({name: 1e300}, rf"the figure {name} is 1e\+300; 0 to ") for name in sorted(metric_values.RANGES)],
    ],
)
def test_what_is_refused(wrong: dict[str, float], says: str) -> None:
    with pytest.raises(MetricsInvalid, match=says):
        metric_values.check(wrong, metric_values.MAX_TRAINING)
    assert len(metric_values.sendable(wrong, metric_values.MAX_TRAINING)[0]) in (0, 64), (
        "a client does not send what is refused"
    )


def test_each_wrong_figure_is_named_as_a_field_and_nothing_of_it_reaches_a_terminal() -> None:
    with pytest.raises(MetricsInvalid) as caught:
        metric_values.check({"accuracy": 2.0, "lo\x1b[31mss": math.inf, "loss": 1.0}, metric_values.MAX_TRAINING)
    assert [path for path, _ in caught.value.fields] == ["metrics[accuracy]", "metrics[lo [31mss]"]
    assert "1 more" in caught.value.message
    with pytest.raises(MetricsInvalid) as caught:
        metric_values.check({f"accuracy/{i}": 2.0 for i in range(2000)}, metric_values.MAX_EVALUATION)
    assert len(caught.value.fields) == metric_values.FAULTS_NAMED


def test_the_sum_of_a_million_figures_is_finite() -> None:
    assert all(math.isfinite(1e6 * high) for _, high in metric_values.RANGES.values())


@pytest.mark.parametrize("nothing", [{}, {"examples": 10.0}])
def test_an_evaluation_has_a_result(nothing: dict[str, float]) -> None:
    with pytest.raises(MetricsInvalid, match="no result"):
        metric_values.check_evaluation(nothing)
    metric_values.check_evaluation({**nothing, "perplexity": -3.5})  # a task may report what it likes
    metric_values.check({}, metric_values.MAX_TRAINING)  # an update may come without figures
