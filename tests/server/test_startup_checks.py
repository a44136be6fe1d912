"""Messages of a server at its start about what was lost since it last ran."""

from __future__ import annotations

import asyncio
import re
import shutil
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from fedpeft.errors import SettingsInvalid
from fedpeft.identity.roles import TO_PROTO
from fedpeft.identity.subject import Role, Subject
from fedpeft.v1 import access_service_pb2 as access
from fedpeft.v1 import access_service_pb2_grpc as access_grpc
from fedpeft.v1 import operator_service_pb2 as op
from fedpeft_server import app
from fedpeft_server.commands import authority, init
from fedpeft_server.settings import Settings
from fedpeft_server.store.database import Database
from fedpeft_server.store.rows import TokenRow
from fedpeft_server.timing import TIMING

from .conftest import StartDaemon, config, filled
from .secured import federation


@pytest.mark.parametrize("left", ["server.key", "authority.key", "authority.pem"])
def test_what_is_left_of_certificates_is_no_reason_for_plain_text(tmp_path: Path, left: str) -> None:
    init.main(["--data-dir", str(tmp_path), "--operator-identity", str(tmp_path / "me"), "--operator", "ada"])
    folder = tmp_path / "identity"
    for path in folder.iterdir():
        if path.name != left:
            path.unlink()
    for flags in ([], ["--insecure"], ["--identity", str(folder)]):
        with pytest.raises(SettingsInvalid, match=rf"{folder} has no server\.pem beside {re.escape(left)}; restore"):
            Settings.read(["--data-dir", str(tmp_path), *flags])


async def test_a_server_that_lost_its_certificates_does_not_serve_plain_text(
    tmp_path: Path, start: StartDaemon
) -> None:
    data = tmp_path / "data"
    async with federation(tmp_path) as running:
        await running.daemon(running.operators()).operator.ListRuns(op.ListRunsRequest())
    shutil.rmtree(data / "identity")
    with pytest.raises(
        SettingsInvalid, match=r"knows operator ada.*no server\.pem in .*restore.*--identity.*--insecure"
    ):
        await run_on(data)
    daemon = await start(data, insecure=True)
    assert not (await daemon.operator.ListRuns(op.ListRunsRequest())).runs


@pytest.mark.parametrize("kept", [False, True])
async def test_a_start_with_another_database_removes_no_received_update(
    tmp_path: Path, start: StartDaemon, kept: bool
) -> None:
    """A wrong --database, or a data folder whose database is not restored yet."""
    data = tmp_path / "data"
    daemon = await start(data, keep_updates=kept)
    run = await daemon.create(config(rounds={"count": 1, "clients": 2}))
    a, b = await daemon.clients("a", "b")
    given = await asyncio.gather(a.task(), b.task())
    await a.push(given[0].ticket, filled(1.0))
    await daemon.end()
    (data / "spool" / f"{given[1].ticket}.{'0' * 64}.part").write_bytes(b"begun")
    with capture_logs() as logged:
        other = await start(data, database=f"sqlite:///{tmp_path / 'other.db'}", keep_updates=kept)
    assert [line["updates"] for line in logged if "tickets that the database does not know" in line["event"]] == [1]
    await other.end()
    assert [path.suffix for path in (data / "spool").iterdir() if path.suffix != ".manifest"] == [".update"]
    daemon = await start(data, keep_updates=kept)
    b = daemon.client("b")
    await b.register()
    await b.push(given[1].ticket, filled(1.0))
    await daemon.until(run.id, lambda found: found.version == 1)


