"""Kept results: a wrong argument costs none that were there, and cells that are left out are counted."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from fedpeft.studies.report.tables import tables_of
from fedpeft.studies.results import load_results

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
FILE, RESULTS = EXPERIMENTS / "keep.py", EXPERIMENTS / "results"


@pytest.fixture(scope="module")
def keep():
    spec = importlib.util.spec_from_file_location("tested_keep", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.keep


def study(out: Path) -> Path:
    done = out / "cells" / "done"
    for folder in (out / "report", done, out / "cells" / "failed"):
        folder.mkdir(parents=True)
    (out / "study.json").write_text(json.dumps({"cells": [{"key": "done"}, {"key": "done"}, {"key": "failed"}]}))
    (out / "report" / "report.html").write_text("page")
    ticket = {"client": "a", "state": "counted", "reason": "", "examples": 3, "weight": 1.0, "update_norm": 0.5}
    tickets = [{**ticket, "metrics": {"loss": 0.25, "seconds": 2.0}, "id": "long"}]
    (done / "cell.json").write_text("{}")
    (done / "report.json").write_text(json.dumps({"rounds": [{"tickets": tickets}]}))
    return out


def test_of_a_ticket_the_shown_figures_are_kept_and_cells_without_a_report_are_counted(keep, tmp_path, capsys):
    out, kept = study(tmp_path / "out"), tmp_path / "kept"
    for _ in range(2):
        keep(out, kept)
        assert "1 of 2 cells have no report and are left out" in capsys.readouterr().err
    assert sorted(str(file.relative_to(kept)) for file in kept.rglob("*.*")) == [
        *("cells/done/cell.json", "cells/done/report.json", "report/report.html", "study.json"),
    ]
    (ticket,) = json.loads((kept / "cells" / "done" / "report.json").read_text())["rounds"][0]["tickets"]
    assert ticket["metrics"] == {"loss": 0.25} and "id" not in ticket


def test_a_loss_that_no_client_sent_is_none_that_is_kept(keep, tmp_path):
    out, kept = study(tmp_path / "out"), tmp_path / "kept"
    file = out / "cells" / "done" / "report.json"
    file.write_text(file.read_text().replace('"loss": 0.25, ', ""))
    keep(out, kept)
    (ticket,) = json.loads((kept / "cells" / "done" / "report.json").read_text())["rounds"][0]["tickets"]
    assert ticket["metrics"] == {}


@pytest.mark.parametrize("name", sorted(file.parent.name for file in RESULTS.glob("*/study.json")))
def test_of_all_results_that_are_kept_a_report_can_be_written_again(name, tmp_path):
    results = load_results(RESULTS / name)
    tables = {table.name: table for table in tables_of(results)}
    assert {"outcome", "clients", "skew"} <= tables.keys() and len(tables["outcome"].rows) == len(results.groups)


def test_a_wrong_argument_removes_nothing(keep, tmp_path):
    results = tmp_path / "results"
    keep(study(tmp_path / "out"), results / "communication")
    with pytest.raises(FileExistsError, match="results holds no results of a study and would be removed"):
        keep(tmp_path / "out", results)
    with pytest.raises(FileNotFoundError):
        keep(tmp_path / "typo", results / "communication")
    assert (results / "communication" / "study.json").exists()


@pytest.mark.parametrize("name", ["adapter.safetensors", "records.jsonl"])
def test_the_folder_where_a_study_ran_is_never_replaced(keep, tmp_path, name):
    out, other = study(tmp_path / "out"), study(tmp_path / "other")
    for folder in (out, other):
        (folder / "cells" / "done" / name).write_text("a day's work")
        with pytest.raises(FileExistsError, match=r"would be removed: .* is where a study ran"):
            keep(out, folder)
        assert (folder / "cells" / "done" / name).exists()


def test_what_was_kept_stays_until_all_that_replaces_it_is_there(keep, tmp_path):
    out, kept = study(tmp_path / "out"), tmp_path / "kept"
    keep(out, kept)
    (out / "cells" / "done" / "cell.json").unlink()
    with pytest.raises(FileNotFoundError):
        keep(out, kept)
    assert (kept / "cells" / "done" / "report.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "out"]
