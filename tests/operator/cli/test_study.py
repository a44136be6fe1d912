"""fedpeft study as people run it: what it prints, how it ends, what is left."""

from __future__ import annotations

import json
import re

import pytest

from fedpeft.tracking.mlflow import MLflow
from fedpeft_operator.app import main

from ...data.hub_cache import HubCache
from ...data.test_sources import table
from ...studies.study_texts import STUDY, pets, study_file

pytestmark = pytest.mark.xdist_group("studies")  # their cells are forks of one process, which imports torch once


def command(capfd, *arguments):
    with pytest.raises(SystemExit) as ended:
        main(["study", *map(str, arguments)])
    said = capfd.readouterr()
    return ended.value.code, said.out, said.err


@pytest.fixture
def given(tmp_path):
    return [study_file(tmp_path), "--data", pets(tmp_path / "pets"), "--device", "cpu", "--scale", "one"]


def test_a_place_where_no_results_can_lie_is_refused_first(given, tmp_path, capfd):
    (tmp_path / "taken").touch()
    code, said, err = command(capfd, "run", *given, "--out", tmp_path / "taken" / "out")
    assert (code, said) == (2, "") and "taken is not a folder; name another place" in err and "checking" not in err


def test_a_study_is_planned_run_and_reported(given, tmp_path, capfd, monkeypatch):
    out = tmp_path / "out"
    code, said, err = command(capfd, "plan", *given, "--jobs", 2)
    assert code == 0 and "timing method=head, seed=7 ..." in err
    assert re.search(r"^METHOD +CELLS +UP +DOWN +A CELL$", said, re.M)
    assert "'tiny': 2 cells; " in said and "with 2 cells at once" in said
    code, said, err = command(capfd, "run", *given, "--out", out, "--jobs", 2, "--track", "tensorboard")
    assert code == 0 and "2 cells; 2 at once" in err
    tracked = sorted(folder.name.partition("-")[0] for folder in (out / "tensorboard").iterdir())
    assert tracked == ["tiny_method_head_seed_7", "tiny_method_lora_2_seed_7"]
    assert said == f"tiny: 2 cells of 2 with results\nreport: {out / 'report' / 'report.html'}\n"
    assert len(re.findall(r"^method=.*, seed=7: accuracy \d+\.\d %, \d+ s", err, re.M)) == 2
    code, said, _ = command(capfd, "plan", *given, "--out", out, "--json")
    planned = json.loads(said)
    assert planned["cells_to_run"] == 0 and planned["seconds"] == 0.0
    reports = [json.loads(path.read_text()) for path in (out / "cells").glob("*/report.json")]
    moved = {row["method"]: row["rounds"][0]["payload_bytes_up"] for row in reports}
    expected = {row["points"]["method"]: row["payload_bytes_up"] for row in planned["cells"]}
    assert [moved["head"], moved["lora"]] == [expected["head"], expected["lora 2"]], "dense encodings: exact"
    with monkeypatch.context() as broken:
        broken.setattr(MLflow, "begin", lambda *_: 1 / 0)
        code, said, err = command(capfd, "run", *given, "--out", out, "--track", "mlflow")
    assert code == 0 and "2 cells, 2 cells with results already" in err
    assert "tracker failed" in err and "fedpeft: mlflow misses 4 rounds; the same command writes them" in err
    assert said == f"tiny: 2 cells of 2 with results\nreport: {out / 'report' / 'report.html'}\n"
    code, said, _ = command(capfd, "report", out, "--out", tmp_path / "elsewhere")
    assert code == 0 and str(tmp_path / "elsewhere" / "report.html") in said


def test_results_are_compared_side_by_side(given, tmp_path, capfd):
    out = tmp_path / "out"
    assert command(capfd, "run", *given, "--out", out, "--only", "method=head")[0] == 0
    (simulated,) = (out / "cells").iterdir()
    with pytest.raises(SystemExit) as ended:
        main(["compare", str(out), str(simulated), "--out", str(tmp_path / "report")])
    said = capfd.readouterr()
    assert ended.value.code == 0 and str(tmp_path / "report" / "report.html") in said.err
    rows = [line.split() for line in said.out.splitlines()]
    assert rows[0][0] == "RUN" and rows[1][:2] == ["out,", "head"] and rows[2][0] == simulated.name
    assert rows[1][2:] == rows[2][1:], "the study's only cell is that simulation"
    with pytest.raises(SystemExit) as ended:
        main(["compare", str(tmp_path / "no such folder")])
    assert ended.value.code == 1 and "is neither the folder of a simulation" in capfd.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main(["--server", "127.0.0.1:1", "compare", "mistyped"])
    said = "there is no folder or file mistyped, and as the id of a run: no FedPEFT server answers at 127.0.0.1:1"
    assert ended.value.code == 3 and said in capfd.readouterr().err


