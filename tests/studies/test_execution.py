"""A study that is executed: cells in processes, results found again, failures alone, and the report of all."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from fedpeft.errors import DataInvalid, StateInvalid
from fedpeft.process import locks
from fedpeft.studies.cells import Machine, cells_of
from fedpeft.studies.execution import Watcher, execute
from fedpeft.studies.report import write_report
from fedpeft.studies.results import load_results
from fedpeft.studies.study_file import load_study

from ..simulation.simulated_runs import without_clock
from .study_texts import STUDY, pets, study_file

pytestmark = pytest.mark.xdist_group("studies")  # their cells are forks of one process, which imports torch once

MACHINE = Machine(device="cpu", threads=1)


class Counting(Watcher):
    """Counts what was executed; kills the process of one cell when it is at work."""

    def __init__(self, victim: str = "") -> None:
        self.todo = 0
        self.done: list[str] = []
        self._victim = victim

    def planned(self, todo):
        self.todo = todo

    def ended(self, done):
        self.done.append(done.cell.label)

    def tick(self, at_work):
        for each in at_work:
            if each.cell.label == self._victim:
                os.kill(each.process.pid, signal.SIGKILL)
                self._victim = ""


def executed(folder: Path, text: str = STUDY, watcher: Watcher | None = None):
    study = load_study(study_file(folder, text))
    cells = cells_of(study, {"pets": pets(folder / "pets")})
    return execute(study, cells, folder / "out", MACHINE, 2, watcher)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A study whose third cell was killed, and the second one's report damaged, executed again with one point more."""
    folder = tmp_path_factory.mktemp("study")
    first = executed(folder, watcher=Counting("method=lora 2, seed=0"))
    damaged = first[1].folder / "report.json"
    damaged.write_bytes(damaged.read_bytes()[:300])
    kept = load_results(folder / "out").cells[1]
    assert (
        kept.report is None and f"cannot read {damaged}" in kept.failure and "computes this cell again" in kept.failure
    )
    before = {path: path.stat().st_mtime_ns for path in (folder / "out").rglob("report.json")}
    again = Counting()
    second = executed(folder, STUDY + '[axes.method.other]\nmodel.weights = "absent"\n', again)
    return folder / "out", first, before, again, second


def test_a_cell_that_is_killed_fails_alone(finished):
    _, first, before, _, _ = finished
    assert [bool(done.failure) for done in first] == [False, False, True, False]
    assert "its process was ended by signal 9" in first[2].failure
    assert len(before) == 3


def test_cells_with_results_are_found_again_and_failed_ones_tried_again(finished):
    _, _, before, again, second = finished
    assert again.todo == 4, "the one that was killed, that with a damaged report, and the two that are new"
    assert sorted(again.done) == [
        *("method=head, seed=1", "method=lora 2, seed=0", "method=other, seed=0", "method=other, seed=1")
    ]
    assert [path.parent for path, time in before.items() if path.stat().st_mtime_ns != time] == [second[1].folder]
    assert [bool(done.failure) for done in second] == [False] * 4 + [True] * 2
    assert [done.seconds > 0 for done in second] == [False, True, True, False, True, True]


def test_all_combinations_of_a_seed_come_before_the_next_seed(finished):
    *_, second = finished
    begun = {done.cell.label: (done.folder / "cell.json").stat().st_mtime_ns for done in second if done.seconds}
    assert max(begun, key=lambda label: begun[label]) in ("method=head, seed=1", "method=other, seed=1")
    assert len(begun) == 4


def test_a_failure_says_why_in_its_folder_and_in_the_results(finished):
    out, _, _, _, second = finished
    said = json.loads((second[4].folder / "failure.json").read_text())
    assert said["message"] == second[4].failure
    assert not (second[2].folder / "failure.json").exists(), "that of the killed cell is gone with its success"
    results = load_results(out)
    of_first = results.cells[0].report["rounds"]
    assert ["tickets" in each for each in of_first] == [False] * (len(of_first) - 1) + [True]
    assert [bool(cell.report) for cell in results.cells] == [True] * 4 + [False] * 2
    assert results.cells[4].failure == second[4].failure


def test_a_cell_has_the_bits_of_the_simulation_of_its_run_file(finished, tmp_path):
    import torch

    from fedpeft import simulation
    from fedpeft.config import parse_config

    *_, second = finished
    kept = json.loads((second[0].folder / "cell.json").read_text())
    assert kept["points"] == {"method": "head"} and kept["seed"] == 0 and kept["threads"] == 1
    config = parse_config({**{k: v for k, v in kept["run"].items() if v is not None}})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        clients, _ = simulation.clients_of(second[0].cell.train, config)
        simulation.simulate(config, clients, tmp_path / "again", second[0].cell.test, device="cpu")
    finally:
        torch.set_num_threads(threads)
    report, other = (json.loads((each / "report.json").read_text()) for each in (second[0].folder, tmp_path / "again"))
    assert [row["record_sha256"] for row in report["rounds"]] == [row["record_sha256"] for row in other["rounds"]]
    assert report["squared_distances"] == other["squared_distances"]


