"""The daemon as a process: flags, ports, the data folder, signals, metrics, health."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families
from structlog.testing import capture_logs

from fedpeft.adapters import payload
from fedpeft.errors import SettingsInvalid
from fedpeft.process.start import check_command
from fedpeft_client.commands.table import COMMANDS as CLIENT_COMMANDS
from fedpeft_client.settings import Settings as ClientSettings
from fedpeft_server import app
from fedpeft_server.__main__ import COMMANDS
from fedpeft_server.settings import Settings
from fedpeft_server.timing import TIMING

from ..ports import free_port
from .conftest import SPEC, Daemon, StartDaemon, config, filled, header
from .object_store import ACCESS

LOWER = "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))"


def command(folder: Path, *flags: str, port: int = 0) -> list[str]:
    listen = ["--listen", f"127.0.0.1:{port or free_port()}"]
    return [sys.executable, "-m", "fedpeft_server", "--data-dir", str(folder), *listen, *flags]


def failure(*arguments: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "fedpeft_server", *arguments], capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stderr


@contextmanager
def running(folder: Path, *flags: str, port: int = 0) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(command(folder, *flags, port=port), stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if "serving" in line:
                break
        else:
            pytest.fail(f"the daemon ended with {process.wait()}")
        yield process
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def test_a_low_limit_of_open_files_is_said_at_the_start(tmp_path: Path) -> None:
    limited = [sys.executable, "-c", f"import resource, os; {LOWER}; os.execv(os.sys.argv[1], os.sys.argv[1:])"]
    with subprocess.Popen([*limited, *command(tmp_path / "data")], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if "serving" in line:
                break
        process.terminate()
        assert process.wait(60) == 0
    (warning,) = (line for line in lines if "the limit of open files is low" in line)
    assert "64" in warning and "32" in warning


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], "--data-dir is missing (or FEDPEFT_SERVER_DATA_DIR, or data_dir in the settings file)"),
        (["--data-dir", "d", "--listen", "nowhere"], "--listen: 'nowhere' is not HOST:PORT"),
        (["--data-dir", "d", "--listen", "0.0.0.0:7070"], "is not a loopback address"),
        (["--data-dir", "d", "--max-transfers", "0"], "--max-transfers: Input should be greater than or equal to 1"),
        (
            ["--data-dir", "d", "--max-update-bytes", "9" * 20],
            "--max-update-bytes: Input should be less than or equal to",
        ),
        (["--data-dir", "d", "--unknown"], "--unknown"),
        (["--data-dir", "/proc/nowhere"], "name a folder this user can write"),
        (["--config", "none.toml"], "--config: cannot read none.toml: No such file"),
        (["--data-dir", "d", "--database", "postgresql://u@h:abc/x"], "--database: the port is not a number from 1 to"),
        (["--data-dir", "d", "--database", "sqlite://"], "--database: the database would be in memory"),
        (["--data-dir", "d", "--database", "sqlite:////nowhere/x.db"], "--database: there is no folder /nowhere"),
        (["--data-dir", "d", "--blobs", "s3:/bkt"], "--blobs: an object store is s3://BUCKET"),
        (["--data-dir", "d", "--updates", "http://h/x"], "--updates: http: is none of file://, s3://, gs:// and az://"),
        (["--data-dir", "s3://bkt"], "--data-dir: s3: is not the name of a folder of this machine"),
        (["--data-dir", "d", "--identity", "s3:/bkt"], "--identity: s3: is not the name of a folder of this machine"),
    ],
)
def test_wrong_settings_are_one_sentence_and_exit_code_2(flags: list[str], says: str, tmp_path: Path) -> None:
    code, text = failure(*(str(tmp_path / f) if f == "d" else f for f in flags))
    assert says in text
    assert "Traceback" not in text
    assert code == 2


def test_flags_come_before_the_environment_and_both_before_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "server.toml"
    file.write_text('data_dir = "/from-file"\nmax_transfers = 3\nmax_clients = 3\ndrain_s = 3\n')
    monkeypatch.setenv("FEDPEFT_SERVER_MAX_TRANSFERS", "2")
    monkeypatch.setenv("FEDPEFT_SERVER_MAX_CLIENTS", "2")
    settings = Settings.read(["--config", str(file), "--max-transfers", "1"])
    assert (settings.max_transfers, settings.max_clients, settings.drain_s) == (1, 2, 3)


def test_an_empty_folder_is_none_and_not_the_current_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingsInvalid, match=r"^--data-dir is missing"):
        Settings.read(["--data-dir", ""])
    assert Settings.read(["--data-dir", "d", "--identity", ""]).certificates == Path("d/identity")
    monkeypatch.setenv("FEDPEFT_SERVER_DATA_DIR", "")
    with pytest.raises(SettingsInvalid, match=r"^--data-dir is missing"):
        Settings.read([])


@pytest.mark.parametrize(
    ("word", "remedy"),
    [
        ("chek", "did you mean check?"),
        ("--check", ""),
        ("serve", "the commands are authority, backup, certificate, check, init, restore"),
    ],
)
def test_a_word_that_is_no_command_is_told(word: str, remedy: str) -> None:
    with pytest.raises(SettingsInvalid) if remedy else nullcontext() as caught:
        check_command([word, "--data-dir", "x"], COMMANDS)
    assert caught is None or caught.value.message == f"there is no command {word!r}; {remedy}"
    check_command([], COMMANDS)


def test_the_help_names_every_command() -> None:
    for settings, commands in ((Settings, COMMANDS), (ClientSettings, CLIENT_COMMANDS)):
        (named,) = re.findall(
            r"Commands beside it, each with a --help of its own: ([a-z, ]+)\.", settings.__doc__ or ""
        )
        assert set(named.split(", ")) == set(commands)


def test_ports_and_the_data_folder_belong_to_one_daemon(tmp_path: Path) -> None:
    port, metrics = free_port(), free_port()
    with running(tmp_path / "a", "--metrics", f"127.0.0.1:{metrics}", port=port):
        for folder, flags, says in (
            ("a", ["--metrics", ""], "is in use by another server"),
            (
                "b",
                ["--metrics", "", "--listen", f"127.0.0.1:{port}"],
                f"--listen 127.0.0.1:{port}: the port is in use",
            ),
            ("b", ["--metrics", f"127.0.0.1:{metrics}"], "name another port"),
        ):
            code, text = failure(*command(tmp_path / folder, *flags)[3:])
            assert says in text
            assert code == 2
            assert text.count("\n") == 1, "gRPC's core is silent"


def test_a_file_of_sqlite_belongs_to_one_daemon(tmp_path: Path) -> None:
    (tmp_path / "link.db").symlink_to(tmp_path / "a" / "fedpeft.db")
    with running(tmp_path / "a", "--metrics", ""):
        for path in ("a/fedpeft.db", "b/../a/fedpeft.db", "link.db"):
            (tmp_path / "b").mkdir(exist_ok=True)
            database = ["--database", f"sqlite:///{tmp_path}/{path}"]
            for line in (
                command(tmp_path / "b", "--metrics", "", *database)[3:],
                ["check", "--data-dir", str(tmp_path / "b"), *database],
            ):
                code, text = failure(*line)
                assert f"{tmp_path}/{path} is in use by another server" in text and "only a PostgreSQL" in text
                assert (code, text.count("\n")) == (2, 1)
        backup = ["backup", "--data-dir", str(tmp_path / "b"), *database, "--to", str(tmp_path / "copy")]
        assert failure(*backup) == (0, "")
    for _ in range(2):  # the first ends by SIGKILL
        with running(tmp_path / "b", "--metrics", "", *database):
            pass


def test_a_corrupt_database_is_said(tmp_path: Path) -> None:
    (tmp_path / "fedpeft.db").write_bytes(b"this is no database" * 1000)
    code, text = failure(*command(tmp_path, "--metrics", "")[3:])
    assert "Traceback" not in text
    assert "fedpeft.db" in text
    assert code == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_daemon_with_0(tmp_path: Path, number: signal.Signals) -> None:
    with running(tmp_path, "--metrics", "") as process:
        process.send_signal(number)
        assert process.wait(20) == 0


@pytest.mark.parametrize("place", ["bucket", "database"])
def test_a_signal_ends_a_start_that_gets_no_answer(tmp_path: Path, place: str) -> None:
    """Each of its waits takes 10 seconds, or has no end."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        silent.settimeout(30)
        variables = {**os.environ, **ACCESS, "AWS_ENDPOINT": f"http://{address}"}
        flags = ["--blobs", "s3://versions"] if place == "bucket" else ["--database", f"postgresql://x@{address}/x"]
        starts = command(tmp_path, "--metrics", "", *flags)
        with subprocess.Popen(starts, stderr=subprocess.PIPE, text=True, env=variables) as process:
            asked, _ = silent.accept()
            process.terminate()
            _, text = process.communicate(timeout=9)
            asked.close()
    assert process.returncode == 0 and "serving" not in text and "stopped before it served" in text, text


