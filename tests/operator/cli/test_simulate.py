"""fedpeft simulate as people run it: what it prints, how it ends, what is left."""

import json
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from fedpeft.data import partitions
from fedpeft.data.partition_writer import write_parts
from fedpeft.data.sources.opening import open_source
from fedpeft_operator.app import main
from fedpeft_operator.cli.simulation import progress

from ...data.test_sources import NAMES, png, table, write
from ...simulation.simulated_runs import failing

RUN_FILE = """
name = "tiny"
[model]
name = "vit_tiny_patch16_224"
weights = "none"
image_size = 32
depth = 1
classes = ["cat", "dog", "emu"]
[peft]
method = "head"
[rounds]
count = 2
clients = 2
[training]
learning_rate = 0.5
[simulation]
clients = 3
"""


def test_the_command_prints_the_report_alone_or_lines_for_people(tmp_path, capfd):
    threads = torch.get_num_threads()
    whole = write(tmp_path / "whole.parquet", table(30))
    (tmp_path / "run.toml").write_text(RUN_FILE)
    command = ["simulate", str(tmp_path / "run.toml"), "--data", str(whole), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as ended:
        main([*command, "--eval", str(whole), "--device", "cpu", "--threads", str(threads), "--json"])
    assert ended.value.code == 0
    said = capfd.readouterr()
    assert json.loads(said.out) == json.loads((tmp_path / "out" / "report.json").read_text())
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 0
    said = capfd.readouterr()
    assert "'tiny' is completed: head, 579 parameters" in said.out
    assert "3 clients (iid): 10 to 10 rows" in said.out
    assert re.search(r"^ +1 +2 +- +[\d.]+ +4\.5 KiB +4\.5 KiB +", said.out, re.M)
    assert re.search(r"^round 2 of 2, 2 updates, training loss [\d.]+, [\d.]+ s$", said.err, re.M)


def test_one_s_own_folder_of_images_brings_its_classes_and_the_start_says_what_is_done(tmp_path, capfd):
    for name in ("Kreis", "Quadrat"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for k in range(6):
            (tmp_path / "photos" / name / f"{k}.png").write_bytes(png(k))
    run_file = RUN_FILE.replace('classes = ["cat", "dog", "emu"]', "").replace("[simulation]\nclients = 3\n", "")
    (tmp_path / "run.toml").write_text(run_file)
    photos, out = tmp_path / "photos", tmp_path / "out"
    command = ["simulate", str(tmp_path / "run.toml"), "--data", str(photos), "--out", str(out)]
    with pytest.raises(SystemExit) as ended:
        main([*command, "--set", "simulation.clients=3", "--device", "cpu"])
    assert ended.value.code == 0
    lines = capfd.readouterr().err.splitlines()
    assert lines[:2] == [
        f"tiny: head on vit_tiny_patch16_224, 2 classes, 2 rounds of 2 clients; loading PyTorch and {photos} ...",
        "12 rows divided among 3 clients (iid); building the model, random weights, on cpu ...",
    ]
    assert json.loads((out / "report.json").read_text())["config"]["model"]["classes"] == ["Kreis", "Quadrat"]
    write_parts(photos, partitions.iid(12, 2, 0), tmp_path / "sites")
    with pytest.raises(SystemExit) as ended:
        main([*command[:3], str(tmp_path / "sites"), "--out", str(tmp_path / "again"), "--device", "cpu"])
    assert ended.value.code == 0
    assert capfd.readouterr().err.splitlines()[1].startswith("2 clients; building the model")


def without_classes(folder):
    """Writes the run file without its classes."""
    path = folder / "run.toml"
    path.write_text(RUN_FILE.replace('classes = ["cat", "dog", "emu"]', ""))
    return path


def refused(capfd, *arguments):
    """Returns the last line of a command that does not succeed."""
    with pytest.raises(SystemExit) as ended:
        main(["simulate", *map(str, arguments), "--device", "cpu"])
    assert ended.value.code not in (0, None)
    return capfd.readouterr().err.splitlines()[-1]


def test_modules_that_are_named_are_imported_first(tmp_path, capfd):
    (tmp_path / "run.toml").write_text(RUN_FILE)
    command = [tmp_path / "run.toml", "--data", tmp_path / "none", "--out", tmp_path / "out"]
    said = refused(capfd, *command, "--import", "no_such_module")
    assert said == "fedpeft: --import no_such_module: ModuleNotFoundError: No module named 'no_such_module'"


def test_results_do_not_lie_in_the_data(tmp_path, capfd):
    (tmp_path / "run.toml").write_text(RUN_FILE)
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    (tmp_path / "photos" / "cat" / "0.png").write_bytes(png(0))
    out = tmp_path / "photos" / "out"
    said = refused(capfd, tmp_path / "run.toml", "--data", tmp_path / "photos", "--out", out)
    assert said.endswith("photos, and would be read as data: name a folder elsewhere")
    assert not out.exists()


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("peft.method=lroa", "there is no PEFT method 'lroa'"),
        ("model.depth=90", "model.depth: 90 is more than the 12 blocks of vit_tiny_patch16_224"),
        ("simulation.engine=fast", "there is no engine 'fast'"),
        ("rounds.policy=relayed", "rounds.policy"),
    ],
)
def test_a_run_that_cannot_work_is_refused_before_its_data_are_read(tmp_path, capfd, setting, said):
    (tmp_path / "run.toml").write_text(RUN_FILE)
    absent = tmp_path / "data-that-is-not-there"
    assert said in refused(capfd, tmp_path / "run.toml", "--data", absent, "--out", tmp_path / "out", "--set", setting)