def test_the_report_is_one_page_with_its_figures_and_tables(finished, tmp_path):
    out, *_ = finished
    files = {path.name: path for path in write_report(load_results(out), tmp_path / "report")}
    page = files["report.html"].read_text()
    assert "<h1>Two methods</h1>" in page and "Which of two is better?" in page
    assert page.count("<svg") == 4 and "src=" not in page and "https://" not in page.replace("https://matplotlib", "")
    assert "method=other, seed=0" in page, "a cell without results is named"
    for name in ("accuracy-bytes", "accuracy-rounds", "outcome", "labels"):
        assert files[f"{name}.png"].read_bytes().startswith(b"\x89PNG")
        assert ElementTree.parse(files[f"{name}.svg"]).getroot().tag.endswith("svg")
    with files["curves.csv"].open() as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 4 * 3, "versions 0, 1 and 2 of four cells"
    assert {row["method"] for row in rows} == {"head", "lora 2"}
    results = load_results(out)
    last = results.cells[3].curve[-1]
    (same,) = (row for row in rows if row["key"] == results.cells[3].key and row["version"] == "2")
    assert (int(same["payload_bytes"]), float(same["accuracy"])) == (last.bytes, last.accuracy)
    latex = files["outcome.tex"].read_text()
    assert latex.count(r"\\") == 4 and r"accuracy, \%" in latex
    assert {"budgets.tex", "target.tex", "distances.tex", "skew.tex"} <= files.keys()


def test_the_same_results_make_the_same_report(finished, tmp_path):
    out, *_ = finished
    one, two = (write_report(load_results(out), tmp_path / name) for name in ("one", "two"))
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]


def test_two_studies_do_not_write_to_one_folder_at_once(finished):
    out, *_ = finished
    with locks.results(out, "study"), pytest.raises(StateInvalid, match="in use by another study"):
        executed(out.parent)


def test_a_folder_without_a_study_is_named(tmp_path):
    with pytest.raises(DataInvalid, match="holds no study"):
        load_results(tmp_path)


def test_no_cell_outlives_a_study_that_is_killed(tmp_path):
    script = (
        "import sys, fedpeft; fedpeft.study(*sys.argv[1:], override={'training.steps': 10**6}, device='cpu', jobs=2)"
    )
    data, out = pets(tmp_path / "pets"), tmp_path / "out"
    program = subprocess.Popen([sys.executable, "-c", script, study_file(tmp_path), data, out])
    try:
        folders = at_work(out, 2)
    finally:
        program.kill()
        program.wait()
    for folder in folders:
        wait_until_unheld(folder)
    assert len(list(out.glob("cells/*/report.json"))) == 0


def at_work(out: Path, count: int) -> list[Path]:
    """Returns the folders of the cells that are at work, once there are so many."""
    until = time.monotonic() + 60
    while len(found := [path.parent for path in out.glob("cells/*/unfinished")]) < count:
        assert time.monotonic() < until
        time.sleep(0.05)
    return found


def wait_until_unheld(folder: Path) -> None:
    """Waits until no process holds a cell's folder."""
    until = time.monotonic() + 10
    while True:
        try:
            with locks.results(folder, "simulation"):
                return
        except StateInvalid:
            assert time.monotonic() < until, f"a process is still at work in {folder}"


def test_data_that_changed_since_an_earlier_study_of_the_program_are_other_data(tmp_path):
    study = load_study(study_file(tmp_path))
    cells = cells_of(study, {"pets": pets(tmp_path / "pets")})[:1]
    (before,) = execute(study, cells, tmp_path / "out", MACHINE, 1, work=no_work)
    with (tmp_path / "pets" / "test.parquet").open("ab") as file:
        file.write(b"0")
    (after,) = execute(study, cells, tmp_path / "out", MACHINE, 1, work=no_work)
    assert before.folder != after.folder


def test_a_report_of_another_cell_or_of_other_records_is_computed_again(tmp_path):
    study = load_study(study_file(tmp_path))
    cells = cells_of(study, {"pets": pets(tmp_path / "pets")})[:2]
    first, second = (done.folder for done in execute(study, cells, tmp_path / "out", MACHINE, 2))
    whole = (second / "report.json").read_bytes()
    for damage in (
        lambda: (second / "report.json").write_bytes((first / "report.json").read_bytes()),
        lambda: (second / "records.jsonl").write_text((second / "records.jsonl").read_text().splitlines()[0] + "\n"),
    ):
        damage()
        again = Counting()
        execute(study, cells, tmp_path / "out", MACHINE, 2, again)
        assert again.todo == 1
        assert without_clock(json.loads((second / "report.json").read_text())) == without_clock(json.loads(whole))
    for name in ("adapter.safetensors", "records.jsonl"):  # as results are kept
        (second / name).unlink()
    execute(study, cells, tmp_path / "out", MACHINE, 2, kept := Counting())
    assert kept.todo == 0


def no_work(cell, machine, folder, events):
    """Leaves no results."""


def test_cells_of_one_content_are_computed_once_and_each_has_its_end(tmp_path):
    axis = '[axes.of.pets]\ndata = "pets"\n[axes.of.copies]\ndata = "copies"\n'
    study = load_study(
        study_file(tmp_path, STUDY.replace("[axes.method.head]", f"[data.copies]\n{axis}[axes.method.head]"))
    )
    classes = {"model": {"classes": ["cat", "dog", "emu"]}}
    places = {"pets": pets(tmp_path / "pets"), "copies": pets(tmp_path / "copies")}
    only, watcher = {"method": ["head"]}, Counting()
    cells = cells_of(study, places, override=classes, only=only)
    ended = execute(study, cells, tmp_path / "out", MACHINE, 2, watcher, no_work)
    assert [done.cell for done in ended] == cells
    assert len({done.folder for done in ended}) == 2 and len(cells) == 4
    assert watcher.todo == 4 and sorted(watcher.done) == sorted(cell.label for cell in cells)
    assert sum(done.seconds > 0 for done in ended) == 2, "a copy takes no time"
