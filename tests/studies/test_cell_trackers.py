"""Cells of a study in a tracker: each is one run, by the name of study and cell, whatever interrupts it."""

from __future__ import annotations

import threading

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fedpeft.errors import ConfigInvalid
from fedpeft.studies.cell_process import _simulate
from fedpeft.studies.cell_trackers import CellTrackers
from fedpeft.studies.cells import Machine, cells_of
from fedpeft.studies.files import TRACKED
from fedpeft.studies.study_file import load_study
from fedpeft.tracking import tracking
from fedpeft.tracking.tensorboard import TensorBoard

from .study_texts import pets, study_file

MACHINE = Machine(device="cpu")


class Events:
    """The end of a pipe to the study's process; interrupts the cell after some rounds."""

    def __init__(self, rounds=100):
        self.left = rounds

    def send(self, version):
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


def points(boards):
    """Returns the points of accuracy and of bytes of each run, by its folder."""
    return {
        folder.name: {
            tag: [point.step for point in EventAccumulator(str(folder)).Reload().Scalars(tag)]
            for tag in ("accuracy", "payload_bytes_up")
        }
        for folder in boards.iterdir()
    }


@pytest.fixture
def cells(tmp_path):
    return cells_of(load_study(study_file(tmp_path)), {"pets": pets(tmp_path / "pets")})


def test_a_cell_is_one_run_however_often_it_is_interrupted_and_written(tmp_path, cells):
    trackers, cell = CellTrackers("tiny", ("tensorboard",), tmp_path), cells[0]
    folder = tmp_path / cell.key(MACHINE)
    folder.mkdir()
    with pytest.raises(KeyboardInterrupt):
        _simulate(cell, MACHINE, folder, Events(1), trackers)
    name = f"tiny_method_head_seed_0-{folder.name}"
    assert points(tmp_path / "tensorboard") == {name: {"accuracy": [0, 1], "payload_bytes_up": [1]}}
    _simulate(cell, MACHINE, folder, Events(), trackers)
    whole = {name: {"accuracy": [0, 1, 2], "payload_bytes_up": [1, 2]}}
    assert points(tmp_path / "tensorboard") == whole
    assert trackers.write([(cell, folder)]) == {}
    assert points(tmp_path / "tensorboard") == whole


def test_a_cell_that_had_its_results_before_is_written_from_its_report(tmp_path, cells):
    folders = [tmp_path / cell.key(MACHINE) for cell in cells[:2]]
    for cell, folder in zip(cells, folders, strict=False):
        folder.mkdir()
        _simulate(cell, MACHINE, folder, Events(), None)
    boards = tmp_path / "boards"
    trackers = CellTrackers("tiny", (f"tensorboard={boards}",), tmp_path)
    assert trackers.write(zip(cells, folders, strict=False)) == {}
    assert sorted(points(boards)) == [f"tiny_method_head_seed_{k}-{folders[k].name}" for k in (0, 1)]
    assert all(found == {"accuracy": [0, 1, 2], "payload_bytes_up": [1, 2]} for found in points(boards).values())


def test_what_a_tracker_did_not_take_is_written_once_the_cells_have_ended(tmp_path, cells, monkeypatch):
    trackers, cell = CellTrackers("tiny", ("tensorboard",), tmp_path), cells[0]
    folder = tmp_path / cell.key(MACHINE)
    folder.mkdir()
    with monkeypatch.context() as broken:
        broken.setattr(TensorBoard, "begin", lambda *_: 1 / 0)
        _simulate(cell, MACHINE, folder, Events(), trackers)
        assert trackers.write([(cell, folder)]) == {"tensorboard": 3}
    assert not (tmp_path / "tensorboard").exists()
    assert trackers.write([(cell, folder)]) == {}
    (found,) = points(tmp_path / "tensorboard").values()
    assert found == {"accuracy": [0, 1, 2], "payload_bytes_up": [1, 2]}
    monkeypatch.setattr(TensorBoard, "begin", lambda *_: 1 / 0)
    assert trackers.write([(cell, folder)]) == {}, "it is known to have all, and is not asked again"


def test_a_tracker_that_does_not_answer_is_asked_for_one_cell_and_has_none_of_them(tmp_path, cells, monkeypatch):
    folders = [tmp_path / cell.key(MACHINE) for cell in cells[:2]]
    for cell, folder in zip(cells, folders, strict=False):
        folder.mkdir()
        _simulate(cell, MACHINE, folder, Events(), None)
    trackers, answered, begun = CellTrackers("tiny", ("tensorboard",), tmp_path), threading.Event(), []
    with monkeypatch.context() as broken:
        broken.setattr(tracking, "END_S", 0.2)
        broken.setattr(TensorBoard, "begin", lambda _, run: begun.append(run.id) or (answered.wait() and set()))
        assert trackers.write(zip(cells, folders, strict=False)) == {"tensorboard": 6}
        assert begun == [folders[0].name], "each further cell would wait as long"
        assert not any((folder / TRACKED).exists() for folder in folders)
        answered.set()
    assert trackers.write(zip(cells, folders, strict=False)) == {}
    assert len(points(tmp_path / "tensorboard")) == 2


def test_a_tracker_that_there_is_not_is_refused_before_a_cell_runs(tmp_path):
    with pytest.raises(ConfigInvalid, match="there is no tracker 'tensorbored'"):
        CellTrackers("tiny", ("tensorbored",), tmp_path)
