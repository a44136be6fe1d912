"""The plan of a study scales what one round took by rounds, clients and examples, however the data are given."""

from __future__ import annotations

import pytest

from fedpeft.data.partition_writer import write_parts
from fedpeft.data.partitions import iid
from fedpeft.data.sources.opening import open_source
from fedpeft.studies import plan
from fedpeft.studies.cells import Cell, Machine, cells_of
from fedpeft.studies.study_file import load_study

from .study_texts import STUDY, pets, study_file


@pytest.fixture
def measured(monkeypatch):
    monkeypatch.setattr(plan, "_measured", lambda cell, machine: plan.Kind(3.0, 1.0, 0.5, 100, 200))


def test_time_and_bytes_are_those_of_all_rounds(tmp_path, measured):
    cells = cells_of(load_study(study_file(tmp_path)), {"pets": pets(tmp_path / "pets")})
    planned = plan.plan_of(cells, None, Machine())
    assert {each.seconds for each in planned} == {3 + 2 * 2 * 10 * 1.0 + 3 * 0.5}, "30 examples of 3 clients"
    assert {(each.bytes_up, each.bytes_down) for each in planned} == {(400, 800)}


@pytest.mark.parametrize(("clients", "trained"), [(3, 5 * (8 + 2) / 2), (10, 5 * 3)])
def test_steps_take_the_time_of_their_batches_however_many_examples_a_client_has(tmp_path, measured, clients, trained):
    override = {"training": {"steps": 5, "batch_size": 8}, "simulation": {"clients": clients}}
    study = load_study(study_file(tmp_path))
    cells = cells_of(study, {"pets": pets(tmp_path / "pets")}, override=override, only={"method": ["head"]})
    (seconds,) = {each.seconds for each in plan.plan_of(cells, None, Machine())}
    assert seconds == 3 + 2 * 2 * trained + 3 * 0.5


def test_cells_are_of_one_kind_if_only_the_division_of_their_data_differs(tmp_path, measured):
    axes = """
[axes.engine.one]
simulation.engine = "inprocess"
[axes.engine.many]
simulation.engine = "batched"
[axes.scored.few]
simulation.held_out = 2
[axes.scored.all]
[axes.alpha.skewed]
simulation.partition = "dirichlet"
simulation.alpha = 0.5
[axes.alpha.even]
"""
    study = load_study(study_file(tmp_path, STUDY.replace("[scales.one]", f"{axes}\n[scales.one]", 1)))
    timed: list[Cell] = []
    only = {"method": ["head"]}
    cells = cells_of(study, {"pets": pets(tmp_path / "pets")}, only=only)
    plan.plan_of(cells, None, Machine(), timed.append)
    assert [(cell.points["engine"], cell.points["scored"]) for cell in timed] == [
        ("one", "few"),
        ("one", "all"),
        ("many", "few"),
        ("many", "all"),
    ]


def test_several_clients_are_timed_where_the_engine_trains_several_at_once(tmp_path, monkeypatch):
    trained, kind = [], plan._kind
    monkeypatch.setattr(
        plan,
        "_kind",
        lambda report, *others: trained.append(len(report["rounds"][0]["clients"])) or kind(report, *others),
    )
    study = load_study(study_file(tmp_path))
    data, engine = {"pets": pets(tmp_path / "pets")}, {"simulation": {"engine": "batched"}}
    one, several = (
        plan._measured(cells_of(study, data, only={"method": ["head"]}, override=override)[0], Machine("cpu"))
        for override in ({}, engine)
    )
    assert trained == [1, 2]
    assert (several.bytes_up, several.bytes_down) == (one.bytes_up, one.bytes_down)


def test_clients_that_are_folders_have_as_many_examples_as_lie_there(tmp_path, measured):
    data, parts = pets(tmp_path / "pets") / "train.parquet", tmp_path / "parts"
    write_parts(data, iid(len(open_source(data)), 5, 0), parts)
    cell = cells_of(load_study(study_file(tmp_path)), {"pets": parts})[0]
    (planned,) = plan.plan_of([cell], None, Machine())
    assert planned.seconds == 3 + 2 * 2 * 6 * 1.0


def test_the_data_are_divided_once_for_cells_that_share_a_division(tmp_path, measured, monkeypatch):
    divided = []
    real = plan.clients_of
    monkeypatch.setattr(plan, "clients_of", lambda path, config: divided.append(config) or real(path, config))
    cells = cells_of(load_study(study_file(tmp_path)), {"pets": pets(tmp_path / "pets")})
    assert len(cells) == 4
    plan.plan_of(cells, None, Machine())
    assert [config.rounds.seed for config in divided] == [0, 1]