def test_what_is_noticed_in_the_data_does_not_stand_before_the_report(tmp_path, capfd):
    for label in ("cat", "dog"):
        for site in ("north", "south"):
            (tmp_path / "photos" / label / site).mkdir(parents=True)
            for k in range(3):
                (tmp_path / "photos" / label / site / f"{k}.png").write_bytes(png(k))
    arguments = ["--data", str(tmp_path / "photos"), "--out", str(tmp_path / "out"), "--device", "cpu", "--json"]
    with pytest.raises(SystemExit) as ended:
        main(["simulate", str(without_classes(tmp_path)), *arguments])
    said = capfd.readouterr()
    assert ended.value.code == 0
    assert json.loads(said.out)["state"] == "completed"
    assert "hold folders" in said.err


@pytest.mark.parametrize(("number", "kind"), [(-1, pa.int64()), (255, pa.uint8())])
def test_rows_whose_number_has_no_name_are_no_class_of_the_data(tmp_path, capfd, number, kind):
    labels = pa.array([number if k in (4, 9) else k % 3 for k in range(30)], kind)
    file, data = without_classes(tmp_path), write(tmp_path / "d.parquet", table(30).set_column(1, "label", labels))
    command = [file, "--data", data, "--out", tmp_path / "out"]
    assert refused(capfd, *command).endswith(
        f"class '{number}' (1 row) is not among the run's; the run's classes are cat, dog, emu; a label map can "
        f'rename it or leave its rows out ("{number}" = "")'
    )
    for renamed, classes in (("", ["cat", "dog", "emu"]), ("fox", ["cat", "dog", "emu", "fox"])):
        (tmp_path / "map.toml").write_text(f'"{number}" = "{renamed}"')
        with pytest.raises(SystemExit) as ended:
            main(["simulate", *map(str, command), "--label-map", str(tmp_path / "map.toml"), "--device", "cpu"])
        assert ended.value.code == 0, capfd.readouterr().err
        assert json.loads((tmp_path / "out" / "report.json").read_text())["config"]["model"]["classes"] == classes


def test_classes_of_the_data_that_no_run_can_have_are_faults_of_the_data(tmp_path, capfd):
    file, photos = without_classes(tmp_path), tmp_path / "photos"
    (photos / "Kreis").mkdir(parents=True)
    (photos / "Kreis" / "0.png").write_bytes(png(0))
    command = [file, "--data", photos, "--out", tmp_path / "out"]
    assert refused(capfd, *command) == (
        f"fedpeft: {photos} has 1 class, 'Kreis'; a run needs at least 2: give other data, or name all classes of "
        "the run in its file's model.classes"
    )
    (photos / "Qua\x1b[31mdrat").mkdir()
    (photos / "Qua\x1b[31mdrat" / "1.png").write_bytes(png(1))
    assert refused(capfd, *command) == (
        f"fedpeft: {photos}: class 'Qua\\x1b[31mdrat' is none that a run can have: its name holds the control "
        "character '\\x1b'; a label map can rename it or leave its rows out"
    )
    labels = pa.array(["" if k == 4 else NAMES[k % 3] for k in range(30)])
    data = write(tmp_path / "d.parquet", table(30, names=None).set_column(1, "label", labels))
    assert refused(capfd, file, "--data", data, "--out", tmp_path / "out") == (
        f"fedpeft: {data}: class '' is none that a run can have: its name is empty; a label map can rename it or "
        "leave its rows out"
    )


