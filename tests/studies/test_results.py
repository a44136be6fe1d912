"""Figures of runs: curves, budgets, targets, intervals; each against a plain calculation."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import pytest
from scipy import stats

from fedpeft.errors import SettingsInvalid
from fedpeft.studies.report import write_report
from fedpeft.studies.report.figures import figures_of
from fedpeft.studies.report.tables import tables_of
from fedpeft.studies.results import (
    CellResult,
    Group,
    Point,
    StudyResult,
    accuracy_within,
    curve_of,
    difference,
    estimate,
    until,
)


def row(version, up, down, accuracy=None, seconds=1.5):
    metrics = {} if accuracy is None else {"accuracy": accuracy, "loss": 1 - accuracy}
    return {
        "version": version,
        "payload_bytes_up": up,
        "payload_bytes_down": down,
        "seconds": seconds,
        "metrics": metrics,
    }


REPORT = {
    "initial_metrics": {"accuracy": 0.1, "loss": 2.0},
    "rounds": [row(1, 100, 50, 0.3), row(2, 100, 0, None, None), row(3, 100, 50, 0.25)],
}


def test_a_curve_adds_up_bytes_and_seconds_from_version_0_on():
    assert curve_of(REPORT) == (
        Point(0, 0, 0.0, 0.1, 2.0),
        Point(1, 150, 1.5, 0.3, 0.7),
        Point(2, 250, 1.5, None, None),
        Point(3, 400, 3.0, 0.25, 0.75),
    )
    assert curve_of({"initial_metrics": {}, "rounds": []}) == (Point(0, 0, 0.0, None, None),)


@pytest.mark.parametrize(("budget", "accuracy"), [(0, 0.1), (149, 0.1), (150, 0.3), (399, 0.3), (400, 0.25)])
def test_a_budget_buys_the_last_scored_version_within_it(budget, accuracy):
    assert accuracy_within(curve_of(REPORT), budget) == accuracy


def test_a_target_is_reached_by_the_first_version_that_is_as_good():
    assert until(curve_of(REPORT), 0.3) == Point(1, 150, 1.5, 0.3, 0.7)
    assert until(curve_of(REPORT), 0.31) is None
    assert accuracy_within(curve_of({"initial_metrics": {}, "rounds": []}), 10) is None


def test_an_interval_is_student_s():
    values = [0.61, 0.64, 0.66]
    found = estimate(values)
    low, high = stats.t.interval(0.95, 2, statistics.mean(values), statistics.stdev(values) / math.sqrt(3))
    assert found.mean == pytest.approx(statistics.mean(values), abs=1e-15)
    assert found.half_width == pytest.approx((high - low) / 2, rel=1e-12)
    assert estimate([0.5]).half_width is None
    assert estimate([]) is None


def test_differences_are_paired_by_seed():
    ours, theirs = {0: 0.9, 1: 0.5, 2: 0.7}, {0: 0.8, 1: 0.4, 3: 0.1}
    assert difference(ours, theirs) == estimate([ours[0] - theirs[0], ours[1] - theirs[1]])
    assert difference(ours, {}) is None


def test_a_mean_curve_leaves_out_versions_that_a_seed_did_not_score():
    other = {"initial_metrics": {"accuracy": 0.3, "loss": 2.0}, "rounds": [row(1, 200, 50, 0.5), row(2, 0, 0, 0.9)]}
    cells = tuple(CellResult(str(i), {}, i, "", report, "") for i, report in enumerate((REPORT, other)))
    curve = Group({}, cells, 0).mean_curve()
    assert [(version, moved) for version, moved, _ in curve] == [(0, 0), (1, 200)]
    assert [found.mean for _, _, found in curve] == pytest.approx([0.2, 0.4])
    assert Group({}, cells, 0).by_seed("accuracy") == {0: 0.25, 1: 0.9}
    with pytest.raises(SettingsInvalid, match="there is no figure 'acc'; there are: accuracy, loss"):
        Group({}, cells, 0).by_seed("acc")


def test_a_version_is_drawn_at_its_number_whichever_others_were_scored():
    report = {"initial_metrics": {}, "rounds": [row(1, 9, 9, 0.3), row(2, 9, 9), row(3, 9, 9, 0.5)]}
    about = {"axes": {"run": ["a"]}}
    study = StudyResult(Path(), about, (CellResult("a", {"run": "a"}, 0, "", report, ""),))
    (axis,) = figures_of(study)["accuracy-rounds"].figure.axes
    assert list(axis.lines[0].get_xdata()) == [1.0, 3.0]


def test_a_report_without_distances_is_one_of_which_none_are_said():
    reports = (
        {**REPORT, "squared_distances": None},
        {**REPORT, "squared_distances": {"backbone": 1.0, "head": 2.0, "added": 0.0}},
    )
    about = {
        "name": "n",
        "title": "t",
        "question": "",
        "target": None,
        "budgets_bytes": [],
        "axes": {"run": ["a", "b"]},
    }
    cells = tuple(CellResult(str(k), {"run": "ab"[k]}, 0, "", reports[k], "") for k in (0, 1))
    tables = {table.name: table for table in tables_of(StudyResult(Path(), about, cells))}
    assert [row[0] for row in tables["distances"].rows] == ["a", "b"]


def test_held_out_images_that_cells_trained_on_are_said_once_for_all_cells(tmp_path):
    overlaps = (None, {"images": 0, "held_out": 9}, {"images": 2, "held_out": 9}, {"images": 4, "held_out": 8})
    cells = tuple(CellResult(str(k), {}, k, "", {**REPORT, "overlap": each}, "") for k, each in enumerate(overlaps))
    about = {"name": "n", "title": "t", "question": "", "target": None, "budgets_bytes": [], "axes": {}}
    some = StudyResult(tmp_path, about, cells)
    assert some.overlap.startswith(
        "in 2 cells of 4 held-out images are among the training images, with the same bytes, 4 of 8"
    )
    assert StudyResult(tmp_path, about, cells[:2]).overlap == ""
    page = next(path for path in write_report(some, tmp_path) if path.suffix == ".html").read_text()
    assert "In 2 cells of 4 held-out images are among" in page
