"""Checks of a study's cells: what would fail in one of them is refused before the first one runs."""

from __future__ import annotations

import importlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fedpeft
from fedpeft.data.division import Division
from fedpeft.data.partition_writer import write_parts
from fedpeft.data.partitions import iid
from fedpeft.data.sources.opening import open_source
from fedpeft.errors import ConfigInvalid, DataInvalid, FedpeftError, ModelInvalid, SettingsInvalid
from fedpeft.models.tasks import tasks
from fedpeft.models.tasks.image_classification import ImageClassification
from fedpeft.studies.cells import Cell, Machine, cells_of
from fedpeft.studies.checks import check_cells
from fedpeft.studies.divisions import Divisions
from fedpeft.studies.study_file import load_study

from ..algorithms.quadratic import Quadratic, run_file
from ..outside_package import looked_up_anew
from .study_texts import STUDY, pets, study_file

CPU = Machine("cpu")


def cells(folder: Path, text: str = STUDY, data: Path | None = None, **override) -> list[Cell]:
    """Returns the cells of the tiny study."""
    places = {"pets": data or pets(folder / "pets")}
    return cells_of(load_study(study_file(folder, text)), places, override=override)


def relabelled(path: Path, rows: int) -> None:
    """Takes the labels of the first rows away."""
    found = pq.read_table(path)
    labels = [None if k < rows else label for k, label in enumerate(found["label"].to_pylist())]
    column = found.schema.get_field_index("label")
    field = found.schema.field("label")
    pq.write_table(found.set_column(column, field, pa.array(labels, field.type)), path)


POPULATION = """
[axes.formula.none]
[axes.formula.right]
aggregation.strategy = "feddyn"
training.algorithm.name = "feddyn"
codec.error_feedback = false
aggregation.population = 3
[axes.formula.wrong]
aggregation.strategy = "feddyn"
training.algorithm.name = "feddyn"
codec.error_feedback = false
aggregation.population = 16
"""


def test_the_population_of_every_run_is_compared_with_the_clients_of_its_division(tmp_path):
    text = STUDY.replace("[scales.one]", f"{POPULATION}[scales.one]", 1)
    found = cells(tmp_path, text)
    check_cells([cell for cell in found if cell.points["formula"] != "wrong"], CPU)
    with pytest.raises(ConfigInvalid, match=r"wrong, seed=0: aggregation.population is 16, and there are 3 clients"):
        check_cells(found, CPU)


def test_a_data_set_is_opened_and_divided_no_more_often_than_it_differs(tmp_path, monkeypatch):
    found = cells(tmp_path)
    opened, divided = [], []
    read, of = ImageClassification.read, Division.of
    monkeypatch.setattr(ImageClassification, "read", lambda task, path: opened.append(path.stem) or read(task, path))
    monkeypatch.setattr(Division, "of", lambda rule, data, seed: divided.append(seed) or of(rule, data, seed))
    check_cells(found, CPU)
    assert sorted(opened) == ["test", "train"]
    assert divided == [0, 1]


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ({"training": {"precision": "bfloat16"}}, 'simulation.engine: is "batched", which computes in float32'),
        (
            {"privacy": {"mechanism": "example", "clip_norm": 1.0, "noise_multiplier": 1.0, "delta": 1e-5}},
            'simulation.engine: is "batched", which has no gradients of single examples',
        ),
    ],
)
def test_a_run_that_its_engine_cannot_compute_is_refused(tmp_path, override, fault):
    found = cells(tmp_path, simulation={"engine": "batched"}, **override)
    with pytest.raises(ConfigInvalid, match=fault):
        check_cells(found, CPU)
    check_cells(found, Machine("cpu", over_network=True))


def test_a_missing_library_of_an_engine_is_said(tmp_path, monkeypatch):
    importlib.import_module("fedpeft.simulation.engines.ray")
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(ConfigInvalid, match=r'method=head, seed=0: simulation.engine: is "ray", which needs ray'):
        check_cells(cells(tmp_path, simulation={"engine": "ray"}), CPU)


def test_weights_and_device_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(ModelInvalid, match=r"the run's weights file x.safetensors is not here"):
        check_cells(cells(tmp_path, model={"weights": "nowhere/x.safetensors"}), CPU)
    with pytest.raises(ModelInvalid, match="--weights typo does not exist"):
        fedpeft.study(
            study_file(tmp_path),
            pets(tmp_path / "pets"),
            tmp_path / "out",
            weights="typo",
            device="cpu",
            override={"model.weights": "hub"},
        )
    with pytest.raises(SettingsInvalid, match="there is no device 'gpu'"):
        check_cells(cells(tmp_path), Machine("gpu"))


