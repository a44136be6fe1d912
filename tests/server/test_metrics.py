"""Metrics of runs, rounds, clients, disk and certificates; and that a deleted run leaves nothing."""

from __future__ import annotations

import ast
import asyncio
import math
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from prometheus_client.metrics import MetricWrapperBase

from fedpeft.adapters import payload
from fedpeft.identity import certificates
from fedpeft.rounds.state_machine import Phase, Round
from fedpeft.rounds.tickets import Ticket, Tickets, TicketState
from fedpeft.v1 import federation_service_pb2 as fed
from fedpeft.v1 import operator_service_pb2 as op
from fedpeft_server import metrics as metrics_module
from fedpeft_server.access.files import Files
from fedpeft_server.metrics import Metrics
from fedpeft_server.rpc.sessions import Sessions, Silence
from fedpeft_server.runs.gauges import RunGauges
from fedpeft_server.store.rows import ClientRow, RunState
from fedpeft_server.timing import TIMING

from ..ports import free_port
from .conftest import SPEC, Daemon, StartDaemon, config, filled, header
from .rows import RUN, run_row
from .test_process import running, scrape

Samples = dict[tuple[str, ...], float]


def samples(metrics: Metrics, name: str) -> Samples:
    """Returns the values of a metric by its label values, in the order of the labels' names."""
    found = (s for family in metrics.registry.collect() for s in family.samples if s.name == name)
    return {tuple(v for _, v in sorted(s.labels.items())): s.value for s in found}


def test_no_label_carries_a_round_or_a_client() -> None:
    labels = {
        label
        for metric in vars(Metrics()).values()
        if isinstance(metric, MetricWrapperBase)
        for label in metric._labelnames
    }
    assert labels == {
        *("run", "direction", "encoding", "phase", "outcome", "state", "split", "name", "method", "model", "work"),
        *("code", "role", "version", "certificate", "place", "why", "kind"),
    }


def _names(methods: Collection[str], place: int) -> dict[str, set[str]]:
    """Returns the literal argument at a place of the server's calls of some methods, by the object called."""
    found: dict[str, set[str]] = defaultdict(set)
    for path in Path(metrics_module.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and len(node.args) > place):
                continue
            name = node.args[place]
            if node.func.attr in methods and isinstance(name, ast.Constant) and isinstance(name.value, str):
                found[ast.unparse(node.func.value).rpartition(".")[2]].add(name.value)
    return found


def test_the_first_failure_of_every_background_task_is_a_change() -> None:
    used = {name for names in _names(("attempt", "every", "supervise"), 0).values() for name in names}
    assert {"database", "enrolment"} < used
    assert used <= set(metrics_module.BACKGROUND)


def test_the_first_outcome_of_every_kind_is_a_change() -> None:
    used = _names(("labels",), 1)
    assert {"excluded", "late"} < used["updates"] and "rolled_back" in used["rounds"]
    for metric in ("updates", "rounds", "round_seconds"):
        assert used[metric] <= {labels[0] for labels in metrics_module._BEGINNINGS[metric]}


def test_an_open_round_shows_its_clock_its_quorum_and_its_budget() -> None:
    metrics = Metrics()
    tickets = Tickets((Ticket("t1", "a", TicketState.RECEIVED), Ticket("t2", "b")))
    current = Round(RUN, 2, Phase.OPEN, tickets, opened_at=1000.0, deadline=1600.0, extensions=1)
    RunGauges(metrics).show(run_row(), current)
    shown = {
        name: samples(metrics, f"fedpeft_{name}")[RUN,]
        for name in (
            "round",
            "round_opened_timestamp_seconds",
            "round_deadline_timestamp_seconds",
            "round_extensions",
            "round_goal",
            "round_quorum",
            "round_available",
            "full_finetuning_bytes",
        )
    }
    assert shown == {
        "round": 2,
        "round_opened_timestamp_seconds": 1000,
        "round_deadline_timestamp_seconds": 1600,
        "round_extensions": 1,
        "round_goal": 3,
        "round_quorum": 1,
        "round_available": 3,
        "full_finetuning_bytes": 4 * 85_000_000 * 3,
    }
    # lora.A (8 x 4) is sent in rounds 1, 4..., frozen in 2, 5...: up only head.bias goes, down both.
    budget = samples(metrics, "fedpeft_round_budget_bytes")
    assert budget == {("up", RUN): 4 * 2 * 3, ("down", RUN): 4 * 34 * 3}
    phases = samples(metrics, "fedpeft_round_phase")
    assert {labels[0]: value for labels, value in phases.items()} == {
        "waiting": 0,
        "open": 1,
        "aggregating": 0,
        "committed": 0,
    }


