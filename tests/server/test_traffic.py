"""The bytes of a round: what is in the database once a transition is, whatever becomes of the process."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path

import grpc
import pytest

from fedpeft.adapters import payload
from fedpeft.adapters.spec import AdapterSpec, TensorSpec
from fedpeft.errors import DiskFull
from fedpeft.v1 import federation_service_pb2 as fed
from fedpeft.v1 import tensor_pb2
from fedpeft_server.access.call import Key
from fedpeft_server.store.rows import Traffic
from fedpeft_server.timing import TIMING
from fedpeft_server.traffic import ByteCounter

from ..ports import free_port
from .conftest import SPEC, Daemon, RawClient, StartDaemon, config, filled, header, refused
from .test_process import running

SIZE = 4 * SPEC.parameters
Stored = dict[tuple[int, str], tuple[int, int, int, int]]


def stored(folder: Path) -> Stored:
    """Returns wire up and down, payload up and down of each round and client as the database has them now."""
    with sqlite3.connect(f"file:{folder / 'fedpeft.db'}?mode=ro", uri=True) as database:
        rows = database.execute("SELECT number, client, wire_up, wire_down, payload_up, payload_down FROM traffic")
        found = {(number, client): tuple(bytes_) for number, client, *bytes_ in rows}
    database.close()
    return found  # type: ignore[return-value]


async def test_what_was_counted_before_a_receipt_survives_a_kill(tmp_path: Path) -> None:
    port = free_port()
    with running(tmp_path, "--metrics", "", port=port) as process:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            daemon = Daemon(None, channel, None)  # type: ignore[arg-type]
            run = await daemon.create(config(rounds={"count": 1, "clients": 2}))
            a, b = await daemon.clients("a", "b")
            task, _ = await asyncio.gather(a.task(), b.task())
            await a.pull(run.id, 0)
            await a.push(task.ticket, filled(1.0))
            process.kill()
            process.wait()
    wire_up, wire_down, payload_up, payload_down = stored(tmp_path)[1, "a"]
    assert (payload_up, payload_down) == (SIZE, SIZE)
    assert wire_up > SIZE and wire_down > SIZE


@pytest.mark.timed(traffic_write_s=3600.0)
async def test_a_withdrawal_a_refusal_and_a_commit_write_what_was_counted_too(start: StartDaemon) -> None:
    daemon = await start()
    folder = daemon.server.settings.data_dir
    run = await daemon.create(config(rounds={"count": 1, "clients": 3, "quorum": 1}))
    a, b, c = await daemon.clients("a", "b", "c")
    tasks = await asyncio.gather(a.task(), b.task(), c.task())
    await b.pull(run.id, 0)
    await b.withdraw(tasks[1].ticket)
    assert stored(folder)[1, "b"][3] == SIZE
    await c.pull(run.id, 0)
    assert await refused(c.push(tasks[2].ticket, filled(float("nan")))) == "PAYLOAD_INVALID"
    assert stored(folder)[1, "c"][2:] == (SIZE, SIZE)
    await a.pull(run.id, 0)
    await a.push(tasks[0].ticket, filled(1.0))
    await daemon.until(run.id, lambda r: r.version == 1)
    (done,) = await daemon.rounds(run.id)
    assert done.payload_bytes_up == 2 * SIZE
    assert {t.client: t.wire_bytes_up for t in done.tickets} == {
        client: bytes_[0] for (_, client), bytes_ in stored(folder).items()
    }


LARGE = AdapterSpec.of("bias", [TensorSpec("head.weight", (1024, 1024))])


async def until(reached: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not await asyncio.to_thread(reached):
            await asyncio.sleep(0.01)


def arrived(folder: Path) -> int:
    return sum(path.stat().st_size for path in (folder / "spool").glob("ticket-*.part"))


class Half:
    """An upload that stands still once a part of it was sent."""

    def __init__(self, client: RawClient, ticket: str, offset: int = 0, pieces: int = 2) -> None:
        self.manifest, self.data = payload.encode(filled(1.0, LARGE), LARGE.sent(1), "float32")
        self._first = header(ticket, self.manifest)
        self._places = [offset + number * 256 * 1024 for number in range(pieces)]
        self.sent_to = self._places[-1] + 256 * 1024
        self.wire_bytes = 0
        self.call = client.stub.PushUpdate(self._requests(), metadata=client.metadata)

    async def _requests(self) -> AsyncIterator[fed.PushUpdateRequest]:
        for message in (
            fed.PushUpdateRequest(header=self._first),
            *(
                fed.PushUpdateRequest(chunk=tensor_pb2.Chunk(offset=at, data=self.data[at : at + 256 * 1024]))
                for at in self._places
            ),
        ):
            self.wire_bytes += message.ByteSize()
            yield message
        await asyncio.Event().wait()


async def test_no_byte_of_an_upload_is_lost_or_counted_twice_over_kills(tmp_path: Path) -> None:
    """The process is killed twice in mid-upload, at once after the bytes came."""
    run, position, sent = "", 0, 0
    for _ in range(2):
        port = free_port()
        with running(tmp_path, "--metrics", "", port=port) as process:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                daemon = Daemon(None, channel, None)  # type: ignore[arg-type]
                if not run:
                    run = (await daemon.create(config(rounds={"count": 1, "clients": 1}), LARGE)).id
                else:
                    (now,) = await daemon.rounds(run)
                    assert (now.payload_bytes_up, now.wire_bytes_up >= sent) == (position, True)
                (a,) = await daemon.clients("a")
                task = await a.task()
                half = Half(a, task.ticket, position)
                await until(lambda upload=half: upload.call.done() or arrived(tmp_path) == upload.sent_to)  # type: ignore[misc]
                assert not half.call.done(), await half.call
                position, sent = half.sent_to, sent + half.wire_bytes - 1000
                process.kill()
                process.wait()
                with pytest.raises(grpc.aio.AioRpcError):
                    await half.call
    port = free_port()
    with running(tmp_path, "--metrics", "", port=port):
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            daemon = Daemon(None, channel, None)  # type: ignore[arg-type]
            (a,) = await daemon.clients("a")
            task = await a.task()
            pieces = [(at, half.data[at : at + 256 * 1024]) for at in range(position, len(half.data), 256 * 1024)]
            await a.push_raw(header(task.ticket, half.manifest), pieces)
            await daemon.until(run, lambda r: r.version == 1)
            (done,) = await daemon.rounds(run)
    assert done.payload_bytes_up == len(half.data)
    assert len(half.data) < done.wire_bytes_up < 1.01 * len(half.data) + 20_000


@pytest.mark.parametrize(
    ("written", "wire_up"),
    [(Traffic(206_609, 0, 140_727, 0), 206_609), (Traffic(141_000, 0, 140_727, 0), 206_263), (Traffic(), 206_263)],
    ids=["the chunk's wire was written", "nothing of the chunk was written", "nothing was written"],
)
def test_no_chunk_is_counted_twice_whose_wire_alone_was_written_before_a_kill(written: Traffic, wire_up: int) -> None:
    """A restart counts of the payload what the spool holds: of the last chunk the wire was there already."""
    assert written.at_least(payload_up=206_263) == Traffic(wire_up, 0, 206_263, 0)


async def test_a_download_that_is_resumed_counts_what_came_before(tmp_path: Path) -> None:
    port = free_port()
    size = 4 * LARGE.parameters
    with running(tmp_path, "--metrics", "", port=port) as process:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            daemon = Daemon(None, channel, None)  # type: ignore[arg-type]
            run = await daemon.create(config(rounds={"count": 1, "clients": 1}), LARGE)
            (a,) = await daemon.clients("a")
            await a.task()
            await a.pull(run.id, 0)
            process.kill()
            process.wait()
    port, position = free_port(), 3 * 1024 * 1024
    with running(tmp_path, "--metrics", "", port=port):
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            daemon = Daemon(None, channel, None)  # type: ignore[arg-type]
            (a,) = await daemon.clients("a")
            await a.pull(run.id, 0, offset=position)
            await a.pull(run.id, 0, offset=position)
            (now,) = await daemon.rounds(run.id)
    assert now.payload_bytes_down in (2 * size - position, 3 * size - 2 * position), (
        "as the first pull was written or not"
    )
    assert now.wire_bytes_down > now.payload_bytes_down


async def test_bytes_belong_to_the_round_of_their_ticket(start: StartDaemon) -> None:
    daemon = await start()
    run = await daemon.create(config(rounds={"count": 3, "clients": 1, "over_selection": 1.0}))
    a, b = await daemon.clients("a", "b")
    tasks = await asyncio.gather(a.task(), b.task())
    await a.push(tasks[0].ticket, filled(1.0))
    await daemon.until(run.id, lambda r: r.version == 1)
    await asyncio.gather(a.task(), b.task())
    before = {r.number: r.wire_bytes_up for r in await daemon.rounds(run.id)}
    for _ in range(20):
        assert await refused(b.push(tasks[1].ticket, filled(1.0))) == "ROUND_CLOSED"
        assert (await b.upload(tasks[1].ticket)).committed_bytes == 0
    after = {r.number: r.wire_bytes_up for r in await daemon.rounds(run.id)}
    assert after[1] - before[1] > 20 * 100, "too late, and still of round 1"
    assert after[2] == before[2]
    metrics = daemon.server.metrics
    assert metrics.last_round_bytes.labels(run.id, "up")._value.get() == after[1]
    assert metrics.round_bytes.labels(run.id, "up")._value.get() == after[2]


@pytest.mark.parametrize("run", [None, "run-a"], ids=["all", "one run"])
async def test_no_byte_is_lost_where_a_transaction_fails_that_its_caller_has_left(
    start: StartDaemon, run: str | None
) -> None:
    """The client of a download that is resumed may disconnect while the database refuses what is written for it."""
    daemon = await start()
    store, begun, go = daemon.server.store, threading.Event(), threading.Event()
    byte_counter, key, bytes_ = ByteCounter(daemon.server.metrics, TIMING), ("run-a", 1, "a"), Traffic(1, 2, 3, 4)
    byte_counter._add(key, bytes_)

    def refused_later(_: Mapping[Key, Traffic]) -> None:
        begun.set()
        assert go.wait(20)
        raise DiskFull("no room")

    written = asyncio.ensure_future(byte_counter.hand_out(store, refused_later, run))
    await asyncio.to_thread(begun.wait, 20)
    assert not byte_counter.pending("run-a")
    byte_counter._add(key, bytes_)
    written.cancel()
    await asyncio.wait({written})
    go.set()
    await store.transact(lambda: None)  # transactions follow one another
    assert byte_counter.pending("run-a") == {(1, "a"): bytes_ + bytes_}


async def test_bytes_of_a_transaction_whose_caller_has_left_are_written_once(start: StartDaemon) -> None:
    daemon = await start()
    store, begun, go, seen = daemon.server.store, threading.Event(), threading.Event(), list[dict[Key, Traffic]]()
    byte_counter = ByteCounter(daemon.server.metrics, TIMING)
    byte_counter._add(("run-a", 1, "a"), Traffic(1, 2, 3, 4))

    def slow(traffic: Mapping[Key, Traffic]) -> None:
        begun.set()
        assert go.wait(20)
        seen.append(dict(traffic))

    written = asyncio.ensure_future(byte_counter.hand_out(store, slow))
    await asyncio.to_thread(begun.wait, 20)
    written.cancel()
    go.set()
    await store.transact(lambda: None)
    assert seen == [{("run-a", 1, "a"): Traffic(1, 2, 3, 4)}]
    assert not byte_counter.pending("run-a")


async def test_the_time_of_a_call_is_kept_where_it_cannot_be_written_and_who_wanted_it_has_left(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`ListClients` writes it, and its caller may disconnect."""
    sessions, store, begun, go = daemon.server.sessions, daemon.server.store, threading.Event(), threading.Event()
    sessions._touched = {"a": 5.0, "b": 5.0}

    def refused_later(_: Mapping[str, float]) -> None:
        begun.set()
        assert go.wait(20)
        raise DiskFull("no room")

    monkeypatch.setattr(store.db, "touch_clients", refused_later)
    written = asyncio.ensure_future(sessions.write(store))
    await asyncio.to_thread(begun.wait, 20)
    sessions._touched["a"] = 6.0
    written.cancel()
    await asyncio.wait({written})
    go.set()
    await store.transact(lambda: None)
    assert sessions._touched == {"a": 6.0, "b": 5.0}
    sessions._touched = {}