def test_data_on_the_hub_are_trained_and_scored_on_by_their_name(tmp_path, capfd, monkeypatch):
    hub, out = HubCache(tmp_path / "hub", monkeypatch), tmp_path / "out"
    for split, rows in (("train", 30), ("test", 9)):
        hub.put("uoft-cs/cifar10", f"plain_text/{split}-00000-of-00001.parquet", table(rows, image="img"))
    given = [study_file(tmp_path), "--data", "pets=hub:cifar10", "--scale", "one", "--only", "method=head"]
    code, said, err = command(capfd, "run", *given, "--out", out, "--device", "cpu")
    assert code == 0 and "tiny: 1 cell of 1 with results" in said
    assert re.search(r"^method=head, seed=7: accuracy \d+\.\d %", err, re.M)


@pytest.mark.parametrize("empty", ["pets=", "="])
def test_an_empty_place_of_data_is_not_the_folder_here(tmp_path, capfd, empty):
    code, _, err = command(capfd, "run", study_file(tmp_path), "--data", empty, "--out", tmp_path / "out")
    assert code == 2
    assert err.splitlines()[-1] == f"fedpeft: --data {empty} is empty: a variable that is not set, perhaps"


def test_cells_without_classes_have_those_of_their_training_data(tmp_path, capfd):
    run = STUDY.partition("[run.model]")[2].partition("[data.pets")[0].replace("[run.", "[")
    (tmp_path / "run.toml").write_text("[model]" + run)
    out, data = tmp_path / "out", pets(tmp_path / "pets")
    code, said, err = command(capfd, "run", tmp_path / "run.toml", "--data", data, "--out", out, "--device", "cpu")
    assert (code, said.partition("\n")[0]) == (0, "run: 1 cell of 1 with results"), err
    (report,) = (out / "cells").glob("*/report.json")
    assert json.loads(report.read_text())["config"]["model"]["classes"] == ["cat", "dog", "emu"]


def test_a_study_with_a_failed_cell_ends_with_5_and_names_it(given, tmp_path, capfd):
    (tmp_path / "broken").write_bytes(b"no weights")
    grid = ["--grid", f"model.weights=none,{tmp_path / 'broken'}", "--only", "method=head"]
    code, said, err = command(capfd, "run", *given, *grid, "--out", tmp_path / "out")
    assert code == 5 and "tiny: 1 cell of 2 with results" in said
    assert re.search(r"^fedpeft: method=head, model.weights=.*-broken, seed=7: .*broken", err, re.M)


@pytest.mark.parametrize(
    ("flags", "fault"),
    [
        (["--scale", "huge"], "has no scale 'huge'; there are: one"),
        (["--data", "cats=pets"], "there is no data set 'cats'; those of this study: pets"),
        (["--only", "method"], "give AXIS=POINT"),
        (["--only", "method=head", "--only", "method=bias"], "axis 'method' has no point 'bias'"),
        (["--data", "elsewhere"], "is given for this data set too"),
        (["--grid", "rounds.seed=1,2"], "give seeds = [...], or --seed"),
        (["--set", "rounds.count"], "is no setting; give KEY=VALUE"),
        (["--set", "rounds.counts=3"], "rounds.counts: is not a known key"),
        (["--grid", "rounds.count"], "is no grid; give KEY=VALUE,VALUE"),
        (["--weights", "absent"], "there is no such file or folder"),
    ],
)
def test_a_wrong_flag_is_named_before_anything_runs(given, tmp_path, capfd, flags, fault):
    code, _, err = command(capfd, "run", *given, *flags, "--out", tmp_path / "out")
    assert code == 2 and fault in err
    assert not (tmp_path / "out").exists()


def test_a_study_file_that_is_none_is_named_with_its_line(tmp_path, capfd):
    file = study_file(tmp_path, STUDY.replace("seeds = [0, 1]", "seeds = []"))
    code, _, err = command(capfd, "run", file, "--data", pets(tmp_path / "pets"), "--out", tmp_path / "out")
    assert code == 2 and re.search(r"study.toml:\d+: seeds: ", err)