async def test_a_signal_ends_a_start_that_takes_up_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = asyncio.Event()

    async def hangs(*_: object) -> None:
        begun.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(app, "tell_lost_versions", hangs)
    flags = {"data_dir": tmp_path, "listen": f"127.0.0.1:{free_port()}", "metrics": ""}
    with capture_logs() as lines:
        life = asyncio.create_task(app.run(Settings.model_validate(flags), TIMING))
        async with asyncio.timeout(20):
            await begun.wait()
            os.kill(os.getpid(), signal.SIGTERM)
            await life
    assert [line["event"] for line in lines if line["event"] in ("serving", "stopped")] == ["stopped"]


def uploaded(folder: Path) -> bool:
    """Says whether the first piece of an upload has arrived."""
    return any(part.stat().st_size == 9 for part in (folder / "spool").glob("ticket-*.part"))


async def test_draining_lets_an_upload_finish_and_sends_waiting_clients_away(start: StartDaemon) -> None:
    from fedpeft.adapters import payload
    from fedpeft.v1 import federation_service_pb2 as fed
    from fedpeft.v1 import tensor_pb2

    from .conftest import header

    daemon = await start(drain_s=10)
    run = await daemon.create(config(rounds={"count": 1, "clients": 1}))
    a, b = await daemon.clients("a", "b")
    task = await a.task()
    waiting = asyncio.create_task(b.wait())
    manifest, data = payload.encode(filled(1.0), SPEC.sent(1), "float32")
    halfway = asyncio.Event()

    async def slowly():  # type: ignore[no-untyped-def]
        yield fed.PushUpdateRequest(header=header(task.ticket, manifest))
        yield fed.PushUpdateRequest(chunk=tensor_pb2.Chunk(offset=0, data=data[:9]))
        await halfway.wait()
        yield fed.PushUpdateRequest(chunk=tensor_pb2.Chunk(offset=9, data=data[9:]))

    push = asyncio.ensure_future(a.stub.PushUpdate(slowly(), metadata=a.metadata))
    async with asyncio.timeout(10):
        while not daemon.server.runs.lobby.is_waiting("b"):
            await asyncio.sleep(0.01)
        while not await asyncio.to_thread(uploaded, daemon.server.settings.data_dir):
            await asyncio.sleep(0.01)
    ending = asyncio.create_task(daemon.end())
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await waiting
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    halfway.set()
    assert (await push).sha256 == manifest.sha256
    await ending
    again = await start()
    await again.until(run.id, lambda r: r.version == 1)