def test_tracked_rounds_are_those_of_the_report_also_when_it_goes_on(tmp_path, capfd, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    whole = write(tmp_path / "whole.parquet", table(30))
    (tmp_path / "run.toml").write_text(RUN_FILE)
    command = ["simulate", str(tmp_path / "run.toml"), "--data", str(whole), "--out", str(tmp_path / "out")]
    with monkeypatch.context() as broken:

        def stop(progress, row):
            raise KeyboardInterrupt

        broken.setattr(progress.Progress, "committed", stop)
        with pytest.raises(SystemExit) as ended:
            main([*command, "--track", "tensorboard"])
        assert ended.value.code == 130
    with pytest.raises(SystemExit) as ended:
        main([*command, "--track", "tensorboard", "--json"])
    assert ended.value.code == 0
    rounds = json.loads(capfd.readouterr().out)["rounds"]
    (folder,) = (tmp_path / "out" / "tensorboard").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    assert [e.step for e in events.Scalars("train_loss")] == [1, 2]
    assert [e.value for e in events.Scalars("train_loss")] == pytest.approx(
        [r["metrics"]["train_loss"] for r in rounds]
    )
    assert [e.value for e in events.Scalars("seconds")] == pytest.approx([r["seconds"] for r in rounds])


def test_a_long_round_says_how_far_it_is(tmp_path, capfd, monkeypatch):
    whole = write(tmp_path / "whole.parquet", table(30))
    (tmp_path / "run.toml").write_text(RUN_FILE.replace("count = 2", "count = 1"))
    monkeypatch.setattr(progress, "EVERY_S", 0.0)
    with pytest.raises(SystemExit):
        main(["simulate", str(tmp_path / "run.toml"), "--data", str(whole), "--out", str(tmp_path / "out")])
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("round")]
    assert said[:2] == ["round 1 of 1: 1 of 2 clients had their turn", "round 1 of 1: 2 of 2 clients had their turn"]
    assert said[2].startswith("round 1 of 1, 2 updates")