def test_a_change_of_the_run_or_of_any_field_of_its_round_is_shown_and_a_receipt_is_none() -> None:
    metrics, run = Metrics(), run_row()
    shown = RunGauges(metrics)
    shown.show(run, before := Round(RUN, 1, Phase.OPEN, Tickets((Ticket("t1", "a"),)), 1000.0, 1600.0))
    metrics.round.labels(RUN).set(99)
    shown.show(run, replace(before, tickets=before.tickets.with_changed(Ticket("t1", "a", TicketState.RECEIVED))))
    assert samples(metrics, "fedpeft_round")[RUN,] == 99, "nothing that is shown has changed"
    more = Tickets(Ticket(f"t{i}", client) for i, client in enumerate("abcd"))
    for after in (replace(before, tickets=more), replace(before, extensions=1), replace(before, deadline=None)):
        metrics.round.labels(RUN).set(99)
        shown.show(run, after)
        assert samples(metrics, "fedpeft_round")[RUN,] == 1
    metrics.round.labels(RUN).set(99)
    shown.show(replace(run, state=RunState.PAUSED), after)
    assert samples(metrics, "fedpeft_round")[RUN,] == 1


def test_what_does_not_apply_has_no_series() -> None:
    metrics = Metrics()
    run = run_row()
    over = Round(RUN, 1, Phase.COMMITTED, Tickets(), 1000.0)
    stopped = Round(RUN, 1, Phase.OPEN, Tickets(), 1000.0, stopped=True)
    for after in (over, stopped, Round(RUN, 2)):
        shown = RunGauges(metrics)
        shown.show(run, Round(RUN, 1, Phase.OPEN, Tickets(), 1000.0, 1600.0))
        assert samples(metrics, "fedpeft_round_deadline_timestamp_seconds") == {(RUN,): 1600}
        shown.show(replace(run, state=RunState.PAUSED, model_parameters=0), after)
        _has_no_clock(metrics)
    assert samples(metrics, "fedpeft_full_finetuning_bytes") == {}
    assert samples(metrics, "fedpeft_certificate_expiry_seconds") == {}
    states = samples(metrics, "fedpeft_run_state")
    assert [labels[1] for labels, value in states.items() if value] == ["paused"]


def _has_no_clock(metrics: Metrics) -> None:
    for name in ("round_opened_timestamp_seconds", "round_deadline_timestamp_seconds"):
        assert samples(metrics, f"fedpeft_{name}") == {}


def test_a_certificate_shows_when_it_ends() -> None:
    metrics = Metrics()
    metrics.certificate_expires("server", 1.8e9)
    metrics.certificate_expires("authority", 2.1e9)
    metrics.certificate_expires("server", 1.9e9)
    assert samples(metrics, "fedpeft_certificate_expiry_seconds") == {("server",): 1.9e9, ("authority",): 2.1e9}


def test_free_room_is_that_of_the_moment_and_a_lost_folder_takes_no_other_metric_along(small_disk: Path) -> None:
    metrics = Metrics()
    metrics.watch_disk("data", small_disk)
    before = samples(metrics, "fedpeft_disk_free_bytes")[("data",)]
    (small_disk / "file").write_bytes(b"x" * 500_000)
    assert before - samples(metrics, "fedpeft_disk_free_bytes")[("data",)] >= 500_000
    assert samples(metrics, "fedpeft_disk_size_bytes")[("data",)] == 2**20
    metrics.watch_disk("data", small_disk / "not-there")
    assert math.isnan(samples(metrics, "fedpeft_disk_free_bytes")[("data",)])


def test_figures_of_updates_are_counted_and_nonsense_is_not() -> None:
    metrics = Metrics()
    metrics.begin(RUN)
    assert samples(metrics, "fedpeft_client_images_per_second_count") == {(RUN,): 0}
    metrics.received(RUN, 1.5, {"loss": 2.0, "images_per_second": 120.0, "gpu_memory_bytes": 3 * 2.0**30})
    metrics.received(RUN, 2.5, {"images_per_second": -5.0})
    assert samples(metrics, "fedpeft_updates_total")["received", RUN] == 2
    assert samples(metrics, "fedpeft_update_norm_count") == {(RUN,): 2}
    assert samples(metrics, "fedpeft_client_images_per_second_sum") == {(RUN,): 120}
    assert samples(metrics, "fedpeft_client_gpu_memory_bytes_count") == {(RUN,): 1}


def client_row(name: str, role: str, last_seen: float) -> ClientRow:
    return ClientRow(name, "ab" * 16, role, b"", last_seen, last_seen)


def named(counts: Mapping[tuple[str, ...], float]) -> Counter[str]:
    """Returns counts under names like trainer_silent; Counters do not care whether a zero is said."""
    return Counter({"_".join(labels): int(value) for labels, value in counts.items()})


