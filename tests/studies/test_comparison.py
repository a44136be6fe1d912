"""Comparison of simulations, studies and runs that a server held: one line each."""

from __future__ import annotations

import json
import re

import pytest

from fedpeft.errors import DataInvalid
from fedpeft.studies.comparison import compared
from fedpeft.studies.report import write_report
from fedpeft.studies.report.tables import outcome, tables_of
from fedpeft.studies.results import ended, load_results

from .test_results import REPORT, row


def report(method: str, accuracies: list[float]) -> dict:
    """Returns what `fedpeft run show --json` says of a run, as far as a comparison reads it."""
    ticket = {"state": "received", "update_norm": 2.0, "metrics": {"loss": 0.5}}
    other = {"state": "received", "update_norm": 1.0, "metrics": {"loss": 1.5}}
    rounds = [row(number, 100, 50, accuracy) for number, accuracy in enumerate(accuracies, 1)]
    return {
        "method": method,
        "adapter_parameters": 10,
        "initial_metrics": {"accuracy": 0.1, "loss": 2.0},
        "rounds": [{**each, "tickets": [ticket, other, {"state": "late"}]} for each in rounds],
        "config": {"rounds": {"seed": "5"}},
    }


@pytest.fixture
def study(tmp_path):
    folder = tmp_path / "study"
    cells = []
    for method, accuracies in {"head": [0.2, 0.3], "bias": [0.3, 0.5]}.items():
        for seed in (0, 1):
            key = f"{method}-{seed}"
            (folder / "cells" / key).mkdir(parents=True)
            (folder / "cells" / key / "report.json").write_text(json.dumps(report(method, accuracies)))
            cells.append({"key": key, "points": {"method": method}, "seed": seed, "label": key})
    about = {"name": "s", "title": "", "question": "", "target": None, "budgets_bytes": [], "axes": {"method": []}}
    (folder / "study.json").write_text(json.dumps({**about, "cells": cells}))
    return folder


def test_a_simulation_a_run_and_a_study_stand_in_one_table(tmp_path, study):
    simulated = tmp_path / "simulated"
    simulated.mkdir()
    (simulated / "report.json").write_text(json.dumps(report("lora", [0.4])))
    shown = tmp_path / "shown.json"
    shown.write_text(json.dumps(report("full", [0.6, 0.7, 0.8])))
    result = compared([("a", simulated), ("b", shown), ("c", study), ("a", report("ffa_lora", [0.9]))])
    table = outcome(result)
    assert table.columns[0] == "run"
    names = ["a", "b", "c, head", "c, bias", "a (2)"]
    assert [(each[0], each[1], each[3]) for each in table.rows] == [
        (name, seeds, accuracy)
        for name, seeds, accuracy in zip(names, "11221", ["40.0", "80.0", "30.0", "50.0", "90.0"], strict=True)
    ]
    assert result.about["axes"] == {"run": names}
    assert result.cells[0].seed == 5


def test_the_spread_between_clients_is_that_of_the_last_round():
    (table,) = (t for t in tables_of(compared([("a", report("lora", [0.4]))])) if t.name == "clients")
    mean, smallest, largest, deviation, norms = table.rows[0][1:]
    assert (mean, smallest, largest, deviation) == ("1.000", "0.500", "1.500", "0.500")
    assert norms == f"{0.5 / 1.5:.3f}"


@pytest.mark.parametrize(
    ("content", "fault"),
    [(None, "is neither the folder of a simulation or study"), ("{", "is not JSON"), ("{}", "is not what fedpeft run")],
)
def test_what_cannot_be_compared_is_named(tmp_path, content, fault):
    path = tmp_path / "x"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataInvalid, match=fault):
        compared([("x", path)])


def test_a_simulation_that_has_not_ended_is_none_to_compare_and_a_paused_one_is_named_so(tmp_path):
    (tmp_path / "x" / "unfinished").mkdir(parents=True)
    with pytest.raises(DataInvalid, match="x holds a simulation that has not ended; the command that began it goes on"):
        compared([("x", tmp_path / "x")])
    result = compared([("y", {**report("lora", [0.4]), "state": "paused"}), ("y", report("lora", [0.4]))])
    assert [row[0] for row in outcome(result).rows] == ["y (paused)", "y"]


