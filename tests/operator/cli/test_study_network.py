"""fedpeft study run --over-network: a cell held by a server and agents has the bits, and the end, of the simulated."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

import fedpeft
from fedpeft.data.client_folders import clients_in
from fedpeft.data.partition_writer import write_parts
from fedpeft.data.partitions import iid
from fedpeft.errors import BlobCorrupt, TrainingFailed
from fedpeft.rounds import record
from fedpeft.studies.cells import Machine, cells_of
from fedpeft.studies.study_file import load_study
from fedpeft.v1 import operator_service_pb2 as pb
from fedpeft.v1 import run_pb2
from fedpeft_operator.app import main
from fedpeft_operator.cli.session import Session
from fedpeft_operator.cli.study.network import Federation, completed, reported

from ...studies.study_texts import STUDY, pets, study_file
from ..operator_double import Double, a_round, a_run, serving

RUN = "run-0123456789ab"
BUDGET = """
[run.privacy]
clip_norm = 1.0
mechanism = "central"
noise_multiplier = 1.0
target_epsilon = 3.0
delta = 0.01
"""


@pytest.mark.slow
@pytest.mark.e2e
def test_a_cell_has_the_same_bits_and_scores_over_the_network_as_simulated(tmp_path):
    text = STUDY.replace("clients = 3", 'clients = 3\nexamples = 24\nheld_out = 7\npartition = "shards"')
    command = ["study", "run", str(study_file(tmp_path, text)), "--data", str(pets(tmp_path / "pets"))]
    command += ["--device", "cpu", "--only", "method=lora 2", "--seed", "1", "--out", str(tmp_path / "out")]
    for flags in ([], ["--over-network"]):
        with pytest.raises(SystemExit) as ended:
            main([*command, *flags])
        assert ended.value.code == 0
    over, simulated = sorted(
        (tmp_path / "out" / "cells").iterdir(), key=lambda each: "over_network" not in (each / "cell.json").read_text()
    )
    assert "over_network" not in (simulated / "cell.json").read_text()
    tensors = [load_file(each / "adapter.safetensors") for each in (over, simulated)]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(np.array_equal(tensors[0][name], tensors[1][name]) for name in tensors[0])
    reports = [json.loads((each / "report.json").read_text()) for each in (over, simulated)]
    scores = [[row["metrics"]["accuracy"] for row in report["rounds"]] for report in reports]
    assert scores[0] == scores[1]
    assert reports[0]["partition"] == reports[1]["partition"]
    for row in reports[0]["rounds"]:
        assert row["wire_bytes_up"] > row["payload_bytes_up"] > 0
    assert not (over / "network").exists()
    records = (over / "records.jsonl").read_text().splitlines()
    assert [record.digest(each) for each in records] == [row["record_sha256"] for row in reports[0]["rounds"]]
    simulation = fedpeft.Simulation(over)
    simulation.adapter()
    damaged = bytearray((over / "adapter.safetensors").read_bytes())
    damaged[-100] ^= 1
    (over / "adapter.safetensors").write_bytes(damaged)
    with pytest.raises(BlobCorrupt):
        simulation.adapter()


@pytest.mark.parametrize("index", [False, True])
def test_clients_that_are_there_keep_their_data(tmp_path, index):
    data, parts = pets(tmp_path / "pets") / "train.parquet", tmp_path / "parts"
    write_parts(data, iid(30, 3, 0), parts, index=index)
    study = load_study(study_file(tmp_path))
    there, divided = (
        Federation(cells_of(study, {"pets": place})[0], Machine("cpu"), tmp_path / "cell").clients()
        for place in (parts, data)
    )
    assert there == ({name: data for name, data in clients_in(parts).items()}, None)
    assert len(there[0]) == 3
    assert sorted(divided[0].values()) == [
        tmp_path / "cell" / "network" / "clients" / name for name in sorted(divided[0])
    ]
    assert divided[1]["rows"] == 30


@pytest.mark.slow
@pytest.mark.e2e
def test_a_cell_whose_run_is_paused_fails_as_the_simulated_one_does(tmp_path, capfd):
    file = study_file(tmp_path, STUDY.replace("[data.pets", f"{BUDGET}\n[data.pets", 1))
    command = ["study", "run", str(file), "--data", str(pets(tmp_path / "pets")), "--device", "cpu"]
    command += ["--only", "method=head", "--seed", "1", "--out", str(tmp_path / "out")]
    said = []
    for flags in ([], ["--over-network"]):
        with pytest.raises(SystemExit) as ended:
            main([*command, *flags])
        assert ended.value.code == 5
        err = capfd.readouterr().err.splitlines()
        said.append(next(line for line in err if line.startswith("fedpeft: method=head, seed=1: ")))
    assert said[0] == said[1]
    assert "the run is paused after round 1: the privacy budget is spent" in said[0]


def evaluator(*, failed: str = "", backlog: int = 0) -> run_pb2.Scoring:
    versions = [run_pb2.FailedVersion(version=0, reason=failed)] if failed else []
    return run_pb2.Scoring(evaluator="evaluator", backlog=backlog, failed=versions)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (
            {"state": run_pb2.RUN_STATE_PAUSED, "reason": "round 2 has 1 of the 2 updates it needs", "version": 1},
            "the run is paused after round 1: round 2 has 1 of the 2 updates it needs",
        ),
        ({"state": run_pb2.RUN_STATE_STOPPED}, "the run is stopped after round 0: no reason given"),
        ({"declines": [run_pb2.Decline(client="noto", reasons=["one", "two"])]}, "noto declined the run: one; two"),
        ({"evaluators": [evaluator(failed="gone")]}, "evaluator could not score version 0: gone"),
    ],
)
async def test_a_run_that_would_wait_for_a_person_fails_its_cell(changes, why):
    with serving(Double()) as served:
        served.double.runs = {RUN: a_run()}
        served.double.script = [pb.WatchRunResponse(run=a_run()), pb.WatchRunResponse(run=a_run(**changes)), 60.0]
        with pytest.raises(TrainingFailed) as failed:
            await completed(Session(served.address, insecure=True), RUN, lambda version: None)
    assert failed.value.message == why


async def test_a_version_that_is_given_up_fails_the_cell_and_a_loss_alone_is_a_score():
    with serving(Double()) as served:
        done = {"state": run_pb2.RUN_STATE_COMPLETED, "version": 1, "initial_metrics": {"loss": 2.0}}
        served.double.runs, served.double.rounds = {RUN: a_run(**done)}, {RUN: [a_round(1)]}
        session = Session(served.address, insecure=True)
        assert len((await reported(session, RUN, scored=False))["rounds"]) == 1
        served.double.runs = {RUN: a_run(**done, evaluators=[evaluator(failed="the file is gone")])}
        with pytest.raises(TrainingFailed, match="evaluator could not score version 0: the file is gone"):
            await reported(session, RUN, scored=True)
        served.double.rounds[RUN][0].metrics["loss"] = 1.0
        assert (await reported(session, RUN, scored=True))["version"] == 1
