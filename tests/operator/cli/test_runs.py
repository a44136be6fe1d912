"""The commands of `fedpeft run` and `fedpeft client`, against an OperatorService on a real socket."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from fedpeft.api import following, operator_client, views
from fedpeft.api.narration import committed_line
from fedpeft.errors import Draining, Internal, RunNotFound
from fedpeft.v1 import federation_service_pb2 as federation
from fedpeft.v1 import operator_service_pb2 as pb
from fedpeft.v1 import run_pb2
from fedpeft_operator.app import main

from ..operator_double import Double, Serving, a_client, a_round, a_run, serving

RUN = "run-0123456789ab"
COMPLETED, STOPPED, PAUSED = run_pb2.RUN_STATE_COMPLETED, run_pb2.RUN_STATE_STOPPED, run_pb2.RUN_STATE_PAUSED


class Ended(NamedTuple):
    code: int
    out: str
    err: str


Command = Callable[..., Ended]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serving]:
    monkeypatch.setattr(operator_client, "PAUSE_S", 0.01)
    monkeypatch.setattr(following, "FIRST_PAUSE_S", 0.05)
    with serving(Double()) as answer:
        yield answer


@pytest.fixture
def fedpeft(served: Serving, capfd: pytest.CaptureFixture[str]) -> Command:
    def command(*arguments: str) -> Ended:
        with pytest.raises(SystemExit) as ended:
            main(["--server", served.address, *arguments])
        out, err = capfd.readouterr()
        lines = [line for line in err.splitlines() if not re.match(r"[IWE]\d{4} ", line)]  # gRPC's own
        return Ended(int(ended.value.code or 0), out, "\n".join(lines))

    return command


def test_list_for_people(served: Serving, fedpeft: Command) -> None:
    served.double.runs = {RUN: a_run(version=1), "run-b": a_run("run-b", state=COMPLETED, version=3)}
    assert fedpeft("run", "list") == Ended(
        0,
        "RUN               NAME   STATE      VERSION  OF  METHOD  MODEL     CREATED\n"
        "run-0123456789ab  emoji  running          1   3  bias    vit_tiny  2026-01-01T00:00:00.000Z\n"
        "run-b             emoji  completed        3   3  bias    vit_tiny  2026-01-01T00:00:00.000Z\n",
        "",
    )


def test_list_as_json(served: Serving, fedpeft: Command) -> None:
    assert json.loads(fedpeft("run", "list", "--json").out) == []
    served.double.runs = {RUN: a_run(version=1)}
    assert json.loads(fedpeft("run", "list", "--json").out) == [
        {
            "run": RUN,
            "name": "emoji",
            "state": "running",
            "reason": "",
            "version": 1,
            "rounds": 3,
            "model": "vit_tiny",
            "method": "bias",
            "created_at": "2026-01-01T00:00:00.000Z",
        }
    ]


def test_show_for_people(served: Serving, fedpeft: Command) -> None:
    served.double.runs = {RUN: a_run(version=1)}
    served.double.rounds = {RUN: [a_round(1, accuracy=0.4321), a_round(2, committed=False)]}
    assert fedpeft("run", "show", RUN).out == (
        "run-0123456789ab 'emoji' is running\n"
        "  bias on vit_tiny, 60 parameters of 1,000,000 (0.01 %)\n"
        "  version 1 of 3, created 2026-01-01T00:00:00.000Z\n"
        "ROUND  CLIENTS  ACCURACY     UP   DOWN  FULL FINE-TUNING  SECONDS\n"
        "    1        2    43.2 %  600 B  620 B          7.63 MiB      4.5\n"
        "round 2 is open: 1 received, waiting for twemoji; deadline 2026-01-01T00:10:20.000Z\n"
    )


def test_show_of_a_round_that_waits_names_nobody(served: Serving, fedpeft: Command) -> None:
    served.double.runs = {RUN: a_run(version=0)}
    round_ = a_round(1, committed=False)
    round_.phase = run_pb2.ROUND_PHASE_WAITING
    served.double.rounds = {RUN: [round_]}
    assert fedpeft("run", "show", RUN).out.splitlines()[-1] == "round 1 has not begun"


def test_show_as_json(served: Serving, fedpeft: Command) -> None:
    served.double.runs = {RUN: a_run(version=1, initial_metrics={"accuracy": 0.25})}
    served.double.rounds = {RUN: [a_round(1, accuracy=0.4), a_round(2, committed=False)]}
    whole = json.loads(fedpeft("run", "show", RUN, "--json").out)
    assert {key: whole[key] for key in ("run", "name", "state", "reason", "round", "version")} == {
        "run": RUN,
        "name": "emoji",
        "state": "running",
        "reason": "",
        "round": 2,
        "version": 1,
    }
    assert whole["initial_metrics"] == {"accuracy": 0.25}
    assert whole["config"]["model"]["classes"] == ["cat", "dog"]
    (one,) = whole["rounds"]
    assert (one["version"], one["clients"], one["seconds"]) == (1, ["noto", "twemoji"], 4.5)
    assert (one["wire_bytes_up"], one["wire_bytes_down"]) == (600, 620)
    assert (one["payload_bytes_up"], one["payload_bytes_down"]) == (480, 480)
    assert one["full_bytes_each_way"] == 1_000_000 * 4 * 2
    assert one["metrics"] == {"accuracy": 0.4, "loss": 1.5, "train_loss": 2.5}
    assert one["record_sha256"] == "ef" * 32
    assert [t["state"] for t in one["tickets"]] == ["received", "received"]
    current = whole["in_progress"]
    assert (current["round"], current["phase"], current["base_version"]) == (2, "open", 1)
    assert (current["awaited"], current["received"]) == (["twemoji"], ["noto"])
    assert current["deadline"] == "2026-01-01T00:10:20.000Z"


def test_show_of_a_finished_run_names_its_last_round(served: Serving, fedpeft: Command) -> None:
    served.double.runs = {RUN: a_run(version=2, state=STOPPED, reason="enough")}
    served.double.rounds = {RUN: [a_round(1), a_round(2)]}
    whole = json.loads(fedpeft("run", "show", RUN, "--json").out)
    assert (whole["state"], whole["reason"], whole["round"]) == ("stopped", "enough", 2)
    assert whole["in_progress"] is None


def test_steering(served: Serving, fedpeft: Command) -> None:
    served.double.runs = {RUN: a_run()}
    assert fedpeft("run", "pause", RUN, "--reason", "lunch").out == f"{RUN} is paused: lunch\n"
    assert fedpeft("run", "resume", RUN).out == f"{RUN} is running\n"
    early = fedpeft("run", "delete", RUN)
    assert (early.code, early.err) == (1, f"fedpeft: {RUN} is running; stop it first")
    assert json.loads(fedpeft("run", "stop", RUN, "--json").out)["state"] == "stopped"
    assert fedpeft("run", "delete", RUN) == Ended(0, f"{RUN} is deleted\n", "")
    gone = fedpeft("run", "show", RUN)
    assert gone == Ended(4, "", f"fedpeft: there is no run {RUN}")


def test_who_declined_and_why_is_shown_watched_and_listed(served: Serving, fedpeft: Command) -> None:
    why = ["2 of its 9 classes are not among the run's", "it has no image of the run's classes"]
    declines = [run_pb2.Decline(client="hospital-b", reasons=why)]
    waiting = a_run(reason="round 1 waits for clients: 1 of 3 available, 1 declined", declines=declines)
    served.double.runs = {RUN: waiting}
    line = f"hospital-b declined: {'; '.join(why)}"
    assert f"  {line}" in fedpeft("run", "show", RUN).out.splitlines()
    shown = json.loads(fedpeft("run", "show", RUN, "--json").out)
    assert shown["declines"] == [{"client": "hospital-b", "reasons": why, "at": None}]
    change = pb.WatchRunResponse(run=waiting)
    served.double.script = [change, change, pb.WatchRunResponse(run=a_run(state=COMPLETED), rounds=[a_round(1)])]
    assert fedpeft("run", "watch", RUN).out.splitlines().count(line) == 1
    client = a_client("hospital-b", federation.CLIENT_ROLE_TRAINER, "waiting")
    client.answers.add(run=RUN, answer=federation.ANSWER_DECLINED, reasons=why)
    client.answers.add(run="run-other", answer=federation.ANSWER_ACCEPTED, examples=12)
    served.double.clients = [client]
    assert fedpeft("client", "list").out.splitlines()[2:] == [f"hospital-b declined {RUN}: {'; '.join(why)}"]
    (row,) = json.loads(fedpeft("client", "list", "--json").out)
    assert [(a["run"], a["answer"], a["examples"]) for a in row["answers"]] == [
        (RUN, "declined", 0),
        ("run-other", "accepted", 12),
    ]


def test_clients(served: Serving, fedpeft: Command) -> None:
    served.double.clients = [
        a_client("eve", federation.CLIENT_ROLE_EVALUATOR, "away"),
        a_client("noto", federation.CLIENT_ROLE_TRAINER, "training"),
    ]
    assert fedpeft("client", "list").out == (
        "CLIENT  ROLE       ACTIVITY  UPDATES  EXAMPLES  LAST SEEN                 DEVICE\n"
        "eve     evaluator  away            3       640  2026-01-01T00:01:01.500Z  cpu\n"
        "noto    trainer    training        3       640  2026-01-01T00:01:01.500Z  cpu\n"
    )
    rows = json.loads(fedpeft("client", "list", "--json").out)
    assert [(row["client"], row["role"]) for row in rows] == [("eve", "evaluator"), ("noto", "trainer")]


def watch_script() -> list[pb.WatchRunResponse | Exception]:
    """A run of two rounds that pauses, loses its server once, and is completed."""
    return [
        pb.WatchRunResponse(run=a_run(initial_metrics={"accuracy": 0.25})),
        pb.WatchRunResponse(run=a_run(), rounds=[a_round(1, committed=False)]),
        pb.WatchRunResponse(run=a_run(version=1), rounds=[a_round(1), a_round(2, committed=False)]),
        pb.WatchRunResponse(run=a_run(version=1, state=PAUSED, reason="lunch")),
        Draining("the server is shutting down"),
        pb.WatchRunResponse(
            run=a_run(version=1, state=PAUSED, reason="lunch"),
            rounds=[a_round(1, accuracy=0.5), a_round(2, committed=False)],
        ),
        pb.WatchRunResponse(run=a_run(version=1)),
        pb.WatchRunResponse(run=a_run(version=2, state=COMPLETED), rounds=[a_round(2, accuracy=0.75)]),
    ]


WATCHED = f"""\
{RUN} 'emoji': bias on vit_tiny, 60 of 1,000,000 parameters, 3 rounds of 2 clients
version 0 scored: accuracy 25.0 %
round 1 open: 1 update of 2 received, awaited: twemoji
round 1 committed in 4.5 s: 2 clients, up 600 B, down 620 B (full fine-tuning: 7.63 MiB each way)
round 2 open: 1 update of 2 received, awaited: twemoji
the run is paused: lunch
the server is shutting down; retrying until it answers
the server is back
version 1 scored: accuracy 50.0 %, loss 1.500
the run is running
round 2 committed in 4.5 s: 2 clients, up 600 B, down 620 B (full fine-tuning: 7.63 MiB each way)
version 2 scored: accuracy 75.0 %, loss 1.500
the run is completed
{RUN} is completed at version 2: up 1.2 KiB, down 1.2 KiB
full fine-tuning would have sent 15.26 MiB each way, 13,333 times as much up
"""


def test_watch_in_lines(served: Serving, fedpeft: Command) -> None:
    served.double.runs = {RUN: a_run()}
    served.double.script = watch_script()
    assert fedpeft("run", "watch", RUN) == Ended(0, WATCHED, "")


def test_track_writes_each_point_once_however_often_it_is_called(
    served: Serving, fedpeft: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.chdir(tmp_path)
    made, round_json = [], views.round_json
    monkeypatch.setattr(views, "round_json", lambda each, run: made.append(each.number) or round_json(each, run))
    for _ in range(2):
        served.double.runs = {RUN: a_run()}
        served.double.script = watch_script()
        ended = fedpeft("run", "track", RUN, "--to", "tensorboard")
        assert ended.code == 0 and "version 2 scored: accuracy 75.0 %" in ended.out
    assert made == 2 * [1, 1, 2], "a change costs the rounds that it brings, not all that are committed"
    events = EventAccumulator(str(tmp_path / "tensorboard" / f"emoji-{RUN}")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("accuracy")] == [(0, 0.25), (1, 0.5), (2, 0.75)]
    assert [(e.step, e.value) for e in events.Scalars("wire_bytes_up")] == [(1, 600.0), (2, 600.0)]
    assert fedpeft("run", "track", RUN, "--to", "tensorbord").code == 2


def test_ctrl_c_ends_the_watch_with_a_sentence_and_not_the_run(served: Serving) -> None:
    served.double.runs = {RUN: a_run()}
    served.double.script = [pb.WatchRunResponse(run=a_run(), rounds=[a_round(1, committed=False)]), 60.0]
    command = [sys.executable, "-m", "fedpeft_operator.app", "--server", served.address, "run", "watch", RUN]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as watch:
        assert watch.stdout is not None
        assert any(line == "round 1 open: 1 update of 2 received, awaited: twemoji\n" for line in watch.stdout)
        watch.send_signal(signal.SIGINT)
        _, err = watch.communicate(timeout=30)
    assert (watch.returncode, err) == (130, f"fedpeft: no longer watching; {RUN} goes on\n")
    assert served.double.runs[RUN].state == run_pb2.RUN_STATE_RUNNING


def test_watch_as_json_lines(served: Serving, fedpeft: Command) -> None:
    served.double.runs = {RUN: a_run()}
    served.double.script = watch_script()
    ended = fedpeft("run", "watch", RUN, "--json")
    lines = [json.loads(line) for line in ended.out.splitlines()]
    assert [(line["state"], line["version"]) for line in lines] == [
        ("running", 0),
        ("running", 0),
        ("running", 1),
        ("paused", 1),
        ("paused", 1),
        ("running", 1),
        ("completed", 2),
    ]
    assert [[r["version"] for r in line["rounds"]] for line in lines] == [[], [], [1], [], [1], [], [2]]
    assert lines[1]["in_progress"]["awaited"] == ["twemoji"]
    assert lines[-1]["in_progress"] is None
    assert "retrying" in ended.err


def test_watch_of_a_stopped_run_ends_with_5(served: Serving, fedpeft: Command) -> None:
    run = a_run(version=1, state=STOPPED, reason="enough")
    served.double.runs = {RUN: run}
    served.double.script = [pb.WatchRunResponse(run=run, rounds=[a_round(1)])]
    ended = fedpeft("run", "watch", RUN)
    assert ended.code == 5
    assert "the run is stopped: enough\n" in ended.out


def test_watch_waits_for_the_last_figures(served: Serving, fedpeft: Command) -> None:
    run = a_run(version=1, state=COMPLETED)
    served.double.runs, served.double.rounds = {RUN: run}, {RUN: [a_round(1)]}
    served.double.clients = [a_client("eve", federation.CLIENT_ROLE_EVALUATOR)]
    served.double.script = [pb.WatchRunResponse(run=run, rounds=[a_round(1)])]

    def score() -> None:
        time.sleep(0.8)
        served.double.runs[RUN] = a_run(version=1, state=COMPLETED, initial_metrics={"accuracy": 0.1})
        served.double.rounds[RUN] = [a_round(1, accuracy=0.6)]

    scoring = threading.Thread(target=score)
    scoring.start()
    ended = fedpeft("run", "watch", RUN)
    scoring.join()
    assert "version 1 scored: accuracy 60.0 %" in ended.out
    assert "0 scored: accuracy 10.0 %" in ended.out


def test_watch_says_why_the_last_figures_are_awaited_no_longer(served: Serving, fedpeft: Command) -> None:
    run = a_run(version=1, state=COMPLETED)
    served.double.runs, served.double.rounds = {RUN: run}, {RUN: [a_round(1)]}
    served.double.clients = [a_client("eve", federation.CLIENT_ROLE_EVALUATOR)]
    served.double.script = [pb.WatchRunResponse(run=run, rounds=[a_round(1)])]
    served.double.failures["ListRounds"] = [RunNotFound(f"there is no run {RUN}")]
    ended = fedpeft("run", "watch", RUN)
    assert ended.code == 0
    assert f"figures of version 1 are awaited no longer: there is no run {RUN}\n" in ended.out


def test_watch_survives_a_server_that_restarts(served: Serving, fedpeft: Command) -> None:
    served.double.runs = {RUN: a_run()}
    served.double.script = [
        pb.WatchRunResponse(run=a_run()),
        30.0,
        pb.WatchRunResponse(run=a_run(version=3, state=COMPLETED), rounds=[a_round(3, accuracy=0.9)]),
    ]

    def restart() -> None:
        while 30.0 in served.double.script:
            time.sleep(0.05)
        time.sleep(0.3)
        served.stop()
        time.sleep(0.5)
        served.start()

    restarting = threading.Thread(target=restart)
    restarting.start()
    ended = fedpeft("run", "watch", RUN)
    restarting.join()
    assert ended.code == 0
    assert "retrying until it answers\nthe server is back\n" in ended.out


def test_watch_of_no_run_and_of_no_server(served: Serving, fedpeft: Command) -> None:
    assert fedpeft("run", "watch", "run-none") == Ended(4, "", "fedpeft: there is no run run-none")
    served.stop()
    ended = fedpeft("run", "watch", RUN)
    assert (ended.code, ended.out) == (3, "")
    assert ended.err == (
        f"fedpeft: no FedPEFT server answers at {served.address}; start fedpeft-server there, "
        "or name another with --server or FEDPEFT_SERVER"
    )


def test_fault_of_the_server_is_one_sentence(served: Serving, fedpeft: Command) -> None:
    served.double.failures["ListRuns"] = [Internal("a fault of the server; its log has it under 0123")]
    assert fedpeft("run", "list") == Ended(1, "", "fedpeft: a fault of the server; its log has it under 0123")


def test_traceback_only_when_asked_for(served: Serving, fedpeft: Command) -> None:
    assert "Traceback" in fedpeft("-v", "run", "show", "run-none").err


def test_export_of_the_stored_file(served: Serving, fedpeft: Command, tmp_path: Path) -> None:
    served.double.runs, served.double.files = {RUN: a_run(version=2)}, {(RUN, 2): b"newest" * 500, (RUN, 1): b"older"}
    out = tmp_path / "adapter.safetensors"
    digests = {n: hashlib.sha256(data).hexdigest() for (_, n), data in served.double.files.items()}
    assert fedpeft("run", "export", RUN, "--out", str(out)).out == (
        f"version 2 of {RUN} is in {out} (safetensors); adapter sha256 {digests[2]}\n"
    )
    assert out.read_bytes() == b"newest" * 500
    ended = fedpeft("run", "export", RUN, "--out", str(out), "--version", "1", "--json")
    said = {"run": RUN, "version": 1, "format": "safetensors", "out": str(out), "adapter_sha256": digests[1]}
    assert json.loads(ended.out) == said
    assert out.read_bytes() == b"older"
    for version in ("7", str(2**32), str(2**63 - 1)):
        ended = fedpeft("run", "export", RUN, "--out", str(out), "--version", version)
        assert ended == Ended(4, "", f"fedpeft: {RUN} has no version {version}")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ("--format", "peft", "--out", "adapter"),
            "--format peft is for dora, fedsa_lora, ffa_lora, ia3, lora, lora_residual, rolora, vera; this run tunes",
        ),
        (("--out", "absent/file"), "make it first"),
        (("--out", "."), "safetensors is written as a file"),
        (("--format", "peft", "--out", "."), "a folder that is new or empty"),
    ],
)
def test_export_to_a_wrong_place_or_form(
    served: Serving,
    fedpeft: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "something").touch()
    served.double.runs = {RUN: a_run()}
    ended = fedpeft("run", "export", RUN, *arguments)
    assert ended.code == 2
    assert sentence in ended.err
    assert os.listdir(tmp_path) == ["something"]


def test_server_from_the_environment(served: Serving) -> None:
    served.double.runs = {RUN: a_run()}
    command = [sys.executable, "-m", "fedpeft_operator.app", "run", "list", "--json"]
    environment = {**os.environ, "FEDPEFT_SERVER": served.address}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=True)
    assert json.loads(done.stdout)[0]["run"] == RUN
    assert done.stderr == ""


@pytest.mark.parametrize("version", [2**32, 2**64 - 1, 10**20])
def test_a_version_beyond_the_protocol_is_one_that_is_not_there(
    served: Serving, fedpeft: Command, tmp_path: Path, version: int
) -> None:
    served.double.runs = {RUN: a_run(version=1)}
    for command in (
        ("rollback", RUN, "--to", str(version)),
        ("export", RUN, "--version", str(version), "--out", str(tmp_path / "a.safetensors")),
    ):
        done = fedpeft("run", *command)
        assert (done.code, done.err) == (4, f"fedpeft: {RUN} has no version {version}")


def test_a_rollback_is_shown_and_watched(served: Serving, fedpeft: Command) -> None:
    back = a_round(2)
    del back.tickets[:]
    back.metrics["rolled_back_to"] = 0
    served.double.runs = {RUN: a_run(state=COMPLETED, version=2)}
    served.double.rounds = {RUN: [a_round(1), back]}
    assert "round 2 folded no update: it rolled the run back to version 0\n" in fedpeft("run", "show", RUN).out
    assert committed_line(back, a_run()) == "round 2 rolled the run back to version 0; no update was folded"
