"""A backup is put back into the database of a running server, which keeps its connections: it notices, and ends."""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import make_url
from structlog.testing import capture_logs

from fedpeft.errors import DatabaseUnavailable
from fedpeft.identity.subject import Role, Subject
from fedpeft.v1 import run_pb2
from fedpeft_server.store.database import Database
from fedpeft_server.store.rows import AuditEvent
from fedpeft_server.timing import TIMING

from ..conftest import Daemon, StartDaemon, config, filled

LOST = Subject(Role.CLIENT, "lost")

pytestmark = pytest.mark.timed(revisions_check_s=0.1, follow_run_s=0.5)


@pytest.fixture
def backup(migrated_postgresql_url: str, tmp_path: Path) -> Callable[[], Callable[[], None]]:
    """Backs the database up as a page of PostgreSQL's manual does; what it returns puts that back in its place."""
    if shutil.which("pg_dump") is None:
        pytest.skip("pg_dump of PostgreSQL is not installed: apt-get install postgresql")
    url, file = make_url(migrated_postgresql_url), tmp_path / "dump.sql"
    place = ("-h", str(url.query["host"]), "-U", "postgres", "-d", str(url.database))

    def call(*command: str) -> None:
        subprocess.run((*command, *place), check=True, stdout=subprocess.DEVNULL, timeout=60)

    def make() -> Callable[[], None]:
        call("pg_dump", "--clean", "--if-exists", "-f", str(file))
        return lambda: call("psql", "-q", "-v", "ON_ERROR_STOP=1", "--single-transaction", "-f", str(file))

    return make


async def end_of(daemon: Daemon) -> str:
    """Waits until a server ends because its database is older than it was; returns its words."""
    async with asyncio.timeout(20):
        await daemon.server.stopping.wait()
    with pytest.raises(DatabaseUnavailable, match=r"older than it was, .* start it again") as caught:
        await daemon.end()
    return caught.value.message


async def test_a_run_that_is_over_here_and_goes_on_in_the_backup(
    start: StartDaemon, tmp_path: Path, migrated_postgresql_url: str, backup: Callable[[], Callable[[], None]]
) -> None:
    daemon = await start(tmp_path / "data", database=migrated_postgresql_url)
    run = (await daemon.create(config(rounds={"count": 1, "clients": 1}))).id
    put_back = backup()
    (a,) = await daemon.clients("a")
    await a.push((await a.task(run)).ticket, filled(1.0))
    await daemon.until(run, lambda r: r.state == run_pb2.RUN_STATE_COMPLETED)
    await asyncio.to_thread(put_back)
    assert run in await end_of(daemon)
    paused = await (await start(tmp_path / "data", database=migrated_postgresql_url)).run(run)
    assert (paused.version, paused.state) == (0, run_pb2.RUN_STATE_PAUSED)
    assert re.search("it had version 1 .* has version 0 at", paused.reason), paused.reason


async def test_a_run_that_is_not_in_the_backup_was_not_deleted(
    start: StartDaemon, tmp_path: Path, migrated_postgresql_url: str, backup: Callable[[], Callable[[], None]]
) -> None:
    daemon = await start(tmp_path / "data", database=migrated_postgresql_url)
    put_back = backup()
    await daemon.create()
    with capture_logs() as lines:
        await asyncio.to_thread(put_back)
        assert "audit log" in await end_of(daemon)
    assert "run deleted by another server" not in [line["event"] for line in lines]


async def test_a_backup_that_lacks_a_revocation_alone(
    start: StartDaemon, tmp_path: Path, migrated_postgresql_url: str, backup: Callable[[], Callable[[], None]]
) -> None:
    daemon = await start(tmp_path / "data", database=migrated_postgresql_url)
    put_back, store = backup(), daemon.server.store
    await store.transact(store.db.identities.revoke, LOST, time.time(), "stolen", "operator", unseen=True)
    await asyncio.to_thread(put_back)
    assert "audit log" in await end_of(daemon)


async def test_what_others_lose_is_seen_by_who_has_seen_it(
    start: StartDaemon, tmp_path: Path, migrated_postgresql_url: str, backup: Callable[[], Callable[[], None]]
) -> None:
    daemon = await start(tmp_path / "data", database=migrated_postgresql_url)
    put_back = backup()
    other = Database(migrated_postgresql_url, TIMING)
    await asyncio.to_thread(other.transactions.write, AuditEvent("operator", "tried", "x"))
    transactions = daemon.server.store.db.transactions
    async with asyncio.timeout(5):
        while (seen := transactions._seen) is None or seen.action != "tried":
            await asyncio.sleep(0.01)
    await asyncio.to_thread(put_back)
    await asyncio.to_thread(other.transactions.write, AuditEvent("operator", "tried", "another"))
    other.close()
    assert "audit log" in await end_of(daemon)


async def test_what_is_written_after_the_backup_was_put_back_hides_nothing(
    start: StartDaemon, tmp_path: Path, migrated_postgresql_url: str, backup: Callable[[], Callable[[], None]]
) -> None:
    daemon = await start(tmp_path / "data", database=migrated_postgresql_url)
    put_back, store = backup(), daemon.server.store
    await store.transact(store.db.identities.revoke, LOST, time.time(), "stolen", "operator", unseen=True)
    put_back()  # in the event loop's own thread: nothing is looked at before the entry is there
    await store.transact(store.db.transactions.write, AuditEvent("server", "call.refused", "lost"))
    assert "audit log" in await end_of(daemon)


async def test_nothing_is_taken_up_of_an_older_database(
    start: StartDaemon, tmp_path: Path, migrated_postgresql_url: str, backup: Callable[[], Callable[[], None]]
) -> None:
    daemon = await start(tmp_path / "data", database=migrated_postgresql_url)
    store, now = daemon.server.store, time.time()
    await store.transact(store.db.identities.revoke, LOST, now - 9, "lost", "operator", unseen=True)
    await store.transact(store.db.identities.restore, LOST, now - 8, "operator")
    await daemon.server.follower._follow_everything()  # as it does once it listens: that is over then
    put_back = backup()
    await store.transact(store.db.identities.revoke, LOST, now, "stolen", "operator", unseen=True)
    daemon.server.admission.revoke(LOST)
    put_back()
    daemon.server.follower.began()
    await end_of(daemon)
    assert daemon.server.admission.is_refused(LOST)