async def test_clients_are_counted_by_when_they_last_called() -> None:
    now = time.time()
    ages = {"a": 5, "b": 119, "c": 121, "d": 86_399, "e": 86_401}
    known = [client_row(name, "trainer", now - age) for name, age in ages.items()]
    silences = await Sessions([*known, client_row("judge", "evaluator", now)], 10, TIMING).silences(now)
    counts = Counter(trainer_present=2, trainer_silent=2, trainer_gone=1, evaluator_present=1)
    assert named(silences) == counts
    metrics = Metrics()
    metrics.registered(silences)
    shown = samples(metrics, "fedpeft_registered_clients")
    assert named(shown) == counts
    assert len(shown) == 6
    assert tuple(Silence) == metrics_module._SILENCES


async def test_very_many_clients_are_counted_beside_other_work() -> None:
    now, turns = time.time(), 0

    async def other_work() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    sessions = Sessions([client_row(f"c{number}", "trainer", now) for number in range(20_000)], 20_000, TIMING)
    other = asyncio.create_task(other_work())
    assert named(await sessions.silences(now)) == Counter(trainer_present=20_000)
    other.cancel()
    assert turns >= 20


async def test_a_client_whose_call_is_held_is_present_and_one_that_is_heard_no_more_falls_silent(
    daemon: Daemon,
) -> None:
    a, b = await daemon.clients("a", "b")
    held = asyncio.create_task(b.look())
    async with asyncio.timeout(10):
        while not daemon.server.runs.lobby.is_waiting("b"):
            await asyncio.sleep(0.01)
    silences = daemon.server.sessions.silences
    assert named(await silences(time.time())) == Counter(trainer_present=2)
    assert named(await silences(time.time() + 1000)) == Counter(trainer_present=1, trainer_silent=1)
    held.cancel()
    await asyncio.wait({held})
    await a.register()
    assert named(await silences(time.time())) == Counter(trainer_present=2)


async def test_after_a_restart_a_run_that_is_over_has_gauges_and_counts_nothing(start: StartDaemon) -> None:
    daemon = await start()
    run = await daemon.create()
    assert "fedpeft_rounds" in _by_run(daemon.server.metrics, run.id)
    await daemon.operator.StopRun(op.StopRunRequest(run=run.id))
    await daemon.end()
    again = (await start()).server.metrics
    assert [labels[1] for labels, value in samples(again, "fedpeft_run_state").items() if value] == ["stopped"]
    kinds = {f.type for f in again.registry.collect() for s in f.samples if s.labels.get("run") == run.id}
    assert kinds == {"gauge"}


async def test_a_deleted_run_leaves_no_series(start: StartDaemon) -> None:
    daemon = await start()
    noise = {"clip_norm": 9.0, "mechanism": "central", "noise_multiplier": 20.0, "delta": 1e-5}
    run = await daemon.create(config(rounds={"count": 1, "clients": 1}, privacy=noise))
    (a,) = await daemon.clients("a")
    task = await a.task()
    manifest, data = payload.encode(filled(1.0), SPEC.sent(1), "float32")
    await a.pull(run.id, 0)
    await a.push_raw(header(task.ticket, manifest, images_per_second=10.0, gpu_memory_bytes=1e9), [(0, data)])
    await daemon.until(run.id, lambda r: r.version == 1)
    judge = daemon.client("judge")
    await judge.register(fed.CLIENT_ROLE_EVALUATOR)
    figures = fed.PushEvaluationRequest(run=run.id, version=1, split="test", metrics={"accuracy": 0.5, "loss": 1.0})
    await judge.stub.PushEvaluation(figures, metadata=judge.metadata)
    metrics = daemon.server.metrics
    of_run = _by_run(metrics, run.id)
    declared = {name for name, metric in vars(metrics).items() if "run" in getattr(metric, "_labelnames", ())}
    assert {s.removeprefix("fedpeft_") for s in of_run} >= declared - {"round_opened", "round_deadline", "clients"}
    await daemon.operator.DeleteRun(op.DeleteRunRequest(run=run.id))
    assert _by_run(metrics, run.id) == set()


def _by_run(metrics: Metrics, run: str) -> set[Any]:
    return {f.name for f in metrics.registry.collect() for s in f.samples if s.labels.get("run") == run}


def test_a_daemon_with_certificates_shows_when_they_end(tmp_path: Path) -> None:
    data, port = tmp_path / "data", free_port()
    init = ["--data-dir", str(data), "--host", "127.0.0.1", "--operator-identity", str(tmp_path / "operator")]
    done = subprocess.run([sys.executable, "-m", "fedpeft_server", "init", *init], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with running(data, "--metrics", f"127.0.0.1:{port}"):
        until, shown = time.monotonic() + 10, Samples()
        while len(shown) < 2 and time.monotonic() < until:  # they are read beside the start
            shown = scrape(port).get("fedpeft_certificate_expiry_seconds", {})
    files = Files(data / "identity")
    assert shown == {
        (name,): certificates.load(file)[0].not_valid_after_utc.timestamp()
        for name, file in (("server", files.server), ("authority", files.authority))
    }
