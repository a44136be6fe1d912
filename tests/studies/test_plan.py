"""The plan of a study scales what one round took by rounds, clients and examples, however the data are given."""

from __future__ import annotations

import json

import pytest
from google.protobuf import json_format

from fedpeft.data.division import Division
from fedpeft.data.partition_writer import write_parts
from fedpeft.data.partitions import iid
from fedpeft.data.sources.opening import open_source
from fedpeft.models.tasks.image_classification import ImageClassification
from fedpeft.rpc.wire import config_to_proto
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


@pytest.mark.parametrize(
    ("rounds", "others", "tickets", "trainings"),
    [
        ({"over_selection": 0.5}, {}, 2 * 3, 2 * 3),
        ({"over_selection": 0.5}, {"codec": {"error_feedback": False}}, 2 * 3, 2 * 2),
        ({"over_selection": 0.5}, {"codec": {"error_feedback": False}, "simulation": {"engine": "processes"}}, 6, 6),
        ({"clients": 4}, {}, 2 * 3, 2 * 3),
        ({"policy": "buffered", "concurrency": 3}, {}, 2 * 2 + 2, 2 * 2 + 2),
        ({"policy": "buffered", "concurrency": 3}, {"codec": {"error_feedback": False}}, 2 * 2 + 2, 2 * 2),
    ],
)
def test_clients_beyond_those_that_count_take_bytes_and_time(tmp_path, measured, rounds, others, tickets, trainings):
    study, only = load_study(study_file(tmp_path)), {"method": ["head"]}
    cells = cells_of(study, {"pets": pets(tmp_path / "pets")}, override={"rounds": rounds, **others}, only=only)
    planned = plan.plan_of(cells, None, Machine())[0]
    assert planned.bytes_down == tickets * 200
    assert planned.bytes_up == (2 * 3 if rounds.get("clients") == 4 else 2 * 2) * 100
    assert planned.seconds == 3 + trainings * 10 * 1.0 + 3 * 0.5


@pytest.mark.parametrize(
    ("rounds", "training"),
    [
        ({"count": 9}, {"schedule": "step", "schedule_drops": 3}),
        ({}, {"warmup_rounds": 1, "schedule": "cosine", "final_factor": 0.1}),
        ({"policy": "buffered", "concurrency": 3}, {}),
    ],
)
def test_the_round_that_is_timed_is_one_of_any_run(tmp_path, rounds, training):
    study, only = load_study(study_file(tmp_path)), {"method": ["head"]}
    override = {"rounds": rounds, "training": training}
    places = {"pets": pets(tmp_path / "pets")}
    timed = plan._measured(cells_of(study, places, override=override, only=only)[0], Machine("cpu"))
    assert timed.bytes_down == timed.bytes_up, "of one client"


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


def test_a_data_set_is_opened_once_and_divided_once_for_cells_that_share_a_division(tmp_path, measured, monkeypatch):
    opened, divided = [], []
    read, of = ImageClassification.read, Division.of
    monkeypatch.setattr(ImageClassification, "read", lambda task, path: opened.append(path) or read(task, path))
    monkeypatch.setattr(Division, "of", lambda rule, data, seed: divided.append(seed) or of(rule, data, seed))
    cells = cells_of(load_study(study_file(tmp_path)), {"pets": pets(tmp_path / "pets")})
    assert len(cells) == 4
    plan.plan_of(cells, None, Machine())
    assert len(opened) == 1
    assert divided == [0, 1]


def test_a_cell_with_a_damaged_report_takes_time_again(tmp_path, measured):
    (cell, *_) = cells_of(load_study(study_file(tmp_path)), {"pets": pets(tmp_path / "pets")})
    machine = Machine("cpu")
    report = tmp_path / "out" / "cells" / cell.key(machine) / "report.json"
    report.parent.mkdir(parents=True)
    said = json_format.MessageToDict(config_to_proto(cell.config), preserving_proto_field_name=True)
    other = said | {"training": {"learning_rate": 0.5}}
    whole, of_another = (json.dumps({"rounds": [], "config": config}) for config in (said, other))
    odd = json.dumps({"rounds": [], "config": {"model": 3}})
    for text, done in ((whole, True), (of_another, False), (odd, False), ('{"rounds": [', False), ("{}", False)):
        report.write_text(text)
        (planned,) = plan.plan_of([cell], tmp_path / "out", machine)
        assert planned.done == done
