"""The report of a study with more combinations than one looks at: some are shown, which is said, and files have all."""

from __future__ import annotations

import csv
import re
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from fedpeft.studies.report import figures, selection, write_report, writing
from fedpeft.studies.report.figures import figures_of
from fedpeft.studies.report.selection import for_curves, furthest
from fedpeft.studies.results import CellResult, StudyResult


def study(methods: int, rates: int) -> StudyResult:
    """Returns a study in which later methods and earlier rates get further."""
    axes = {"method": [f"m{k}" for k in range(methods)], "rate": [f"r{k}" for k in range(rates)]}
    cells = []
    for m, r in product(range(methods), range(rates)):
        accuracy = (m + 1) / (methods + 1) - 0.01 * r / rates
        row = {
            "version": 1,
            "payload_bytes_up": 10,
            "payload_bytes_down": 10,
            "seconds": 1.0,
            "metrics": {"accuracy": accuracy, "loss": 1.0},
            "tickets": [],
        }
        report = {"adapter_parameters": 9, "initial_metrics": {"accuracy": 0.1, "loss": 2.0}, "rounds": [row]}
        points = {"method": f"m{m}", "rate": f"r{r}"}
        cells.append(CellResult(f"{m}-{r}", points, 0, f"method=m{m}, rate=r{r}, seed=0", report, ""))
    about = {"name": "many", "title": "", "question": "", "target": None, "budgets_bytes": [], "axes": axes}
    return StudyResult(Path(), about, tuple(cells))


def test_what_got_furthest_is_chosen_of_1500_combinations_in_the_order_of_the_study():
    groups = study(30, 50).groups
    curves, outcomes = for_curves(groups), furthest(groups, 40, "outcome.csv")
    assert list(dict.fromkeys(group.points["method"] for group in curves.groups)) == [f"m{k}" for k in range(14, 30)]
    assert list(dict.fromkeys(group.points["rate"] for group in curves.groups)) == [f"r{k}" for k in range(12)]
    assert curves.note == "16 of 30 lines and 12 of 50 panels, those that got furthest; curves.csv has all"
    assert {group.points["method"] for group in outcomes.groups} == {"m29"} and len(outcomes.groups) == 40
    assert outcomes.note == "40 of 1,500 combinations, those that got furthest; outcome.csv has all"


def test_a_legend_of_long_names_lies_inside_its_figure():
    short = study(7, 1)
    names = {f"m{k}": f"weights of whole batches {k}" for k in range(7)}
    cells = [replace(cell, points={"method": names[cell.points["method"]]}) for cell in short.cells]
    about = {**short.about, "axes": {"method": list(names.values())}}
    figure = figures_of(StudyResult(Path(), about, tuple(cells)))["accuracy-rounds"].figure
    figure.canvas.draw()
    (legend,) = figure.legends
    drawn, whole = legend.get_window_extent(), figure.bbox
    assert whole.x0 <= drawn.x0 and drawn.x1 <= whole.x1


def test_nothing_is_said_where_all_is_shown():
    groups = study(3, 2).groups
    assert for_curves(groups).groups == furthest(groups, 40, "").groups == tuple(groups)
    assert for_curves(groups).note == furthest(groups, 40, "").note == ""


@pytest.fixture
def written(tmp_path, monkeypatch):
    for name, most in (("MOST_LINES", 2), ("MOST_PANELS", 2), ("MOST_ROWS", 4)):
        monkeypatch.setattr(selection, name, most)
    monkeypatch.setattr(figures, "MOST_OUTCOMES", 3)
    monkeypatch.setattr(writing, "MOST_ROWS", 4)
    write_report(study(4, 3), tmp_path)
    return tmp_path


def test_page_and_figures_show_some_and_the_files_have_all(written):
    page = (written / "report.html").read_text()
    notes = re.findall(r"<figcaption>(.*?)</figcaption>", page)
    curves = "Shown are 2 of 4 lines and 2 of 3 panels, those that got furthest; curves.csv has all."
    assert notes == [curves, curves, "Shown are 3 of 12 combinations, those that got furthest; outcome.csv has all."]
    assert "2 of 4 lines" in (written / "accuracy-bytes.svg").read_text(), "in the figure itself too"
    assert "Shown are 4 of 12 combinations" in page and "The first 4 of 12; cells.csv has all." in page
    assert page.count('<tr><td class="text">') == 8, "rows of the outcome, and of the cells"
    for file, rows in (("outcome.csv", 12), ("cells.csv", 12), ("curves.csv", 24)):
        with (written / file).open() as stream:
            assert len(list(csv.DictReader(stream))) == rows, file


def test_many_lines_have_no_intervals_and_names_leave_room(monkeypatch):
    monkeypatch.setattr(figures, "MOST_BANDS", 2)
    many = study(3, 1)
    cells = tuple(
        CellResult(
            c.key, {"method": "x" * 100 + c.points["method"], "rate": "r" * 50, "depth": "d$" * 20}, 0, "", c.report, ""
        )
        for c in many.cells
    )
    drawn = figures_of(StudyResult(Path(), many.about, cells))["accuracy-rounds"]
    (panel,) = drawn.figure.axes
    assert len(panel.lines) == 3 and not panel.collections
    assert drawn.note == "lines without their intervals, being more than 2"
    assert [line.get_label() for line in panel.lines] == [f"{'x' * 24}…{'x' * 21}m{k}" for k in range(3)]
    assert panel.get_title().replace("\\$", "$") == f"{'r' * 12}…{'r' * 11}, {'d$' * 6}…${'d$' * 5}"
    assert "\\$" in panel.get_title(), "no formula"
