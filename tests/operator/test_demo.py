"""The demo: its processes, its report, and the whole of it with a model that is built on the spot."""

from __future__ import annotations

import asyncio
import fcntl
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from rich.console import Console
from safetensors.numpy import load_file

from fedpeft.api.following import RunSnapshot
from fedpeft.data.sources.opening import open_source
from fedpeft.errors import DataInvalid, LocalError, SettingsInvalid, StateInvalid
from fedpeft.v1 import run_pb2
from fedpeft_operator.cli.run import live
from fedpeft_operator.demo import federation, report
from fedpeft_operator.demo.division import _parted, divide
from fedpeft_operator.federation import process_group
from fedpeft_operator.federation.process_group import ProcessGroup, free_ports

from .operator_double import a_round, a_run

PROCESSES = {"building": 4, "committed": 7}
"""Processes that a demo has by then, at the least: the server, two clients, the evaluator; and a worker of each."""
SLEEPS = ["-c", "import time; print('up', flush=True); time.sleep(600)"]
DEAF = ["-c", "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"]
# Starts a process of its own, as a client does, and says which.
PARENT = [
    "-c",
    "import subprocess, sys, time\n"
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    "print(child.pid, flush=True); time.sleep(600)",
]


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up, "it did not come to pass"
        time.sleep(0.02)


async def said(log: Path) -> str:
    """Returns the output of a child, once it has written a line."""
    await asyncio.to_thread(until, lambda: log.exists() and log.read_text().endswith("\n"))
    return await asyncio.to_thread(log.read_text)


async def test_a_process_group_ends_its_children_and_theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_group, "GRACE_S", 0.5)
    async with ProcessGroup(tmp_path / "logs", {"SPOKEN": "1"}) as processes:
        pids = [processes.start(name, command).pid for name, command in (("a", SLEEPS), ("b", DEAF), ("c", PARENT))]
        for name in "ab":
            assert await said(tmp_path / "logs" / f"{name}.log") == "up\n"
        pids.append(int(await said(tmp_path / "logs" / "c.log")))
        processes.check()
        assert all(map(alive, pids))
    until(lambda: not any(map(alive, pids)), 5)


async def test_death_of_a_child_is_told_with_its_last_words(tmp_path: Path) -> None:
    async with ProcessGroup(tmp_path, {"WORDS": "last words"}) as processes:
        processes.start("alive", SLEEPS)
        dead = "import os; [print('line', k) for k in range(40)]; print(os.environ['WORDS']); raise SystemExit(3)"
        processes.start("noto", ["-c", dead])
        with pytest.raises(LocalError) as caught:
            await processes.watch()
    message = caught.value.message
    assert message.startswith(f"noto ended with exit code 3; the end of its log, {tmp_path / 'noto.log'}:\n")
    assert message.endswith("line 39\n  last words")
    assert "line 20" not in message


async def test_child_that_was_killed_is_told_by_its_signal(tmp_path: Path) -> None:
    async with ProcessGroup(tmp_path, {}) as processes:
        child = processes.start("noto", SLEEPS)
        os.kill(child.pid, signal.SIGKILL)
        with pytest.raises(LocalError, match=r"noto was ended by SIGKILL; .*\n  \(it is empty\)"):
            await processes.watch()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel ends orphans on Linux only")
