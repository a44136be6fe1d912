"""fedpeft.study: the same as the command, and its results in a notebook."""

from __future__ import annotations

import pytest

import fedpeft
from fedpeft.errors import ConfigInvalid, DataInvalid, SettingsInvalid
from fedpeft.studies.study_file import COLUMNS

from .study_texts import pets, study_file

pytestmark = pytest.mark.xdist_group("studies")  # their cells are forks of one process, which imports torch once


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("api")
    file, data = study_file(folder), pets(folder / "pets")
    override = {"rounds.count": 1, "training": {"batch_size": 8}}
    grid = {"training.learning_rate": [0.01, 0.5]}
    only = {"method": ["head"]}
    return fedpeft.study(
        file, {"pets": data}, folder / "out", override=override, seeds=[3], grid=grid, only=only, device="cpu", jobs=2
    )


def test_the_results_are_a_frame_a_table_and_a_report(done, tmp_path):
    frame = done.to_frame()
    assert list(frame.columns)[:4] == ["method", "training.learning_rate", "seed", "version"]
    assert set(frame.columns[3:]) <= COLUMNS, "no axis has the name of a column"
    assert len(frame) == 4 and set(frame["training.learning_rate"]) == {"0.01", "0.5"}
    assert set(frame.seed) == {3}
    assert repr(done) == "<fedpeft study 'tiny': 2 of 2 cells with results>"
    assert done._repr_html_().count("<tr>") == 3
    assert done.report(tmp_path / "report").read_text().startswith("<!doctype html>")
    assert done.failures == {}
    assert [group.points["training.learning_rate"] for group in done.groups] == ["0.01", "0.5"]


def test_a_folder_s_results_are_opened_again(done):
    again = fedpeft.Study(done.folder)
    assert again.to_frame().equals(done.to_frame())
    cell = fedpeft.Simulation(done.folder / "cells" / done.results.cells[0].key)
    assert cell.config.rounds.seed == 3 and cell.config.training.batch_size == 8


WRONG_TYPES = [
    ("seeds", 5, "seeds is a list of whole numbers; 5 was given"),
    ("seeds", "12", "seeds is a list of whole numbers; '12' was given"),
    ("seeds", [1.5], "seeds is a list of whole numbers; [1.5] was given"),
    ("seeds", [True], "seeds is a list of whole numbers; [True] was given"),
    ("only", ["head"], "only is a mapping of axes to lists of their points; ['head'] was given"),
    ("only", {"method": 5}, "only is a mapping of axes to lists of their points; {'method': 5} was given"),
    ("grid", [1], "grid is a mapping of keys of a run file to lists of values; [1] was given"),
    (
        "grid",
        {"rounds.count": 5},
        "grid is a mapping of keys of a run file to lists of values; {'rounds.count': 5} was given",
    ),
    ("grid", {5: [1]}, "grid is a mapping of keys of a run file to lists of values; {5: [1]} was given"),
    ("override", 3, "override is a mapping of keys of a run file to values; 3 was given"),
    ("override", {3: 3}, "override is a mapping of keys of a run file to values; {3: 3} was given"),
    ("track", "mlflow", "track is a list of texts; 'mlflow' was given"),
    ("track", 5, "track is a list of texts; 5 was given"),
    ("scale", 5, "scale is a text; 5 was given"),
    ("device", 5, "device is a text; 5 was given"),
]


def test_wrong_arguments_are_named(tmp_path):
    file, data = study_file(tmp_path), pets(tmp_path / "pets")
    with pytest.raises(ConfigInvalid, match="give a list of values"):
        fedpeft.study(file, data, tmp_path / "out", grid={"peft.method": "bias"})
    with pytest.raises(ConfigInvalid, match="has no value"):
        fedpeft.study(file, data, tmp_path / "out", grid={"peft.method": []})
    for wrong in ({"jobs": 0}, {"threads": 0}, {"jobs": "2"}):
        with pytest.raises(SettingsInvalid, match="is a whole number from 1 on"):
            fedpeft.study(file, data, tmp_path / "out", **wrong)
    for name in ("file", "data", "out", "weights"):
        with pytest.raises(SettingsInvalid, match=f"^{name} is empty: a variable that is not set, perhaps$"):
            fedpeft.study(**{"file": file, "data": data, "out": tmp_path / "out", name: ""})
    with pytest.raises(SettingsInvalid, match=r"^data\['pets'\] is empty"):
        fedpeft.study(file, {"pets": ""}, tmp_path / "out")
    for name, wrong, words in WRONG_TYPES:
        with pytest.raises(SettingsInvalid) as refused:
            fedpeft.study(file, data, tmp_path / "out", **{name: wrong})
        assert refused.value.message == words
    with pytest.raises(DataInvalid, match="give --data pets=FOLDER"):
        fedpeft.study(file, tmp_path / "absent", tmp_path / "out")