@pytest.mark.parametrize("key", ["version", "payload_bytes_up", "metrics", "seconds"])
def test_a_report_that_lacks_a_figure_is_named_with_it(tmp_path, study, key):
    broken = report("lora", [0.4])
    del broken["rounds"][0][key]
    shown, folder = tmp_path / "shown.json", study / "cells" / "head-0"
    for path in (shown, folder / "report.json"):
        path.write_text(json.dumps(broken))
    with pytest.raises(DataInvalid, match=rf"{shown.name}.*rounds\.0\.{key}"):
        compared([("x", shown)])
    cells = {cell.label: cell for cell in load_results(study).cells}
    assert cells["head-0"].report is None and cells["head-1"].report is not None
    assert re.search(
        rf"report\.json cannot be used: rounds\.0\.{key}.*computes this cell again", cells["head-0"].failure
    )


@pytest.mark.parametrize(
    ("part", "place"),
    [
        ({"config": None}, "config"),
        ({"config": {"rounds": {"seed": "x"}}}, r"config\.rounds\.seed"),
        ({"rounds": [{**row(1, 1, 1, 0.5), "tickets": [{}]}]}, r"rounds\.0\.tickets\.0\.state"),
        ({"facts": {"torch": 3}}, r"facts\.torch"),
        ({"partition": {"variant": "iid"}}, r"partition\.alpha"),
        ({"squared_distances": {}}, r"squared_distances\.backbone"),
    ],
)
def test_a_part_of_a_report_that_is_none_is_named(tmp_path, part, place):
    shown = tmp_path / "shown.json"
    shown.write_text(json.dumps({**report("lora", [0.4]), **part}))
    with pytest.raises(DataInvalid, match=rf"shown\.json cannot be used: {place}"):
        compared([("x", shown)])


@pytest.mark.parametrize("content", ["[]", "{}", '{"cells": [{"key": "a"}]}', '{"cells": 3}'])
def test_a_study_that_lacks_a_part_is_named(study, content):
    (study / "study.json").write_text(content)
    with pytest.raises(DataInvalid, match=r"study\.json"):
        load_results(study)


@pytest.mark.parametrize("content", ["[]", "3", '{"message": 3}'])
def test_a_reason_that_is_none_is_named(study, content):
    (study / "cells" / "head-0" / "report.json").unlink()
    (study / "cells" / "head-0" / "failure.json").write_text(content)
    (cell,) = (cell for cell in load_results(study).cells if cell.label == "head-0")
    assert cell.report is None and "failure.json cannot be used" in cell.failure


def test_a_run_without_tickets_or_scores_has_a_line_too():
    plain = {**REPORT, "method": "bias", "adapter_parameters": 5, "initial_metrics": {}}
    plain["rounds"] = [{**each, "metrics": {}, "tickets": []} for each in REPORT["rounds"]]
    result = compared([("plain", plain)])
    assert outcome(result).rows[0][3] == "-"
    assert [table.name for table in tables_of(result)] == ["outcome"]


def test_the_seeds_of_a_line_are_those_of_its_interval(study):
    path = study / "cells" / "bias-1" / "report.json"
    unscored = json.loads(path.read_text())
    unscored["rounds"][-1]["metrics"] = {}
    path.write_text(json.dumps(unscored))
    assert [row[1] for row in outcome(compared([("s", study)])).rows] == ["2", "1 of 2"]


def test_a_run_that_was_paused_is_no_result_of_a_study(study):
    path = study / "cells" / "bias-1" / "report.json"
    paused = {"state": "paused", "version": 1, "reason": "round 2 has 0 of the 1 update it needs"}
    path.write_text(json.dumps({**json.loads(path.read_text()), **paused}))
    cells = {cell.label: cell for cell in load_results(study).cells}
    assert cells["bias-1"].report is None
    assert cells["bias-1"].failure == "the run is paused after round 1: round 2 has 0 of the 1 update it needs"
    assert ended(path.parent) == cells["bias-1"].failure and ended(study / "cells" / "bias-0") == ""
    assert [row[1] for row in outcome(compared([("s", study)])).rows] == ["2", "1 of 2"]


def test_names_with_signs_of_formulas_are_drawn_as_they_are(tmp_path):
    result = compared([("$a_", report("lora", [0.4])), ("b$^$", report("lora", [0.5]))])
    page = {path.name: path for path in write_report(result, tmp_path)}
    assert "$a_" in page["outcome.svg"].read_text()