def test_children_of_a_killed_process_end(tmp_path: Path) -> None:
    code = (
        "import asyncio, pathlib\n"
        "from fedpeft_operator.federation.process_group import ProcessGroup\n"
        "async def run_demo():\n"
        f"    async with ProcessGroup(pathlib.Path({str(tmp_path)!r}), {{}}) as processes:\n"
        f"        print(processes.start('a', {SLEEPS!r}).pid, flush=True)\n"
        "        await processes.watch()\n"
        "asyncio.run(run_demo())\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        pid = int(holder.stdout.readline())
        until((tmp_path / "a.log").read_text)
        holder.kill()
    until(lambda: not alive(pid), 5)


def test_free_ports_differ() -> None:
    assert len(set(free_ports(8))) == 8


def snapshot() -> RunSnapshot:
    run = a_run(version=3, state=run_pb2.RUN_STATE_COMPLETED, initial_metrics={"accuracy": 0.25, "loss": 2.0})
    return RunSnapshot(run, {n: a_round(n, accuracy=0.25 + n / 10) for n in (1, 2, 3)})


def test_report_sums_the_rounds() -> None:
    made = report.report_of(snapshot(), {"noto": 10, "twemoji": 20}, 61.23)
    assert [row["accuracy"] for row in made["rounds"]] == [0.35, 0.45, 0.55]
    assert made["rounds"][0]["four_bytes_a_parameter"] == 60 * 4 * 2
    assert made["totals"] == {
        "wire_bytes_up": 1800,
        "wire_bytes_down": 1860,
        "payload_bytes_up": 1440,
        "payload_bytes_down": 1440,
        "four_bytes_a_parameter": 1440,
        "full_bytes_each_way": 24_000_000,
        "full_over_wire_up": 13_333.3,
        "wire_up_over_payload_up": 1.25,
        "round_seconds": 13.5,
    }
    assert (made["accuracy"], made["chance"], made["seconds"]) == (0.55, 0.5, 61.2)
    assert report.summary(made) == [
        "accuracy on held-out images: from 25.0 % to 55.0 % in 3 rounds (chance is 50.0 %)",
        "sent up: 1.8 KiB on the wire, of it 1.4 KiB tensors; 4 bytes a parameter would be 1.4 KiB",
        "sent down: 1.8 KiB on the wire, of it 1.4 KiB tensors",
        "full fine-tuning would have sent 22.89 MiB each way, 13,333 times as much",
        "rounds took 14 s, all of it 61 s",
    ]


def test_summary_rounds_the_share_of_full_fine_tuning_once() -> None:
    """376.52 is 377; by way of the report's 376.5 it would be 376, beside the 377 of the watch."""
    made = report.report_of(snapshot(), {"noto": 10}, 61.23)
    made["totals"] |= {"wire_bytes_up": 1000, "full_bytes_each_way": 376_520, "full_over_wire_up": 376.5}
    assert "full fine-tuning would have sent 367.7 KiB each way, 377 times as much" in report.summary(made)


def test_picture_of_the_report(tmp_path: Path) -> None:
    made = report.report_of(snapshot(), {"noto": 10, "twemoji": 20}, 61.2)
    sent, accuracy = report.curve(made)
    assert accuracy == [0.25, 0.35, 0.45, 0.55]
    np.testing.assert_allclose(sent, [0, 1220 / 2**20, 2440 / 2**20, 3660 / 2**20])
    report.write_png(made, tmp_path / "accuracy.png")
    with Image.open(tmp_path / "accuracy.png") as image:
        assert image.size == (1200, 750)
        pixels = np.asarray(image.convert("RGB"))
    assert (pixels == (31, 119, 180)).all(-1).sum() > 200  # the curve, in matplotlib's blue


def test_live_view() -> None:
    running = RunSnapshot(a_run(version=2), {**snapshot().rounds, 3: a_round(3, committed=False)})
    console = Console(file=io.StringIO(), width=100, height=20)
    now = datetime(2026, 1, 1, 0, 1, 0, tzinfo=UTC)
    console.print(live.render(running, now, rows=1))
    assert [line.rstrip() for line in console.file.getvalue().splitlines()] == [
        "run-0123456789ab 'emoji': bias on vit_tiny, 60 of 1,000,000 parameters, 3 rounds of 2 clients",
        "round  clients  accuracy  train loss     up   down  full fine-tuning  seconds",
        "  ...",
        "    2        2    45.0 %       2.500  600 B  620 B          7.63 MiB      4.5",
        "    3      1/2                        300 B  310 B",
        "sent: up 1.2 KiB, down 1.2 KiB; full fine-tuning: 15.26 MiB each way",
        "round 3 is open, waiting for twemoji, 570 s left",
    ]


def experiment(folder: Path) -> Path:
    """A checkout with an emoji experiment of two vendors, two classes, and a model that needs no file."""
    emoji = folder / "experiments" / "emoji"
    (emoji / "data").mkdir(parents=True)
    (emoji / "demo.toml").write_text(
        'name = "tiny"\n[model]\nname = "vit_tiny_patch16_224"\nweights = "none"\nimage_size = 32\ndepth = 1\n'
        'classes = ["dark", "light"]\n[peft]\nmethod = "bias"\n[rounds]\ncount = 3\n[training]\nbatch_size = 8\n'
    )
    for name in ("train", "test"):
        rows = [{"image": square(k % 2), "label": k % 2, "vendor": ("noto", "twemoji")[k // 2 % 2]} for k in range(32)]
        features = {"label": {"_type": "ClassLabel", "names": ["dark", "light"]}, "image": {"_type": "Image"}}
        metadata = {"huggingface": json.dumps({"info": {"features": features}})}
        pq.write_table(pa.Table.from_pylist(rows).replace_schema_metadata(metadata), emoji / "data" / f"{name}.parquet")
    return emoji


def square(light: int) -> dict[str, object]:
    file = io.BytesIO()
    Image.new("RGB", (32, 32), (250, 240, 250) if light else (5, 20, 5)).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def test_plan_finds_what_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    experiment(tmp_path)
    plan = federation.plan_of(tmp_path / "out", 7, None, None, "hub", 0, 0)
    assert (plan.config.rounds.count, plan.config.model.weights, plan.weights) == (7, "hub", None)
    with pytest.raises(DataInvalid, match=r"there is no data at .*absent"):
        federation.plan_of(tmp_path / "out", None, None, tmp_path / "absent", None, 0, 0)
    with pytest.raises(SettingsInvalid, match="neither hub nor a file"):
        federation.plan_of(tmp_path / "out", None, None, None, "absent", 0, 0)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Images of one's own: a folder a class, 10 images each."""
    for kind, name in enumerate(("Kreis", "Quadrat")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(10):
            image = square(kind)["bytes"]
            assert isinstance(image, bytes)
            (tmp_path / "photos" / name / f"{number}.png").write_bytes(image)
    return tmp_path / "photos"


def test_one_s_own_images_are_dealt_out_and_a_fifth_is_held_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    experiment(tmp_path)
    plan = federation.plan_of(tmp_path / "out", None, None, photos, None, 0, 0)
    assert plan.config.model.classes == ("Kreis", "Quadrat") and plan.config.name == "own-data" and plan.test is None
    names, held_out = divide(photos, None, None, tmp_path / "clients", tmp_path / "held-out")
    assert names == {f"client-{k}": 4 for k in range(4)}
    parts = [open_source(tmp_path / "clients" / name) for name in names] + [open_source(held_out)]
    images = [part.name(row).split("(")[1] for part in parts for row in range(len(part))]
    assert len(parts[-1]) == 4 and len(set(images)) == len(images) == 20
    assert f"{photos}: 20 images, of which 4 are held out for the evaluator\nclients: client-0 (4 images)" in (
        capsys.readouterr().out
    )
    with pytest.raises(SettingsInvalid, match=r"--clients 17: .* has 16 images to train on"):
        divide(photos, None, 17, tmp_path / "more", tmp_path / "aside")


def test_an_image_that_is_held_out_is_not_trained_on_however_few_there_are() -> None:
    for images in (2, 3, 4, 5, 9, 10):
        trained, held = _parted(images)
        assert len(held) == max(1, images // 5) and sorted([*trained, *held]) == list(range(images))


async def test_folder_of_somebody_else_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    experiment(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").touch()
    with pytest.raises(SettingsInvalid, match="holds something that is not a demo's"):
        await federation.run_demo(federation.plan_of(out, None, None, None, None, 0, 0))
    assert os.listdir(out) == ["thesis.tex"]


@pytest.mark.parametrize("lock", [".lock", "server/lock"])
async def test_a_folder_in_which_a_demo_or_its_server_runs_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lock: str
) -> None:
    monkeypatch.chdir(tmp_path)
    experiment(tmp_path)
    out = tmp_path / "out"
    (out / "server").mkdir(parents=True)
    (out / federation.MARK).touch()
    (out / "report.json").touch()
    with (out / lock).open("w") as held, pytest.raises(StateInvalid, match="is in use by a"):
        fcntl.flock(held, fcntl.LOCK_EX)
        await federation.run_demo(federation.plan_of(out, None, None, None, None, 0, 0))
    assert {"server", "report.json"} <= set(os.listdir(out))


def writers(folder: Path) -> set[int]:
    """Returns the processes that have a file of a folder open: all of a demo have a log, forked workers too."""
    found = set()
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if any(Path(file.path).parent == folder for file in process.open_files()):
                found.add(process.pid)
    return found


@pytest.mark.e2e
@pytest.mark.usefixtures("preloaded")
def test_whole_demo(tmp_path: Path) -> None:
    experiment(tmp_path)
    command = [sys.executable, "-m", "fedpeft_operator.app", "demo", "--out", "out", "--rounds", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "clients: noto (16 images), twemoji (16 images)" in done.stdout
    assert "round 2 committed" in done.stdout
    assert done.stdout.splitlines()[-1] == "results: out/report.json, out/accuracy.png, out/adapter.safetensors"
    made = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [row["clients"] for row in made["rounds"]] == [["noto", "twemoji"]] * 2
    assert all(0 <= row["accuracy"] <= 1 for row in made["rounds"])
    assert "accuracy" in made["initial"]
    totals = made["totals"]
    assert totals["payload_bytes_up"] == totals["payload_bytes_down"] == totals["four_bytes_a_parameter"]
    assert 1 < totals["wire_up_over_payload_up"] < 1.5
    tensors = load_file(tmp_path / "out" / "adapter.safetensors")
    assert sum(values.size for values in tensors.values()) == made["adapter_parameters"]
    assert (tmp_path / "out" / "accuracy.png").stat().st_size > 10_000
    assert len(list((tmp_path / "out" / "logs").iterdir())) == 4


@pytest.mark.e2e
@pytest.mark.usefixtures("preloaded")
def test_whole_demo_of_one_s_own_images(tmp_path: Path, photos: Path) -> None:
    experiment(tmp_path)
    command = [sys.executable, "-m", "fedpeft_operator.app", "demo", "--out", "out", "--rounds", "1"]
    command += ["--data", "photos", "--clients", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    made = json.loads((tmp_path / "out" / "report.json").read_text())
    assert made["clients"] == {"client-0": 8, "client-1": 8} and made["classes"] == ["Kreis", "Quadrat"]
    assert made["rounds"][0]["clients"] == ["client-0", "client-1"] and 0 <= made["accuracy"] <= 1


@pytest.mark.e2e
@pytest.mark.usefixtures("preloaded")
@pytest.mark.parametrize(("moment", "ending"), [("committed", signal.SIGINT), ("building", signal.SIGTERM)])
def test_interrupted_demo_leaves_no_process(tmp_path: Path, moment: str, ending: signal.Signals) -> None:
    experiment(tmp_path)
    command = [sys.executable, "-m", "fedpeft_operator.app", "demo", "--out", "out", "--rounds", "100000"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as demo:
        assert demo.stdout is not None
        assert demo.stderr is not None
        lines = iter(demo.stdout.readline, "")
        assert any(moment in line for line in lines)
        logs = tmp_path / "out" / "logs"
        assert len(writers(logs)) >= PROCESSES[moment]
        demo.send_signal(ending)
        demo.stdout.read()
        said = demo.stderr.read()
        assert "Traceback" not in said
        assert "fedpeft: the demo was stopped, and its processes with it: server, noto, twemoji, evaluator\n" in said
        assert f"logs: {logs}\n" in said
        assert f"fedpeft-server --data-dir {tmp_path / 'out' / 'server'} goes on with the run\n" in said
    assert demo.returncode == 130
    until(lambda: not writers(logs), 5)
