"""`import fedpeft` in a program that is not asynchronous: light, typed, and live over a real socket."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from peft import PeftModel

import fedpeft
from fedpeft.api import following
from fedpeft.api.operator_client import OperatorClient
from fedpeft.errors import BackboneMismatch, ConfigInvalid, Draining, RunNotFound, ServerUnreachable, SettingsInvalid
from fedpeft.v1 import federation_service_pb2, run_pb2
from fedpeft.v1 import operator_service_pb2 as pb

from ..operator.operator_double import Double, Serving, a_client, a_round, a_run, a_ticket, adapter, serving

CONFIG = {
    "name": "tiny <b>",
    "model": {
        "name": "vit_tiny_patch16_224",
        "weights": "none",
        "image_size": 32,
        "depth": 1,
        "classes": ["cat", "dog"],
    },
    "peft": {"method": "bias"},
    "rounds": {"count": 2, "clients": 2, "seed": 7},
}
RUN = "run-0123456789ab"


@pytest.fixture
def served() -> Iterator[Serving]:
    with serving(Double()) as answer:
        yield answer


def test_the_package_is_light_until_something_is_asked_of_it() -> None:
    code = "import sys, json, fedpeft; dir(fedpeft); print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    loaded = set(json.loads(done.stdout))
    assert not loaded & {"torch", "numpy", "grpc", "pydantic", "fedpeft.api.remote"}
    assert {"connect", "Run", "RunConfig", "__version__"} <= set(dir(fedpeft))
    assert all(getattr(fedpeft, name) is not None for name in fedpeft.__all__)
    with pytest.raises(AttributeError, match="no attribute 'conect'"):
        fedpeft.conect  # noqa: B018


def test_a_wrong_server_is_found_at_once() -> None:
    with pytest.raises(SettingsInvalid):
        fedpeft.connect("nowhere")
    with pytest.raises(ServerUnreachable):
        fedpeft.connect("127.0.0.1:1")


def test_runs_are_created_found_steered(served: Serving, tmp_path: Path) -> None:
    server = fedpeft.connect(served.address)
    assert server.runs == [] and served.address in repr(server)
    run = server.create(CONFIG)
    assert (run.name, run.state, run.version, run.method) == ("tiny <b>", "running", 0, "bias")
    ((header, _),) = served.double.created.values()
    assert header.model_parameters == run.model_parameters > run.parameters > 0
    assert [each.id for each in server.runs] == [run.id] == [server.run(run.id).id]
    assert "&lt;b&gt;" in server._repr_html_() and "<b>" not in run._repr_html_()
    assert run.pause("lunch").state == "paused" and run.reason == "lunch"
    assert run.resume().state == "running"
    assert run.stop().finished
    with pytest.raises(RunNotFound):
        server.run("run-absent000000")
    with pytest.raises(ConfigInvalid, match=r"rounds\.clocks"):
        server.create({**CONFIG, "rounds": {"clocks": 1}})
    with pytest.raises(ConfigInvalid, match="cannot read run file"):
        server.create(tmp_path / "absent.toml")


def test_a_listed_run_asks_for_its_rounds_when_they_are_looked_at(served: Serving) -> None:
    done = a_run(version=2, state=run_pb2.RUN_STATE_COMPLETED)
    served.double.runs, served.double.rounds = {RUN: done}, {RUN: [a_round(1, accuracy=0.5), a_round(2, accuracy=0.75)]}
    server = fedpeft.connect(served.address)
    (listed,), whole = server.runs, server.run(RUN)
    served.double.asked.clear()
    assert RUN in repr(listed) and not served.double.asked
    assert (listed.bytes_up, listed.full_bytes) == (whole.bytes_up, whole.full_bytes) and listed.bytes_up > 0
    assert (len(listed.rounds), listed.accuracy, listed.to_dict()) == (2, 0.75, whole.to_dict())
    assert served.double.asked.count("ListRounds") == 1


def test_watching_says_what_is_new_and_goes_on_when_the_server_restarts(served: Serving) -> None:
    double = served.double
    running, done = a_run(version=1), a_run(version=1, state=run_pb2.RUN_STATE_COMPLETED)
    running.initial_metrics["accuracy"] = 0.25
    half = a_round(2, committed=False)
    half.tickets.append(a_ticket("zoo", run_pb2.TICKET_STATE_REFUSED, 2))
    half.tickets[-1].reason = "PAYLOAD_INVALID: a value is not finite"
    double.runs = {RUN: running}
    double.rounds = {RUN: [a_round(1, accuracy=0.5), half]}
    double.script = [
        pb.WatchRunResponse(run=running, rounds=[a_round(1, accuracy=0.5), half]),
        Draining("the server is shutting down"),
        pb.WatchRunResponse(run=done, rounds=[a_round(1, accuracy=0.5)]),
    ]
    run = fedpeft.connect(served.address).run(RUN)
    changes = []
    for change in run.watch():
        changes.append(change)
        if len(changes) == 1:
            assert run.current is not None
            assert run.current.clients == ("noto",) and run.current.awaited == ("twemoji",)
            assert run.current.refused == {"zoo": "PAYLOAD_INVALID: a value is not finite"}
    assert [change.connected for change in changes] == [True, False, True]
    assert "round 1 committed in 4.5 s: 2 clients" in str(changes[0])
    assert "the server is back" in str(changes[2])
    assert run.state == "completed" and (run.accuracy, run.loss) == (0.5, 1.5)
    (first,) = run.rounds
    assert (first.number, first.phase, first.seconds, first.train_loss) == (1, "committed", 4.5, 2.5)
    assert (run.bytes_up, run.bytes_down, run.full_bytes) == (600, 620, 8_000_000)
    assert run.to_dict()["rounds"][0]["metrics"]["accuracy"] == 0.5
    assert "<td>50.0 %</td>" in run._repr_html_() and "accuracy 50.0 %" in repr(run)


def test_a_watch_that_is_left_ends_its_call(served: Serving) -> None:
    served.double.runs = {RUN: a_run()}
    served.double.script = [pb.WatchRunResponse(run=a_run()), 60.0]
    run = fedpeft.connect(served.address).run(RUN)
    watching = run.watch()
    assert "bias on vit_tiny" in next(watching).text
    watching.close()
    assert next(watching, None) is None


def test_to_connect_takes_one_call_however_many_runs_there_are(served: Serving) -> None:
    served.double.runs = {run: a_run(run) for run in (RUN, "run-b", "run-c")}
    served.double.page = 1
    server = fedpeft.connect(served.address)
    assert served.double.asked == ["ListRuns"]
    assert len(server.runs) == 3


def published(served: Serving, method: str) -> tuple[fedpeft.Run, dict[str, np.ndarray]]:
    """A run whose version 1 has other values than its version 0."""
    run = fedpeft.connect(served.address).create({**CONFIG, "peft": {"method": method}})
    start = run_of(served).spec
    ((_, data),) = served.double.created.values()
    at, files = 0, {}
    for tensor in start.tensors:
        size = int(np.prod(tensor.shape))
        files[tensor.name] = np.frombuffer(data, np.float32, size, at).reshape(tuple(tensor.shape))
        at += 4 * size
    changed = {name: values + np.float32(0.05) for name, values in files.items()}
    run_of(served).version = 1
    served.double.files = {
        (run.id, version): adapter(run_of(served), version, values) for version, values in enumerate((files, changed))
    }
    return run.refresh(), changed


def run_of(served: Serving) -> run_pb2.Run:
    (run,) = served.double.runs.values()
    return run


def test_the_result_is_a_timm_model(served: Serving, tmp_path: Path) -> None:
    run, changed = published(served, "bias")
    model = run.load_timm()
    assert isinstance(model, timm.models.VisionTransformer) and not model.training
    state = model.state_dict()
    assert all(np.array_equal(state[name].numpy(), values) for name, values in changed.items())
    logits = model(torch.zeros(1, 3, 32, 32))
    assert torch.equal(logits, run.load().module(torch.zeros(1, 3, 32, 32)))
    assert not torch.equal(logits, run.load_timm(version=0)(torch.zeros(1, 3, 32, 32)))
    assert run.adapter().keys() == changed.keys()
    assert run.save(tmp_path / "adapter.safetensors", version=0) == 0 and (tmp_path / "adapter.safetensors").exists()
    with pytest.raises(ConfigInvalid, match="has no peft form"):
        run.load_peft()
    run_of(served).backbone_fingerprint = "0" * 64
    with pytest.raises(BackboneMismatch):
        run.refresh().load()


def test_a_lora_is_a_peft_model(served: Serving) -> None:
    run, changed = published(served, "lora")
    model = run.load_peft()
    assert isinstance(model, PeftModel)
    pixels = torch.rand(2, 3, 32, 32)
    assert torch.allclose(model(pixels), run.load().module(pixels), atol=1e-5)
    assert torch.allclose(run.load_timm()(pixels), model(pixels), atol=1e-5)
    assert any("lora_B" in name for name in changed)


def test_figures_without_an_accuracy_are_figures_and_nobody_waits_for_more(served: Serving) -> None:
    rounds = [a_round(1), a_round(2)]
    for each in rounds:
        each.metrics["loss"] = 1.0 / each.number
    done = a_run(RUN, state=run_pb2.RUN_STATE_COMPLETED, version=2, initial_metrics={"loss": 1.5})
    served.double.runs[RUN], served.double.rounds[RUN] = done, rounds
    served.double.script = [pb.WatchRunResponse(run=done, rounds=rounds)]
    served.double.clients = [a_client("eve", federation_service_pb2.CLIENT_ROLE_EVALUATOR)]
    began = time.monotonic()
    run = fedpeft.connect(served.address).run(RUN)
    said = "\n".join(map(str, run.watch()))
    assert time.monotonic() - began < 20, "the evaluator is waited for as long as a silent server"
    assert "version 2 scored: loss 0.500" in said and "waiting for the evaluator" not in said
    assert (run.loss, run.accuracy) == (0.5, None)


def test_figures_that_come_between_two_looks_are_shown(served: Serving) -> None:
    """The evaluator has no version left to score, and its last figures came after the rounds were read."""
    done = a_run(RUN, state=run_pb2.RUN_STATE_COMPLETED, version=2, initial_metrics={"loss": 1.5})
    done.evaluators.add(evaluator="eve", backlog=0)
    first, last = a_round(1), a_round(2)
    first.metrics["loss"] = 1.0
    served.double.script = [pb.WatchRunResponse(run=done, rounds=[first, last])]
    scored = run_pb2.Round()
    scored.CopyFrom(last)
    scored.metrics["loss"] = 0.5
    served.double.runs[RUN], served.double.rounds[RUN] = done, [first, scored]
    said = "\n".join(map(str, fedpeft.connect(served.address).run(RUN).watch()))
    assert "version 2 scored: loss 0.500" in said


async def test_after_the_end_rounds_are_asked_for_when_an_evaluator_moved_on_and_none_that_is_settled(
    served: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Version 1 was given up; the others are scored one after the other, the newest last."""
    monkeypatch.setattr(following, "SCORE_PAUSE_S", 0.02)
    done = a_run(RUN, state=run_pb2.RUN_STATE_COMPLETED, version=4, initial_metrics={"loss": 1.5})
    scoring = done.evaluators.add(evaluator="eve", scored=1, backlog=3, next_version=4)
    scoring.failed.add(version=1, reason="the weights are gone")
    rounds = [a_round(number) for number in range(1, 5)]
    served.double.runs[RUN], served.double.rounds[RUN] = done, rounds
    served.double.script = [pb.WatchRunResponse(run=done, rounds=rounds)]
    seen: list[following.RunSnapshot] = []
    async for snapshot in following.follow(lambda: OperatorClient(served.address), RUN):
        seen.append(snapshot)
        if len(seen) % 20 == 0 and scoring.backlog:
            scored = 5 - scoring.backlog
            rounds[scored - 1].metrics["loss"] = 1.0 / scored
            scoring.scored, scoring.backlog = scored, 4 - scored
    assert [number for number, each in seen[-1].rounds.items() if "loss" in each.metrics] == [2, 3, 4]
    assert served.double.asked_after == [1, 1, 2, 3]