def scrape(port: int) -> dict[str, dict[tuple[str, ...], float]]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        families = text_string_to_metric_families(answer.read().decode())
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in families:
        for sample in family.samples:
            labels = tuple(v for k, v in sorted(sample.labels.items()))
            found.setdefault(sample.name, {})[labels] = sample.value
    return found


async def test_gauges_are_the_same_after_a_restart(start: StartDaemon) -> None:
    from fedpeft.v1 import federation_service_pb2 as fed

    gauges = {"fedpeft_accuracy", "fedpeft_loss", "fedpeft_round", "fedpeft_last_round_bytes", "fedpeft_round_bytes"}
    port = free_port()
    daemon = await start(metrics=f"127.0.0.1:{port}")
    run = await daemon.create(config(rounds={"count": 2, "clients": 1}))
    (a,) = await daemon.clients("a")
    judge = daemon.client("judge")
    await judge.register(fed.CLIENT_ROLE_EVALUATOR)
    for version, split, metrics in (
        (0, "test", {"accuracy": 0.25, "loss": 2.0}),
        (0, "other", {"accuracy": 0.5}),
        (0, "test", {"accuracy": 0.75, "loss": 1.0}),
    ):
        figures = fed.PushEvaluationRequest(run=run.id, version=version, split=split, metrics=metrics)
        await judge.stub.PushEvaluation(figures, metadata=judge.metadata)
    task = await a.task()
    await a.pull(run.id, 0)
    manifest, data = payload.encode(filled(1.0), SPEC.sent(1), "float32")
    await a.push_raw(header(task.ticket, manifest, 10, loss=3.0), [(0, data)])
    await daemon.until(run.id, lambda r: r.version == 1)
    assert (await a.task()).round == 2
    before = await asyncio.to_thread(scrape, port)
    await daemon.end()
    await start(metrics=f"127.0.0.1:{port}")
    after = await asyncio.to_thread(scrape, port)
    assert {name: after.get(name) for name in gauges} == {name: before[name] for name in gauges}
    assert after["fedpeft_accuracy"] == {(run.id, "test"): 0.75, (run.id, "other"): 0.5}
    assert after["fedpeft_loss"] == {(run.id, "test"): 1.0, (run.id, "train"): 3.0}
    assert after["fedpeft_last_round_bytes"]["up", run.id] > 4 * SPEC.parameters


