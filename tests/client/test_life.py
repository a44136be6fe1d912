"""The client as a process: the whole life, and what kills, crashes and restarts do to it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy

from fedpeft.errors import CertificateRevoked, Internal, MetricsInvalid, RoundClosed, VersionRemoved
from fedpeft.v1 import run_pb2
from fedpeft_client.__main__ import run
from fedpeft_client.egress.entries import Kind, Outcome, read
from fedpeft_client.egress.view import rows
from fedpeft_client.timing import TIMING
from fedpeft_client.uplink.retry import FAULT_ATTEMPTS

from .conftest import StartClient, alive, tiny_run, until, write_images
from .federation import Federation

pytestmark = [pytest.mark.timeout(240), pytest.mark.usefixtures("preloaded")]


async def test_takes_part_until_the_run_is_finished(
    federation: Federation, start_client: StartClient, tmp_path: Path
) -> None:
    federation.run = tiny_run(rounds={"count": 3})
    client = await start_client("--once")
    assert await client.ended() == 0, "".join(client.text)
    assert len(federation.run.versions) == 4
    assert [p.error for p in federation.pushes] == ["", "", ""]
    assert [version for version, _, _ in federation.pulled] == [0, 1, 2]
    first, last = federation.run.versions[0], federation.run.versions[-1]
    assert any((first[name] != last[name]).any() for name in first)
    capabilities = federation.registered["site-a"].capabilities
    assert capabilities.examples == 12 and capabilities.device == "cpu"
    assert federation.answers["site-a", federation.run.id].examples == 12
    assert {"bias", "lora"} <= set(capabilities.methods) and "float32" in capabilities.encodings
    trained = client.events("trained")
    assert [line["round"] for line in trained] == [1, 2, 3]
    assert all(line["client"] == "site-a" and line["run"] == federation.run.id for line in trained)
    assert trained[0]["threads"] == 1.0
    assert not (tmp_path / "site-a" / "pending").exists()
    payloads = list((tmp_path / "site-a" / "runs" / federation.run.id).glob("adapter-*"))
    assert len(payloads) == 1, "only the last version is kept"
    assert client.out == b""


async def test_evaluator_scores_every_version(federation: Federation, start_client: StartClient) -> None:
    federation.run = tiny_run()
    evaluator = await start_client("--once", "--evaluate", name="judge")
    trainer = await start_client("--once")
    assert await trainer.ended() == 0
    assert await evaluator.ended() == 0, "".join(evaluator.text)
    assert sorted(federation.run.evaluations) == [0, 1]
    figures = federation.run.evaluations[1]
    assert figures["examples"] == 12 and 0 <= figures["accuracy"] <= 1
    assert {"loss", "accuracy/cat", "accuracy/dog", "accuracy/emu"} <= set(figures)


async def test_killed_in_training_trains_the_ticket_again_to_the_same_bits(
    federation: Federation, start_client: StartClient, tmp_path: Path
) -> None:
    federation.run = tiny_run(training={"steps": 200})
    undisturbed = await start_client("--once", state=tmp_path / "undisturbed")
    assert await undisturbed.ended() == 0, "".join(undisturbed.text)
    expected = federation.pushes[0].sha256

    federation.run, federation.pushes = tiny_run(training={"steps": 200}), []
    federation.instances.clear()
    client = await start_client("--once", "-v")
    await client.said("training begins")
    worker = client.worker()
    await client.kill()
    await until(lambda: not alive(worker))
    assert not federation.pushes
    again = await start_client("--once")
    assert await again.ended() == 0, "".join(again.text)
    assert [p.sha256 for p in federation.pushes] == [expected]
    assert len(federation.run.tickets) == 1


async def test_killed_in_upload_uploads_the_same_bytes_and_does_not_train_again(
    federation: Federation, start_client: StartClient, tmp_path: Path
) -> None:
    """Of the bytes of a day it needs those that the server does not have yet, and no second whole update."""
    federation.run = tiny_run("full")
    federation.chunk_pause_s = 0.3
    policy = tmp_path / "policy.toml"
    policy.write_text("[transfer]\nmax_bytes_a_day = 4_000_000\n")  # an update has 2.4 MB
    client = await start_client("--once", "--policy", str(policy))
    await until(lambda: federation.pushes and federation.pushes[0].received >= 1024 * 1024, client.text)
    await client.kill()
    held = federation.pushes[0].received
    assert not federation.run.finished
    path = tmp_path / "site-a" / "ledger.jsonl"
    (before,) = (row for row in rows(read(path).booked.values()) if row.entry.kind is Kind.UPDATE)
    assert before.outcome is Outcome.OPEN and before.wire_bytes > held, "nobody booked what became of it"
    again = await start_client("--once", "--policy", str(policy))
    assert await again.ended() == 0, "".join(again.text)
    assert not again.events("training begins")
    assert federation.run.finished and len(federation.run.tickets) == 1
    second = federation.pushes[1]
    assert second.offset is not None and second.offset >= 1024 * 1024 and held <= second.offset + 1024 * 1024
    assert {p.sha256 for p in federation.pushes} == {federation.pushes[0].sha256}
    (row,) = (row for row in rows(read(path).booked.values()) if row.entry.kind is Kind.UPDATE)
    assert (len(row.attempts), row.outcome) == (2, Outcome.RECEIVED)
    assert row.entry.said["sha256"] == federation.pushes[0].sha256
    assert row.wire_bytes > sum(push.received for push in federation.pushes), "never less than what left"


async def test_worker_crash_is_recovered(federation: Federation, start_client: StartClient) -> None:
    federation.run = tiny_run(training={"steps": 200})
    client = await start_client("--once")
    await client.said("training begins")
    os.kill(client.worker(), signal.SIGKILL)
    assert await client.ended() == 0, "".join(client.text)
    death = client.events("worker died")
    assert len(death) == 1 and "SIGKILL" in death[0]["cause"]
    assert federation.run.finished and not federation.withdrawn


async def test_worker_that_always_dies_gives_the_ticket_up(federation: Federation, start_client: StartClient) -> None:
    federation.run = tiny_run(training={"steps": 1_000_000})
    client = await start_client("--once")
    await client.said("training begins")
    for deaths in (1, 2, 3):
        os.kill(client.worker(), signal.SIGKILL)
        await until(lambda deaths=deaths: len(client.events("worker died")) == deaths, client.text)
        await until(lambda deaths=deaths: deaths == 3 or client.workers(), client.text)
    await until(lambda: federation.withdrawn, client.text)
    assert "died 3 times" in federation.withdrawn[0].reason


async def test_sigterm_stops_at_once_and_keeps_the_ticket(federation: Federation, start_client: StartClient) -> None:
    federation.run = tiny_run(training={"steps": 1_000_000})
    client = await start_client()
    await client.said("training begins")
    worker = client.worker()
    loop = asyncio.get_running_loop()
    began = loop.time()
    assert await client.kill(signal.SIGTERM) == 0
    assert loop.time() - began < 10
    assert not alive(worker)
    assert not federation.withdrawn
    assert [t.state for t in federation.run.tickets.values()] == [run_pb2.TICKET_STATE_ISSUED]


async def test_server_that_restarts_is_waited_for_without_a_busy_loop(
    federation: Federation, start_client: StartClient, tmp_path: Path
) -> None:
    federation.run = tiny_run(rounds={"clients": 2})
    client = await start_client()
    await client.said("run fits")
    await until(lambda: len(federation.awaited) >= 2, client.text)
    await federation.stop()
    await client.said("server is unavailable")
    await asyncio.sleep(3)
    federation.registered.clear()
    await federation.start()
    await client.said("server is back")
    await client.said("the server was restarted; registering again")
    second = await start_client("--once", name="site-b")
    assert await second.ended() == 0, "".join(second.text)
    assert len(client.events("server is unavailable")) == 1
    assert await client.kill(signal.SIGTERM) == 0
    booked = [read(tmp_path / name / "ledger.jsonl").booked.values() for name in ("site-a", "site-b")]
    told = sum(each.entry.wire_bytes for both in booked for each in both)
    assert told >= federation.arrivals.wire_bytes, "the ledgers never tell less than what left"


async def test_a_run_that_the_server_fails_on_is_left_out_and_another_one_goes_on(
    federation: Federation, start_client: StartClient, tmp_path: Path
) -> None:
    broken, federation.run = tiny_run(), tiny_run()
    broken.id = "run-broken"
    federation.others = [broken]
    federation.fail = {"AnswerOffer": [Internal("StateInvalid") for _ in range(FAULT_ATTEMPTS)]}
    client = await start_client()
    await client.said("the answer to the offer could not be given")
    await client.said("run is skipped for a while because its work keeps failing")
    await client.said("update received")
    assert broken.id in federation.left_out[-1]
    assert await client.kill(signal.SIGTERM) == 0


async def test_a_version_that_cannot_be_scored_is_given_up_and_later_ones_go_on(
    federation: Federation, start_client: StartClient, tmp_path: Path
) -> None:
    federation.run = tiny_run()
    federation.run.versions.append(federation.run.versions[0])
    federation.fail = {"PushEvaluation": [MetricsInvalid("the figure loss is -1")]}
    client = await start_client("--evaluate", "--once")
    await client.said("version is given up; the others go on")
    assert await client.ended() == 0, "".join(client.text)
    assert federation.run.failures == {0: "METRICS_INVALID: the figure loss is -1"}
    assert "accuracy" in federation.run.evaluations[1]
    booked = read(tmp_path / "site-a" / "ledger.jsonl").booked.values()
    words = [row.text() for row in rows(booked) if row.entry.kind is Kind.EVALUATION]
    assert words[1] == "version 0 cannot be scored: METRICS_INVALID: the figure loss is -1"


async def test_a_version_that_the_server_removed_meanwhile_is_no_error_of_an_evaluator(
    federation: Federation, start_client: StartClient
) -> None:
    """It was stopped for a while, and the server keeps the newest few."""
    federation.run = tiny_run()
    federation.fail = {"PullAdapter": [VersionRemoved("version 0 was removed by the server's retention")]}
    client = await start_client("--evaluate")
    await client.said("evaluated")
    assert [event["level"] for event in client.events("version is not scored")] == ["warning"]
    assert federation.run.failures == {}


async def test_a_version_is_scored_once_the_state_directory_can_be_written_again(
    federation: Federation, start_client: StartClient, tmp_path: Path
) -> None:
    """Three attempts within a second, at a disk that was full for a second, gave the version up for good."""
    federation.run = tiny_run()
    in_the_way = tmp_path / "site-a" / "runs" / federation.run.id
    in_the_way.parent.mkdir(parents=True)
    in_the_way.write_text("a folder cannot be made here")
    timing = {"first_hold_s": 0.1, "longest_hold_s": 0.1, "first_pause_s": 0.05, "longest_pause_s": 0.1}
    client = await start_client("--evaluate", timing=timing)
    await until(lambda: len(client.events("version is not scored")) > 3 or federation.run.failures, client.text)
    in_the_way.unlink()
    await client.said("evaluated")
    assert federation.run.failures == {}
    assert "accuracy" in federation.run.evaluations[0]


async def test_late_update_grows_the_residual_and_the_next_update(
    federation: Federation, start_client: StartClient, tmp_path: Path
) -> None:
    federation.run = tiny_run(codec={"up": "sparse", "density": 0.1})
    federation.refuse_push = [RoundClosed("too late")]
    client = await start_client("--once")
    await client.said("update was not counted")
    await client.said("update received")
    assert await client.ended() == 0
    residual = tmp_path / "site-a" / "runs" / federation.run.id / "residual.safetensors"
    left = safetensors.numpy.load_file(residual)
    total = sum(tensor.size for tensor in federation.run.spec.sent(1))
    nonzero = sum(np.count_nonzero(values) for values in left.values())
    assert 0.5 * total < nonzero <= total


def test_unreachable_server_ends_a_dry_run_with_code_3(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fedpeft_client.app.TIMING", replace(TIMING, first_answer_s=0.5))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    flags = ["--server", f"127.0.0.1:{port}", "--name", "site-a", "--data", str(data), "--dry-run"]
    assert run([*flags, "--state-dir", str(tmp_path / "state"), "--device", "cpu"]) == 3
    assert "nothing listens on port" in capsys.readouterr().err.splitlines()[-1]


async def test_dry_run_says_what_would_happen(federation: Federation, start_client: StartClient) -> None:
    federation.run = tiny_run()
    client = await start_client("--dry-run")
    assert await client.ended() == 0, "".join(client.text)
    text = client.out.decode()
    size = 4 * sum(tensor.size for tensor in federation.run.spec.sent(1))
    assert f"{size:,} bytes" in text and "cat 4, dog 4, emu 4" in text and "bias" in text
    assert "all 12 can be read" in text
    assert not federation.run.tickets and not federation.registered and not federation.answers


async def test_dry_run_judges_the_runs_of_every_page(federation: Federation, start_client: StartClient) -> None:
    other, federation.run = tiny_run(), tiny_run()
    other.id, other.fingerprint = "run-000000000002", "ab" * 32
    federation.others = [other]
    client = await start_client("--dry-run")
    assert await client.ended() == 0, "".join(client.text)
    text = client.out.decode()
    assert text.index(other.id) < text.index("decline it") < text.index(federation.run.id) < text.index("train in each")


async def test_dry_run_where_no_run_is_to_be_worked_for(federation: Federation, start_client: StartClient) -> None:
    """A completed run may be there: the server names those that want work."""
    client = await start_client("--dry-run")
    assert await client.ended() == 0, "".join(client.text)
    lines = client.out.decode().splitlines()
    assert "      runs  there is none to work for; the client would wait for one" in lines
    assert any(line.startswith("    device  cpu, 1 thread, torch ") for line in lines)


async def test_dry_run_of_a_client_that_is_not_let_in_loads_nothing(
    federation: Federation, start_client: StartClient
) -> None:
    federation.refuse_register = [CertificateRevoked("the certificates of client site-a were revoked")]
    client = await start_client("--dry-run")
    assert await client.ended() == 5
    assert client.text == ["fedpeft-client: the certificates of client site-a were revoked\n"]


async def test_first_line_says_what_is_being_done_before_anything_slow(
    federation: Federation, start_client: StartClient, data: Path
) -> None:
    """Loading torch takes a minute on a busy machine; until then there was not a word, and then a warning."""
    client = await start_client()
    await client.said("registered")
    first = json.loads(client.text[0])
    assert (first["event"], first["level"], first["data"]) == ("loading torch and the data", "info", str(data))


async def test_other_frozen_weights_are_refused_with_both_fingerprints(
    federation: Federation, start_client: StartClient
) -> None:
    federation.run = tiny_run()
    own, federation.run.fingerprint = federation.run.fingerprint, "ab" * 32
    client = await start_client("--once")
    assert await client.ended() == 4
    assert own in client.text[-1] and "ab" * 32 in client.text[-1]
    assert not federation.run.tickets


async def test_client_declines_a_run_that_does_not_suit_and_goes_on_to_the_next(
    federation: Federation, start_client: StartClient
) -> None:
    misfit, federation.run = tiny_run(), tiny_run()
    misfit.id, misfit.fingerprint = "run-misfit", "ab" * 32
    federation.others = [misfit]
    client = await start_client("--once")
    assert await client.ended() == 0, "".join(client.text)
    assert federation.run.finished and not misfit.tickets
    ((_, declined, (reason,)),) = federation.declines
    assert declined == "run-misfit" and "ab" * 32 in reason


async def test_client_that_waits_for_ever_declines_once_and_stays(
    federation: Federation, start_client: StartClient
) -> None:
    federation.run = tiny_run()
    federation.run.fingerprint = "ab" * 32
    client = await start_client()
    await until(lambda: len(federation.awaited) >= 3, client.text)
    assert len(federation.declines) == 1 and not federation.run.tickets
    assert await client.kill(signal.SIGTERM) == 0


async def test_run_that_was_asked_for_and_does_not_suit_ends_the_client(
    federation: Federation, start_client: StartClient
) -> None:
    misfit, federation.run = tiny_run(), tiny_run()
    misfit.id, misfit.fingerprint = "run-misfit", "ab" * 32
    federation.others = [misfit]
    client = await start_client("--run", "run-misfit")
    assert await client.ended() == 4
    assert len(federation.declines) == 1


async def test_evaluator_declines_an_old_run_and_scores_the_new_one(
    federation: Federation, start_client: StartClient
) -> None:
    old, federation.run = tiny_run(), tiny_run()
    old.id, old.fingerprint = "run-old", "ab" * 32
    old.versions.append(old.versions[0])
    federation.others = [old]
    evaluator = await start_client("--once", "--evaluate", name="judge")
    trainer = await start_client("--once")
    assert await trainer.ended() == 0
    assert await evaluator.ended() == 0, "".join(evaluator.text)
    assert sorted(federation.run.evaluations) == [0, 1]
    assert [(client, run) for client, run, _ in federation.declines] == [("judge", "run-old")]


async def test_class_that_the_run_does_not_have_is_named(
    federation: Federation, start_client: StartClient, data: Path
) -> None:
    federation.run = tiny_run()
    write_images(data, classes=("cat", "dog", "wolf"))
    client = await start_client("--dry-run")
    assert await client.ended() == 4
    assert "'wolf'" in client.text[-1]
    said = client.out.decode() + "".join(client.text)
    assert said.count("'wolf'") == 1, said
    assert "decline it: DATA_INVALID" in client.out.decode()


async def test_unreadable_images_end_the_client_and_their_names_stay_here(
    federation: Federation, start_client: StartClient, data: Path
) -> None:
    federation.run = tiny_run()
    table = pq.read_table(data).to_pydict()
    broken = [{"bytes": b"no image", "path": image["path"]} for image in table["image"]]
    pq.write_table(pa.table({"image": broken, "label": table["label"]}), data)
    client = await start_client("--once")
    assert await client.ended() == 4
    assert "of 12 images cannot be read" in client.text[-1] and data.name in client.text[-1]
    ((_, _, reasons),) = federation.declines
    (ticket,) = federation.run.tickets.values()
    assert reasons == ["its images cannot be used as they are"] == [ticket.reason]


async def test_data_that_stops_suiting_under_way_declines_the_run_and_gives_the_ticket_back(
    federation: Federation, start_client: StartClient, data: Path
) -> None:
    """The worker reads the data anew after a crash; by then they are others."""
    federation.run = tiny_run(training={"steps": 1_000_000})
    client = await start_client("--once")
    await client.said("training begins")
    write_images(data, classes=("cat", "dog", "wolf"))
    os.kill(client.worker(), signal.SIGKILL)
    assert await client.ended() == 4, "".join(client.text)
    assert "'wolf'" in client.text[-1]
    (ticket,) = federation.run.tickets.values()
    assert ticket.state == run_pb2.TICKET_STATE_WITHDRAWN
    assert "wolf" not in ticket.reason and not federation.withdrawn


async def test_dry_run_names_the_images_that_cannot_be_read(
    federation: Federation, start_client: StartClient, data: Path
) -> None:
    federation.run = tiny_run()
    table = pq.read_table(data).to_pydict()
    table["image"][7]["bytes"] = table["image"][7]["bytes"][:60]
    pq.write_table(pa.table(table), data)
    client = await start_client("--dry-run")
    assert await client.ended() == 4
    text = client.out.decode()
    assert "1 of 12 cannot be read:" in text and "row 7 (7.png): image file is truncated" in text
    assert "1 of 12 images cannot be read, more than 1%" in client.text[-1]
    assert not federation.registered


async def test_data_that_is_not_there_ends_the_client(
    federation: Federation, start_client: StartClient, data: Path
) -> None:
    os.unlink(data)
    client = await start_client("--once")
    assert await client.ended() == 4
    assert client.text[-1] == f"fedpeft-client: there is no data at {data}\n"


async def test_second_process_of_a_state_directory_or_of_an_id_is_refused(
    federation: Federation, start_client: StartClient, tmp_path: Path
) -> None:
    first = await start_client()
    await first.said("registered")
    same_state = await start_client()
    assert await same_state.ended() == 1
    assert f"(process {first.pid})" in same_state.text[-1]
    same_id = await start_client(state=tmp_path / "elsewhere")
    assert await same_id.ended() == 1
    assert "another live instance" in same_id.text[-1]


@pytest.mark.parametrize("command", ["enroll", "ledger", "status"])
def test_a_short_command_imports_no_numpy(command: str) -> None:
    code = f"import sys, fedpeft_client.commands.{command}; print([m for m in ('torch', 'numpy') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert out.stdout == b"[]\n"


def test_agent_imports_no_torch() -> None:
    code = "import sys, json, fedpeft_client.app; print(json.dumps([m for m in ('torch', 'timm') if m in sys.modules]))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert json.loads(out.stdout) == []