async def test_a_folder_whose_database_is_elsewhere_does_not_get_a_new_one(
    tmp_path: Path, start: StartDaemon, postgresql_url: str
) -> None:
    data = tmp_path / "data"
    daemon = await start(data, database=postgresql_url.replace("postgres@", "postgres:secret@"))
    await daemon.end()
    assert (data / "database").read_text().startswith("postgresql") and "secret" not in (data / "database").read_text()
    said = r"the database of its server is postgresql\S+; name it with --database"
    with pytest.raises(SettingsInvalid, match=said):
        await run_on(data)
    secured = tmp_path / "secured"
    init.main(["--data-dir", str(secured), "--operator-identity", str(tmp_path / "me"), "--operator", "ada"])
    shutil.copy(data / "database", secured)
    with pytest.raises(SettingsInvalid, match=said):
        authority.main(["rotate", "--data-dir", str(secured)])
    assert not (data / "fedpeft.db").exists()
    daemon = await start(data, database=postgresql_url)
    await daemon.end()
    (data / "database").unlink()
    await (await start(data)).end()
    other = await start(data, database=f"sqlite:///{tmp_path / 'other.db'}")
    await other.end()
    assert not (data / "database").exists(), "the folder has one"
    await (await start(data)).end()


async def test_a_server_that_made_tokens_and_lost_its_certificates_does_not_either(tmp_path: Path) -> None:
    database = Database.open(f"sqlite:///{tmp_path / 'fedpeft.db'}", TIMING)
    database.identities.add_token(TokenRow("0" * 64, Subject(Role.CLIENT, "a"), 1.0, "operator ada", 2.0))
    database.close()
    with pytest.raises(SettingsInvalid, match=r"knows an enrolment token for client a.*restore"):
        await run_on(tmp_path)


async def test_a_name_that_was_refused_in_plain_text_had_no_certificate(start: StartDaemon) -> None:
    daemon = await start()
    request = access.RevokeIdentityRequest(role=TO_PROTO[Role.CLIENT], name="a", reason="gone", unseen=True)
    await access_grpc.AccessServiceStub(daemon.channel).RevokeIdentity(request)
    await daemon.end()
    again = await start()
    assert not (await again.operator.ListRuns(op.ListRunsRequest())).runs


async def test_a_server_without_its_adapter_versions_says_which(start: StartDaemon, tmp_path: Path) -> None:
    daemon = await start()
    gone, kept = await daemon.create(), await daemon.create(request_id="another")
    over = await daemon.create(request_id="over")
    await daemon.operator.StopRun(op.StopRunRequest(run=over.id))
    await daemon.end()
    with capture_logs() as lines:
        await (await start()).end()
    assert not [line for line in lines if line["log_level"] in ("error", "warning")]
    for run in (gone, over):
        shutil.rmtree(tmp_path / "data" / "blobs" / "runs" / run.id)
    with capture_logs() as lines:
        again = await start()
    (said,) = [line for line in lines if line["log_level"] == "error"]
    assert said["event"] == "adapter versions that the next round needs are lost; restore the blobs from the backup"
    assert (said["run"], said["missing"]) == (gone.id, [f"runs/{gone.id}/versions/000000.safetensors"])
    assert kept.id in {run.id for run in (await again.operator.ListRuns(op.ListRunsRequest())).runs}


@pytest.mark.parametrize("emptied", [True, False])
async def test_a_new_database_beside_versions_of_runs_is_noticed(
    start: StartDaemon, tmp_path: Path, emptied: bool
) -> None:
    with capture_logs() as lines:
        daemon = await start()
    assert not [line for line in lines if line["log_level"] == "warning"]
    await daemon.create()
    await daemon.end()
    for path in (tmp_path / "data").glob("fedpeft.db*"):
        path.unlink()
    if emptied:
        (tmp_path / "data" / "fedpeft.db").touch()
    with capture_logs() as lines:
        await start()
    (said,) = [line for line in lines if line["log_level"] == "warning"]
    assert "the database is new" in said["event"] and "adapter versions of runs" in said["event"]


async def run_on(folder: Path) -> None:
    """Lives on a data folder for as long as a server does; tests expect that to be short."""
    async with asyncio.timeout(10):
        await app.run(Settings(data_dir=folder, listen="127.0.0.1:0", metrics="", drain_s=0.0), TIMING)
