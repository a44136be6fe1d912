"""PostgreSQL through a line that breaks when it matters: at a commit, whose answer is lost; and one that hangs."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import make_url

from fedpeft.v1 import operator_service_pb2 as op

from ..conftest import Daemon, StartDaemon, config, filled, refused


class Line:
    """A line to PostgreSQL, a socket in a folder of its own."""

    def __init__(self, database: Path) -> None:
        self._database = database
        self.breaks_at_commit_of = b""
        """It breaks when the transaction that has this statement is committed."""
        self.delay_s = 0.0
        """Time for which that commit is still on its way once the line is broken."""
        self.away = False
        """Set while it takes no new connection."""

    async def live(self, socket: Path, begun: threading.Event, ended: asyncio.Event) -> None:
        async with await asyncio.start_unix_server(self._serve, socket):
            begun.set()
            await ended.wait()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.away:
            writer.close()
            return
        there, back = await asyncio.open_unix_connection(self._database)
        answers = asyncio.create_task(self._answers(there, writer))
        try:
            await self._questions(reader, writer, there, back, answers)
        except (ConnectionError, asyncio.CancelledError):
            pass  # either end may go at any time
        finally:
            answers.cancel()
            back.close()
            writer.close()

    async def _questions(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        there: asyncio.StreamReader,
        back: asyncio.StreamWriter,
        answers: asyncio.Task[None],
    ) -> None:
        armed = False
        while data := await reader.read(65_536):
            armed = armed or (self.breaks_at_commit_of != b"" and self.breaks_at_commit_of in data)
            commits = armed and b"COMMIT" in data
            if commits:
                answers.cancel()
                await asyncio.wait({answers})
                if self.delay_s:
                    writer.close()
                    await asyncio.sleep(self.delay_s)
            back.write(data)
            await back.drain()
            if commits:
                await there.read(1)  # so it is done
                self.breaks_at_commit_of = b""
                return

    async def _answers(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65_536):
            writer.write(data)
            await writer.drain()


@pytest.fixture
def line(postgresql_url: str, tmp_path: Path) -> Iterator[tuple[Line, str]]:
    """A line, and the URL of the database behind it."""
    url = make_url(postgresql_url)
    line, folder = Line(Path(str(url.query["host"]), ".s.PGSQL.5432")), tmp_path / "s"
    folder.mkdir()
    # A loop of its own, because a daemon that starts connects while it holds the test's.
    loop, begun, ended = asyncio.new_event_loop(), threading.Event(), asyncio.Event()
    living = line.live(folder / ".s.PGSQL.5432", begun, ended)
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        thread = threading.Thread(target=runner.run, args=(living,))
        thread.start()
        assert begun.wait(5)
        yield line, url.update_query_dict({"host": str(folder)}).render_as_string(hide_password=False)
        loop.call_soon_threadsafe(ended.set)
        thread.join()


async def works(daemon: Daemon, run: str) -> bool:
    """Says whether a run's only round is held."""
    await pushed(daemon)
    return await is_held(daemon, run)


async def pushed(daemon: Daemon) -> None:
    (client,) = await daemon.clients("a")
    async with asyncio.timeout(10):
        await client.push((await client.task()).ticket, filled(1.0))


async def is_held(daemon: Daemon, run: str) -> bool:
    async with asyncio.timeout(10):
        return (await daemon.until(run, lambda r: r.version == 1)).version == 1


async def test_a_run_whose_commit_was_not_answered_is_there(line: tuple[Line, str], start: StartDaemon) -> None:
    daemon = await start(database=line[1])
    line[0].breaks_at_commit_of = b"INSERT INTO runs"
    run = await daemon.create(config(rounds={"count": 1, "clients": 1}))
    assert not line[0].breaks_at_commit_of, "it broke"
    assert await works(daemon, run.id)


async def test_a_run_that_could_not_be_looked_for_is_found_by_the_repetition(
    line: tuple[Line, str], start: StartDaemon
) -> None:
    daemon = await start(database=line[1])
    line[0].breaks_at_commit_of = b"INSERT INTO runs"
    line[0].away = True
    assert await refused(daemon.create(config(rounds={"count": 1, "clients": 1}))) == "DATABASE_UNAVAILABLE"
    line[0].away = False
    run = await daemon.create(config(rounds={"count": 1, "clients": 1}))
    assert [r.id for r in (await daemon.operator.ListRuns(op.ListRunsRequest())).runs] == [run.id]
    assert await works(daemon, run.id)


