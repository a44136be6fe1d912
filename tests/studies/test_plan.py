"""The plan of a study scales what one round took by rounds, clients and examples, however the data are given."""

from __future__ import annotations

import pytest

from fedpeft.data.partition_writer import write_parts
from fedpeft.data.partitions import iid
from fedpeft.data.sources.opening import open_source
from fedpeft.studies import plan
from fedpeft.studies.cells import Machine, cells_of
from fedpeft.studies.study_file import load_study

from .study_texts import pets, study_file


@pytest.fixture
def measured(monkeypatch):
    monkeypatch.setattr(plan, "_measured", lambda cell, machine: plan.Kind(3.0, 1.0, 0.5, 100, 200))


def test_time_and_bytes_are_those_of_all_rounds(tmp_path, measured):
    cells = cells_of(load_study(study_file(tmp_path)), {"pets": pets(tmp_path / "pets")})
    planned = plan.plan_of(cells, None, Machine())
    assert {each.seconds for each in planned} == {3 + 2 * 2 * 10 * 1.0 + 3 * 0.5}, "30 examples of 3 clients"
    assert {(each.bytes_up, each.bytes_down) for each in planned} == {(400, 800)}


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