def test_rounds_that_make_no_versions_are_refused(tmp_path):
    with pytest.raises(ConfigInvalid, match=r"method=head, seed=0: rounds.policy is 'relayed'"):
        check_cells(cells(tmp_path, rounds={"policy": "relayed"}, aggregation={"exact_sum": True}), CPU)


@pytest.mark.parametrize("rows", [1, 30])
def test_rows_without_a_label_are_refused(tmp_path, rows):
    found = cells(tmp_path)
    relabelled(tmp_path / "pets" / "train.parquet", rows)
    with pytest.raises(DataInvalid, match=r"method=head, seed=0: client .*: class .* is not among the run's"):
        check_cells(found, CPU)


def test_rows_that_no_client_has_may_have_any_label(tmp_path):
    found = cells(tmp_path, simulation={"examples": 10})
    drawn = {row for cell in found for row in drawn_by(cell)}
    train = tmp_path / "pets" / "train.parquet"
    relabelled(train, min(drawn))
    assert min(drawn) > 0
    check_cells(found, CPU)


def drawn_by(cell: Cell) -> list[int]:
    """Returns the rows that the clients of a cell have."""
    from fedpeft.simulation.clients import division_of

    split = division_of(cell.config.simulation).of(open_source(cell.train), cell.seed)
    return [int(row) for part in split.parts for row in part]


def test_clients_that_are_folders_are_opened_each(tmp_path):
    parts = tmp_path / "parts"
    write_parts(pets(tmp_path / "pets") / "train.parquet", iid(30, 3, 0), parts)
    found = cells(tmp_path, data=parts)
    check_cells(found, CPU)
    broken = sorted(parts.iterdir())[1]
    (file,) = broken.glob("*.parquet")
    relabelled(file, 1)
    with pytest.raises(DataInvalid, match=f"method=head, seed=0: client {broken.name}: class .* is not among the run"):
        check_cells(found, CPU)


def test_held_out_data_that_cannot_be_used_are_refused(tmp_path):
    found = cells(tmp_path, simulation={"held_out": 20})
    with pytest.raises(DataInvalid, match=r"evaluation data .*test.parquet: there are 9 rows, fewer than the 20"):
        check_cells(found, CPU)
    found = cells(tmp_path)
    relabelled(found[0].test, 2)
    with pytest.raises(DataInvalid, match=r"seed=0: evaluation data .*test.parquet: class .* is not among the run's"):
        check_cells(found, CPU)
    found[0].test.write_bytes(b"no parquet")
    with pytest.raises(FedpeftError, match=r"seed=0: evaluation data .*test.parquet"):
        check_cells(found, CPU)


def test_clients_of_another_task_are_folders_until_the_run_says_how_one_data_set_is_divided(tmp_path):
    for place in (tmp_path, tmp_path / "north", tmp_path / "south"):
        place.mkdir(exist_ok=True)
        (place / "examples.txt").write_text("1 0 0\n" * (4 if place == tmp_path else 2))
    settings = (None, {"held_out": 3}, {"clients": 3}, {"clients": 2})
    found = [
        Cell(
            {"k": str(k)},
            run_file(rounds={"clients": 2}, **({"simulation": said} if said else {})),
            "d",
            tmp_path,
            None,
        )
        for k, said in enumerate(settings)
    ]
    with looked_up_anew(tasks):
        tasks.register("quadratic")(Quadratic)
        for cells in (found, found[::-1]):
            check_cells(cells, CPU)
            divisions = Divisions()
            sizes = {cell.points["k"]: sorted(divisions.of(cell).values()) for cell in cells}
            assert sizes == {"0": [2, 2], "1": [2, 2], "2": [1, 1, 2], "3": [2, 2]}
            assert [bool(divisions.folders(cell)) for cell in found] == [True, True, False, False]
        (tmp_path / "south" / "examples.txt").unlink()
        check_cells(found[2:], CPU)


def test_weights_that_no_cell_would_use_are_refused(tmp_path):
    found, unused = cells(tmp_path), Machine("cpu", weights=tmp_path / "w.safetensors")
    with pytest.raises(SettingsInvalid, match=r"w\.safetensors would not be used: every cell says model\.weights"):
        check_cells(found, unused)