async def test_a_deletion_that_could_not_be_looked_for_is_repeated(line: tuple[Line, str], start: StartDaemon) -> None:
    daemon = await start(database=line[1])
    run = (await daemon.create()).id
    await daemon.operator.StopRun(op.StopRunRequest(run=run))
    line[0].breaks_at_commit_of, line[0].away = b"DELETE FROM runs", True
    assert await refused(daemon.operator.DeleteRun(op.DeleteRunRequest(run=run))) == "DATABASE_UNAVAILABLE"
    line[0].away = False
    await daemon.operator.DeleteRun(op.DeleteRunRequest(run=run))
    assert not (await daemon.operator.ListRuns(op.ListRunsRequest())).runs
    assert (await daemon.server.store.transact(actions, daemon)).count("run.deleted") == 1


def actions(daemon: Daemon) -> list[str]:
    return [entry.action for entry in daemon.server.store.db.transactions.entries_after(0, 1000)]


async def count_once(daemon: Daemon, run: str) -> None:
    """Holds that a round, its update and its bytes were written once."""
    said = await daemon.server.store.transact(actions, daemon)
    assert (said.count("update.received"), said.count("round.committed")) == (1, 1)
    (held,) = await daemon.rounds(run)
    value = daemon.server.metrics.registry.get_sample_value
    passed = {way: value("fedpeft_wire_bytes_total", {"run": run, "direction": way}) for way in ("up", "down")}
    assert {"up": held.wire_bytes_up, "down": held.wire_bytes_down} == passed


@pytest.mark.parametrize("delay_s", [0.0, 0.5])
@pytest.mark.parametrize("statement", [b"INSERT INTO updates", b"INSERT INTO versions"])
async def test_a_transition_whose_commit_was_not_answered_counts_once(
    line: tuple[Line, str], start: StartDaemon, statement: bytes, delay_s: float
) -> None:
    """The receipt and the fold were written twice: in the audit log, and their bytes in the database.

    Or a call failed though its update counted, for the commit was still on its way as it was looked for.
    """
    daemon = await start(database=line[1])
    run = await daemon.create(config(rounds={"count": 1, "clients": 1}))
    line[0].breaks_at_commit_of, line[0].delay_s = statement, delay_s
    assert await works(daemon, run.id)
    assert not line[0].breaks_at_commit_of, "it broke"
    await count_once(daemon, run.id)


@pytest.mark.parametrize("delay_s", [0.0, 0.5])
async def test_bytes_whose_commit_was_not_answered_are_counted_once(
    line: tuple[Line, str], start: StartDaemon, delay_s: float
) -> None:
    """Such a transaction, and one that opens a round, has no entry in the audit log to be looked for."""
    daemon = await start(database=line[1])
    run = await daemon.create(config(rounds={"count": 1, "clients": 1}))
    (client,) = await daemon.clients("a")
    async with asyncio.timeout(10):
        given = await client.task()
        await client.pull(run.id, given.version)
        line[0].breaks_at_commit_of, line[0].delay_s = b"INSERT INTO traffic", delay_s
        while line[0].breaks_at_commit_of:
            await asyncio.sleep(0.01)
        await daemon.server.store.transact(daemon.server.store.db.now)  # behind the one that is looked for
        await client.push(given.ticket, filled(1.0))
    assert await is_held(daemon, run.id)
    await count_once(daemon, run.id)


@pytest.mark.timed(fold_retry_s=0.05)
async def test_a_fold_that_is_repeated_once_the_database_is_back_is_told_once(
    line: tuple[Line, str], start: StartDaemon
) -> None:
    daemon = await start(database=line[1])
    run = await daemon.create(config(rounds={"count": 1, "clients": 1}))
    line[0].breaks_at_commit_of, line[0].away = b"INSERT INTO versions", True
    await pushed(daemon)
    async with asyncio.timeout(20):
        while line[0].breaks_at_commit_of:
            await asyncio.sleep(0.01)
    line[0].away = False
    assert await is_held(daemon, run.id)
    assert (await daemon.server.store.transact(actions, daemon)).count("round.committed") == 1