def workers_of(pid):
    """Returns the worker processes that a simulation has started."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == pid and b"fedpeft.simulation.worker" in (folder / "cmdline").read_bytes():
                found.append(folder)
    return found


@pytest.mark.usefixtures("preloaded")
@pytest.mark.parametrize("engine", ["inprocess", "processes"])
def test_a_second_one_in_the_folder_is_refused_and_ctrl_c_says_what_is_left(tmp_path, capfd, engine):
    whole = write(tmp_path / "whole.parquet", table(30))
    workers = "" if engine == "inprocess" else "workers = 2\n"
    run_file = RUN_FILE.replace("count = 2", "count = 100_000") + f'engine = "{engine}"\n{workers}'
    (tmp_path / "run.toml").write_text(run_file)
    asked = ("simulate", str(tmp_path / "run.toml"), "--data", str(whole), "--out", str(tmp_path / "out"))
    begin = "from fedpeft_operator.app import main; main()"  # not by -m: its workers may be forks, it is none
    command = [sys.executable, "-c", begin, *asked, "--device", "cpu", "--threads", "1"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert next(line for line in process.stderr if line.startswith("round 1 of 100000, 2 updates"))
        with pytest.raises(SystemExit) as refused:
            main([*asked, "--device", "cpu"])
        workers = workers_of(process.pid)
        assert len(workers) == (2 if engine == "processes" else 0)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        _, err = process.communicate(timeout=60)
    assert refused.value.code == 1
    assert capfd.readouterr().err.endswith(
        f"fedpeft: {tmp_path / 'out'} is in use by another simulation (process {process.pid}); stop it first, or name "
        "another folder\n"
    )
    assert process.returncode == 130
    assert re.search(
        r"^fedpeft: interrupted after \d+ of 100,000 rounds, whose results are in .*/out; running the command again "
        r"goes on from there$",
        err,
        re.M,
    )
    assert "Traceback" not in err
    assert not any(folder.exists() for folder in workers)
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left == {"adapter.safetensors", "records.jsonl", "unfinished"}


def test_ctrl_c_counts_the_rounds_of_before(tmp_path, capfd, monkeypatch):
    whole = write(tmp_path / "whole.parquet", table(30))
    (tmp_path / "run.toml").write_text(RUN_FILE)
    command = ["simulate", str(tmp_path / "run.toml"), "--data", str(whole), "--out", str(tmp_path / "out")]
    committed = progress.Progress.committed

    def interrupted(shown, *of_it):
        if len(of_it) == 1:
            committed(shown, *of_it)
        raise KeyboardInterrupt

    for event in ("committed", "worked"):  # once after the first round, then within the second
        monkeypatch.setattr(progress.Progress, event, interrupted)
        with pytest.raises(SystemExit) as ended:
            main([*command, "--device", "cpu"])
        assert ended.value.code == 130
        assert "fedpeft: interrupted after 1 of 2 rounds, whose results" in capfd.readouterr().err


def test_the_command_ends_with_5_where_the_run_is_paused(tmp_path, capfd, monkeypatch):
    whole = write(tmp_path / "whole.parquet", table(30))
    (tmp_path / "run.toml").write_text(RUN_FILE)
    failing(monkeypatch, {"client-0", "client-1", "client-2"})
    with pytest.raises(SystemExit) as ended:
        main(["simulate", str(tmp_path / "run.toml"), "--data", str(whole), "--out", str(tmp_path / "out")])
    assert ended.value.code == 5
    said = capfd.readouterr()
    assert "the run is paused: round 1 has 0 of the 1 update it needs" in said.err
    assert "'tiny' is paused" in said.out
    assert "ticket is given up" in said.err
    assert "ticket is given up" not in said.out


def test_files_that_are_not_read_are_counted_by_reason_for_each_client(tmp_path, capfd):
    for label in ("cat", "dog", "emu"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        (tmp_path / "photos" / label / "scan.dcm").write_bytes(b"x")
        for number in range(2):
            (tmp_path / "photos" / label / f"{number}.png").write_bytes(png(number))
    whole = open_source(tmp_path / "photos")
    write_parts(tmp_path / "photos", partitions.iid(len(whole), 2, 0), tmp_path / "sites", index=True)
    (tmp_path / "run.toml").write_text(RUN_FILE.replace("count = 2", "count = 1").partition("[simulation]")[0])
    with pytest.raises(SystemExit) as ended:
        main(["simulate", str(tmp_path / "run.toml"), "--data", str(tmp_path / "sites"), "--out", str(tmp_path / "o")])
    assert ended.value.code == 0
    lines = [line for line in capfd.readouterr().err.splitlines() if "skipped, with suffix .dcm: 3 (cat/scan" in line]
    assert all(any(client in line for line in lines) for client in ("client-0", "client-1"))


def test_fields_of_the_run_file_are_set_for_once(tmp_path, capfd):
    whole = write(tmp_path / "whole.parquet", table(30))
    (tmp_path / "run.toml").write_text(RUN_FILE)
    command = ["simulate", str(tmp_path / "run.toml"), "--data", str(whole), "--out", str(tmp_path / "out"), "--json"]
    with pytest.raises(SystemExit) as ended:
        main([*command, "--set", "rounds.count=1", "--set", "peft.method=bias", "--seed", "5"])
    assert ended.value.code == 0
    report = json.loads(capfd.readouterr().out)
    assert (report["method"], len(report["rounds"]), report["config"]["rounds"]["seed"]) == ("bias", 1, "5")
    with pytest.raises(SystemExit) as ended:
        main([*command, "--set", "rounds.counts=1"])
    assert ended.value.code == 2
    assert "rounds.counts: is not a known key" in capfd.readouterr().err
