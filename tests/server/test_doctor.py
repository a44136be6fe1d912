"""`fedpeft doctor`: each fault is made for real, and named with its cure; a set-up that is well has none."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import socket
import sqlite3
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest

from fedpeft import PROTOCOL
from fedpeft.identity import authority as authority_module
from fedpeft.identity import folder, keys
from fedpeft.identity.authority import Authority
from fedpeft.identity.subject import Role, Subject
from fedpeft.process.mounts import Mount
from fedpeft.v1 import operator_service_pb2 as op
from fedpeft_operator.app import main
from fedpeft_operator.doctor import client_side, disk, findings, network, server_side, versions
from fedpeft_operator.doctor.checks import examine
from fedpeft_operator.doctor.findings import Finding, Level, Setup
from fedpeft_operator.doctor.server_state import NAMED
from fedpeft_server.commands import init

from ..ports import free_port
from .conftest import StartDaemon
from .secured import Federation

pytestmark = pytest.mark.usefixtures("preloaded")

DAY = timedelta(days=1)


@pytest.fixture(autouse=True)
def _at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


def bad(setup: Setup) -> list[Finding]:
    return [finding for finding in examine(setup) if finding.level is not Level.OK]


def only(setup: Setup, check: str) -> Finding:
    (found,) = [finding for finding in bad(setup) if finding.check == check]
    assert found.cure
    return found


def enrolled(authority: Authority, where: Path, server: str, life: timedelta = DAY) -> Path:
    key = folder.take_key(where)
    chain = [authority.issue(Subject(Role.CLIENT, "noto"), key.public_key(), life)]
    folder.write(where, server, [authority.certificate], chain)
    return where


def free_ports() -> dict[str, str]:
    return {"listen": f"127.0.0.1:{free_port()}", "metrics": f"127.0.0.1:{free_port()}"}


# What is well


def test_a_machine_with_nothing_set_up_is_well() -> None:
    assert bad(Setup()) == []


def test_a_server_that_was_just_set_up_is_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data"
    init.main(["--data-dir", str(data), "--operator", "ada", "--operator-identity", str(tmp_path / "ada")])
    assert [f for f in bad(Setup(data_dir=data, **free_ports())) if f.check != "data folder"] == []


async def test_a_server_that_runs_and_whoever_calls_it_are_well(secured: Federation, tmp_path: Path) -> None:
    setup = Setup(server=secured.address, identity=secured.operator.folder)
    assert await asyncio.to_thread(bad, setup) == []
    state = enrolled(secured.authority, tmp_path / "state" / "identity", secured.address).parent
    found = await asyncio.to_thread(lambda: list(examine(Setup(state_dir=state))))
    said = {finding.text for finding in found if finding.check == "server"}
    assert f"{secured.address} is reached over TLS 1.3, and it takes this certificate" in said
    assert "it is serving" in said
    data_dir = tmp_path / "data"
    server = Setup(data_dir=data_dir, listen=secured.address, metrics="")
    found = await asyncio.to_thread(lambda: list(examine(server)))
    assert any(finding.text == f"a server runs on {data_dir} (process {os.getpid()})" for finding in found)
    assert [finding for finding in found if finding.check == "ports" and finding.level is not Level.OK] == []
    assert any("has schema" in finding.text and finding.level is Level.OK for finding in found)


async def test_plain_text_on_this_machine_is_well(start: StartDaemon) -> None:
    daemon = await start()
    assert await asyncio.to_thread(bad, Setup(server=daemon.server.settings.listen)) == []


async def test_paused_runs_and_full_disks_of_a_running_server_are_said(start: StartDaemon, tmp_path: Path) -> None:
    daemon = await start(tmp_path / "data", min_free_bytes=0)
    server = Setup(server=daemon.server.settings.listen)
    runs = [(await daemon.create(request_id=str(number))).id for number in range(NAMED + 2)]
    for number, run in enumerate(runs):
        await daemon.operator.PauseRun(op.PauseRunRequest(run=run, reason=f"reason {number}"))
    found = await asyncio.to_thread(bad, server)
    assert [finding.check for finding in found] == ["runs"] * (NAMED + 1)
    assert found[0].text == f"{runs[0]} (run) is paused: reason 0" and found[0].cure.startswith("fedpeft run resume")
    assert found[-1].text == "2 more runs are paused"
    await daemon.end()
    daemon = await start(tmp_path / "data", min_free_bytes=2**62)
    found = await asyncio.to_thread(bad, Setup(server=daemon.server.settings.listen))
    assert found[0].check == "server disk" and "uploads and new runs are refused" in found[0].text


# Identity and network


def test_an_identity_that_cannot_be_used_is_one_fault(tmp_path: Path) -> None:
    where = enrolled(Authority.make("x"), tmp_path / "state" / "identity", "127.0.0.1:1")
    folder.key_path(where).chmod(0o644)
    assert [finding.check for finding in bad(Setup(state_dir=tmp_path / "state"))] == ["identity"]
    folder.key_path(where).chmod(0o600)
    (where / "identity.toml").write_text("")
    assert [finding.check for finding in bad(Setup(state_dir=tmp_path / "state"))] == ["identity"]


async def test_an_ended_certificate_is_one_fault(secured: Federation, tmp_path: Path) -> None:
    life = timedelta(minutes=-5)
    state = enrolled(secured.authority, tmp_path / "state" / "identity", secured.address, life).parent
    found = await asyncio.to_thread(bad, Setup(state_dir=state))
    assert [finding.check for finding in found] == ["certificate"]


async def test_a_clients_identity_is_none_for_commands(secured: Federation, tmp_path: Path) -> None:
    where = enrolled(secured.authority, tmp_path / "state" / "identity", secured.address)
    found = await asyncio.to_thread(only, Setup(identity=where), "identity")
    assert (
        found.level is Level.FAULT
        and "is the identity of client noto, which fedpeft's commands cannot use" in found.text
    )
    assert found.cure.startswith("fedpeft-client --identity") and "fedpeft enroll" in found.cure
    for client in (Setup(identity=where, data=tmp_path), Setup(state_dir=tmp_path / "state")):
        found_there = await asyncio.to_thread(bad, client)
        assert [finding for finding in found_there if finding.check == "identity"] == []


async def test_an_operators_identity_is_none_for_a_client(secured: Federation, tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    secured.operator.folder.rename(tmp_path / "state" / "identity")
    found = await asyncio.to_thread(only, Setup(state_dir=tmp_path / "state"), "identity")
    assert found.level is Level.FAULT and "operator ada, which cannot take part in runs" in found.text
    assert "fedpeft-client enroll" in found.cure and "--role client" in found.cure


async def test_the_servers_clock_and_protocol_are_asked(
    secured: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = Setup(server=secured.address, identity=secured.operator.folder)
    said = {finding.text for finding in await asyncio.to_thread(lambda: list(examine(setup)))}
    assert f"it speaks protocol {PROTOCOL}, and its clock agrees with the one here" in said
    for seconds, how in ((-600, "10 minutes behind"), (600, "10 minutes ahead of")):
        secured.server.health.clock = lambda seconds=seconds: time.time() + seconds  # type: ignore[misc]
        found = await asyncio.to_thread(only, setup, "clock")
        assert found.level is Level.WARNING and f"the server's clock is {how} the one here" in found.text
    secured.server.health.clock = time.time
    monkeypatch.setattr(network, "PROTOCOL", PROTOCOL + 1)
    found = await asyncio.to_thread(only, setup, "protocol")
    assert found.level is Level.FAULT
    assert f"the server speaks protocol {PROTOCOL}, fedpeft here {PROTOCOL + 1}" in found.text
    monkeypatch.setattr(network, "PROTOCOL", PROTOCOL)
    monkeypatch.setattr(network, "parse", lambda metadata: None)
    found = await asyncio.to_thread(only, setup, "protocol")
    assert found.level is Level.WARNING and "does not say which protocol it speaks" in found.text


async def test_a_revoked_client(secured: Federation, tmp_path: Path) -> None:
    state = enrolled(secured.authority, tmp_path / "state" / "identity", secured.address).parent
    channel = secured.certificate(Role.CLIENT, "noto")
    await channel.channel_ready()
    await secured.enroll(await secured.token("noto"))
    await secured.revoke(Role.CLIENT, "noto")
    found = await asyncio.to_thread(only, Setup(state_dir=state), "server")
    assert found.level is Level.FAULT and "revoked" in found.text


def test_a_port_that_is_closed(tmp_path: Path) -> None:
    port = free_port()
    where = enrolled(Authority.make("x"), tmp_path / "identity", f"127.0.0.1:{port}")
    found = only(Setup(identity=where), "server")
    assert (found.level, found.cure[:20]) == (Level.FAULT, "start fedpeft-server")
    assert f"nothing listens on port {port}" in found.text


def test_an_ended_certificate_and_an_open_key(tmp_path: Path) -> None:
    where = enrolled(Authority.make("x"), tmp_path / "identity", "127.0.0.1:1", timedelta(minutes=-5))
    found = only(Setup(identity=where), "certificate")
    assert found.level is Level.FAULT and found.cure == "enroll again with a new token"
    folder.key_path(where).chmod(0o644)
    (first, *_) = bad(Setup(identity=where))
    assert (first.check, first.level) == ("identity", Level.FAULT)
    assert "mode 0644" in first.text + first.cure and "chmod 600" in first.text + first.cure


def test_a_certificate_that_nobody_renewed(tmp_path: Path) -> None:
    where = enrolled(Authority.make("x"), tmp_path / "identity", "127.0.0.1:1", timedelta(minutes=1))
    found = only(Setup(identity=where), "certificate")
    assert found.level is Level.WARNING and "was not renewed half-way" in found.text


def test_an_authority_that_ends_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(authority_module, "AUTHORITY_LIFE", 9 * DAY)
    where = enrolled(Authority.make("x"), tmp_path / "identity", "127.0.0.1:1")
    assert only(Setup(identity=where), "authority").level is Level.WARNING


def test_an_identity_that_is_not_there(tmp_path: Path) -> None:
    found = bad(Setup(identity=tmp_path / "nothing"))
    assert found[0].check == "identity" and "enroll first" in found[0].text + found[0].cure


def test_the_personal_identity_is_looked_at_for_its_own_server_only(tmp_path: Path) -> None:
    where = enrolled(Authority.make("x"), tmp_path / "config" / "fedpeft" / "identity", "127.0.0.1:1")
    assert Setup().identity_folder == Setup(server="127.0.0.1:1").identity_folder == where
    assert Setup(server="127.0.0.1:2").identity_folder is None
    assert Setup(data_dir=tmp_path).identity_folder is None
    assert Setup(state_dir=tmp_path).identity_folder is None


def test_a_site_is_examined_with_its_own_identity_whatever_the_operator_s_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    operator, site = tmp_path / "operator", tmp_path / "state" / "identity"
    init.main(["--data-dir", str(tmp_path / "data"), "--operator", "ada", "--operator-identity", str(operator)])
    enrolled(Authority.make("x"), site, "127.0.0.1:1")
    monkeypatch.setenv("FEDPEFT_IDENTITY", str(operator))

    def looked_at(*arguments: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit):
            main([*arguments, "--json"])
        found = json.loads(capsys.readouterr().out)
        return " ".join(finding["text"] for finding in found if finding["check"] == "identity")

    assert f"client noto for 127.0.0.1:1, in {site}" in looked_at("doctor", "--state-dir", str(tmp_path / "state"))
    monkeypatch.setenv("FEDPEFT_CLIENT_IDENTITY", str(site))
    assert f"in {site}" in looked_at("doctor", "--state-dir", str(tmp_path / "elsewhere"))
    named = looked_at("--identity", str(operator), "doctor", "--state-dir", str(tmp_path / "state"))
    assert f"{operator} is the identity of operator ada, which cannot take part in runs" in named


def test_a_server_certificate_of_another_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data"
    init.main(["--data-dir", str(data), "--operator", "ada", "--operator-identity", str(tmp_path / "ada")])
    key = data / "identity" / "server.key"
    key.write_bytes(keys.to_pem(keys.make()))
    assert only(Setup(data_dir=data, **free_ports()), "certificates").cure == "fedpeft-server init"
    (data / "identity" / "server.pem").unlink()
    lost = only(Setup(data_dir=data, **free_ports()), "certificates")
    assert lost.level is Level.FAULT and "has server.key, authority.key, authority.pem but no server.pem" in lost.text


def test_a_server_certificate_without_host_names(tmp_path: Path) -> None:
    data = tmp_path / "data"
    init.main(["--data-dir", str(data), "--operator", "ada", "--operator-identity", str(tmp_path / "ada")])
    for ending in ("pem", "key"):  # an authority's own has none
        (data / "identity" / f"server.{ending}").write_bytes((data / "identity" / f"authority.{ending}").read_bytes())
    found = only(Setup(data_dir=data, **free_ports()), "certificates")
    assert found.level is Level.FAULT and "server.pem is made out to no host name" in found.text


# Disk and server


def test_a_disk_that_is_nearly_full(small_disk: Path) -> None:
    found = only(Setup(data_dir=small_disk, **free_ports()), "data folder")
    assert found.level is Level.FAULT and "almost none" in found.text
    assert list(small_disk.iterdir()) == [], "nothing is left behind"


def test_a_folder_that_cannot_be_written() -> None:
    found = only(Setup(data_dir=Path("/proc/nowhere"), **free_ports()), "data folder")
    assert found.level is Level.FAULT and "cannot be written" in found.text


@pytest.mark.parametrize(("field", "check"), [("data_dir", "data folder"), ("state_dir", "state folder")])
def test_a_folder_that_is_not_there(tmp_path: Path, field: str, check: str) -> None:
    found = [each for each in bad(Setup(**{field: tmp_path / "nope"}, **free_ports())) if "nope" in each.text]
    assert [(each.check, each.level, each.text) for each in found] == [
        (check, Level.WARNING, f"{tmp_path / 'nope'} is not there")
    ]
    assert "first start" in found[0].cure and not (tmp_path / "nope").exists()


def test_the_use_of_a_folder_is_said_and_a_folder_of_versions_elsewhere_is_looked_at(
    tmp_path: Path, small_disk: Path
) -> None:
    data, blobs = tmp_path / "data", small_disk / "blobs"
    for folder_ in (data, blobs):
        folder_.mkdir()
        (folder_ / "file").write_bytes(bytes(2048))
    found = list(examine(Setup(data_dir=data, blobs=f"file://{blobs}", **free_ports())))
    (said,) = [finding.text for finding in found if finding.check == "data folder" and str(data) in finding.text]
    assert f"{data}, 2.0 KiB in use, " in said
    (full,) = [finding for finding in found if finding.check == "blobs"]
    assert full.level is Level.FAULT and "free of 1.00 MiB" in full.text
    in_bucket = examine(Setup(data_dir=data, blobs="s3://bucket/fedpeft", **free_ports()))
    assert [finding for finding in in_bucket if finding.check == "blobs"] == []
    (torn,) = [f for f in examine(Setup(data_dir=data, blobs="s3:/bucket", **free_ports())) if f.check == "blobs"]
    assert torn.level is Level.FAULT and "s3://BUCKET/FOLDER" in torn.text


def test_a_disk_that_is_full_is_not_given_to_another_user(small_disk: Path) -> None:
    with (small_disk / "ballast").open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while True:
            file.write(bytes(4096))
    found = only(Setup(data_dir=small_disk, **free_ports()), "data folder")
    assert found.level is Level.FAULT and "No space left" in found.text
    assert found.cure == "free some space, or take a larger disk"


def test_a_slow_disk_and_a_remote_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "SLOW_S", 0.0)
    assert any("every update waits for one" in f.cure for f in bad(Setup(state_dir=tmp_path)))
    monkeypatch.setattr(disk, "mount_of", lambda folder: Mount("server:/export", "/", "nfs4"))
    assert any(f"{tmp_path} is on nfs4" in f.text for f in bad(Setup(state_dir=tmp_path)))


def test_few_open_files(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    try:
        assert "LimitNOFILE" in only(Setup(data_dir=tmp_path, **free_ports()), "open files").cure
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_databases(tmp_path: Path) -> None:
    path = tmp_path / "fedpeft.db"
    setup = Setup(data_dir=tmp_path, **free_ports())
    path.write_bytes(b"no database" * 999)
    assert "file is not a database" in only(setup, "database").text
    path.unlink()
    newest = server_side.newest_schema()
    assert newest is not None and newest.isdigit()
    for schema, level in ((newest, Level.OK), ("0001", Level.OK), ("9999", Level.FAULT)):
        with sqlite3.connect(path) as database:
            database.execute("create table if not exists alembic_version (version_num text)")
            database.execute("delete from alembic_version")
            database.execute("insert into alembic_version values (?)", (schema,))
        database.close()
        (found,) = [f for f in server_side.check_database(setup)]
        assert found.level is level, found
    away = Setup(data_dir=tmp_path, database=f"postgresql://postgres:secret@127.0.0.1:{free_port()}/x", **free_ports())
    found = only(away, "database")
    assert found.level is Level.FAULT and "secret" not in found.text
    torn = Setup(data_dir=tmp_path, database="postgresql://postgres:se@c:ret@127.0.0.1/x", **free_ports())
    found = only(torn, "database")
    assert found.level is Level.FAULT and "percent-encoded" in found.text and "ret" not in found.text.split()


def test_postgresql_is_reached(postgres: Path, tmp_path: Path) -> None:
    for scheme in ("postgresql", "postgresql+psycopg"):
        setup = Setup(data_dir=tmp_path, database=f"{scheme}://postgres@/postgres?host={postgres}")
        (found,) = server_side.check_database(setup)
        assert found.text == "PostgreSQL is reached; its tables are made at the first start"


def test_ports_that_others_have(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        found = only(Setup(data_dir=tmp_path, listen=address, metrics=""), "ports")
        assert found.level is Level.FAULT and f"--listen {address}: Address already in use" in found.text
        found = only(Setup(data_dir=tmp_path, listen=free_ports()["listen"], metrics=address), "ports")
        assert f"--metrics {address}: Address already in use" in found.text


def test_the_last_port_has_none_after_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data"
    init.main(["--data-dir", str(data), "--operator", "ada", "--operator-identity", str(tmp_path / "ada")])
    found = only(Setup(data_dir=data, listen="127.0.0.1:65535", metrics=""), "ports")
    assert found.level is Level.WARNING and "leaves no port after it" in found.text


# Client


def test_what_is_wrong_with_a_state_directory(tmp_path: Path) -> None:
    (tmp_path / "instance").write_text("none")
    assert only(Setup(state_dir=tmp_path), "state").cure == f"rm {tmp_path / 'instance'}"
    (tmp_path / "instance").write_text("0" * 32)
    (tmp_path / "policy.toml").write_text("= 1")
    assert only(Setup(state_dir=tmp_path), "policy").level is Level.FAULT


def test_data_that_cannot_be_used(tmp_path: Path) -> None:
    found = only(Setup(data=tmp_path / "nowhere"), "data")
    assert found.level is Level.FAULT and "there is no data at" in found.text + found.cure
    for number in range(4):
        (tmp_path / "images" / "cat").mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / "cat" / f"{number}.png").write_bytes(b"no image")
    found = only(Setup(data=tmp_path / "images"), "data")
    assert found.level is Level.WARNING and "4 of 4 images that were opened cannot be read" in found.text


def test_a_device_that_is_not_there() -> None:
    (found,) = client_side.check_device(Setup(data=Path("d"), device="cuda:99"))
    assert found.level is Level.FAULT and "there is no device cuda:99" in found.text


def test_weights_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (found,) = client_side.check_weights(Setup(state_dir=tmp_path))
    assert found.level is Level.WARNING and found.cure == "give the client a file: --weights"
    (tmp_path / "models--timm--vit_small").mkdir()
    (found,) = client_side.check_weights(Setup(state_dir=tmp_path))
    assert found == findings.ok("weights", f"vit_small in {tmp_path}")


# Versions


def test_versions_are_compared_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    assert versions.numbers("1.100.0rc1") > versions.numbers("1.85.1") > versions.numbers("1.9")
    required = dict(versions.requirements(""))
    assert required["grpcio"] == "1.85.1" and "torch" not in required
    assert dict(versions.requirements("train"))["torch"] == "2.6"
    monkeypatch.setattr(versions, "requirements", lambda extra: [("grpcio", "99.0"), ("no-such-package", "1")])
    old, missing = [f for f in versions.check_versions(Setup()) if f.level is Level.FAULT]
    assert "is older than 99.0, which this version needs" in old.text and old.cure.startswith("pip install")
    assert missing.text == "no-such-package is not installed"


# The command


async def test_the_command(tmp_path: Path) -> None:
    async def run(*arguments: str) -> tuple[int | None, str, str]:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "fedpeft_operator.app", *arguments),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await process.communicate()
        return process.returncode, out.decode(), err.decode()

    code, out, _ = await run("doctor")
    assert code == 0 and out.endswith("no faults, no warnings\n") and out.startswith("ok      fedpeft       ")
    code, out, _ = await run("--server", f"127.0.0.1:{free_port()}", "doctor")
    assert code == 1 and "\n                      do: start fedpeft-server" in out
    assert out.endswith("1 fault, no warnings\n")
    code, out, _ = await run("--identity", str(tmp_path / "none"), "doctor", "--json")
    assert code == 1
    assert {row["level"] for row in json.loads(out)} == {"ok", "fault"}
    code, _, err = await run("--server", "nowhere", "doctor")
    assert code == 2 and "is not HOST:PORT" in err