async def test_metrics_say_what_happened(start: StartDaemon) -> None:
    port = free_port()
    daemon = await start(metrics=f"127.0.0.1:{port}")
    run = await daemon.create(config(rounds={"count": 1, "clients": 1}))
    (a,) = await daemon.clients("a")
    task = await a.task()
    await a.pull(run.id, 0)
    await a.push(task.ticket, filled(1.0))
    await daemon.until(run.id, lambda r: r.version == 1)

    samples = await asyncio.to_thread(scrape, port)
    size = 4 * SPEC.parameters
    assert samples["fedpeft_payload_bytes_total"] == {
        ("up", "float32", run.id): size,
        ("down", "float32", run.id): size,
    }
    assert samples["fedpeft_wire_bytes_total"]["up", run.id] > size
    assert samples["fedpeft_rounds_total"]["committed", run.id] == 1
    assert samples["fedpeft_updates_total"]["received", run.id] == 1
    assert samples["fedpeft_round"][(run.id,)] == 1
    assert samples["fedpeft_last_round_bytes"]["up", run.id] > size
    assert samples["fedpeft_update_norm_count"][(run.id,)] == 1
    assert samples["fedpeft_round_seconds_count"]["aggregating", run.id] == 1
    assert samples["fedpeft_grpc_requests_total"]["OK", "/fedpeft.v1.FederationService/PushUpdate"] == 1
    text = str(samples)
    assert task.ticket not in text


async def test_health_and_reflection_answer(daemon: Daemon) -> None:
    health = health_pb2_grpc.HealthStub(daemon.channel)
    answer = await health.Check(health_pb2.HealthCheckRequest())
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    async def ask():  # type: ignore[no-untyped-def]
        yield reflection_pb2.ServerReflectionRequest(list_services="")

    async for found in reflection_pb2_grpc.ServerReflectionStub(daemon.channel).ServerReflectionInfo(ask()):
        names = {s.name for s in found.list_services_response.service}
        assert {"fedpeft.v1.FederationService", "fedpeft.v1.OperatorService"} <= names


def test_the_server_runs_without_torch(tmp_path: Path) -> None:
    code = "import sys; import fedpeft_server.app; print([m for m in ('torch', 'timm', 'peft') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
