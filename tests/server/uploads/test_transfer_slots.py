"""Turns: few transfers at once, first come first served, and nobody keeps one for ever."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import replace

import grpc
import numpy as np
import pytest

from fedpeft.adapters import payload
from fedpeft.adapters.spec import AdapterSpec, TensorSpec
from fedpeft.errors import TransfersBusy, TurnOver
from fedpeft.rpc.status import from_rpc_error
from fedpeft.v1 import federation_service_pb2 as fed
from fedpeft.v1 import run_pb2, tensor_pb2
from fedpeft_server.timing import TIMING
from fedpeft_server.uploads import transfer_slots
from fedpeft_server.uploads.transfer_slots import TransferSlot, TransferSlots

from ..conftest import SPEC, RawClient, StartDaemon, config, filled, header, refused

LARGE = AdapterSpec.of("bias", [TensorSpec("head.weight", (6_000_000,))])


class Trickle:
    """An upload of one byte a message, with a pause before each, which stands still at `stops_at`, if there."""

    def __init__(
        self, client: RawClient, ticket: str, start: int = 0, pause_s: float = 0.1, stops_at: int | None = None
    ) -> None:
        self.client, self.ticket, self.pause_s = client, ticket, pause_s
        self.manifest, self.data = payload.encode(filled(1.0), SPEC.sent(1), "float32")
        self._start = start
        self._stops_at = stops_at

    async def _requests(self) -> AsyncIterator[fed.PushUpdateRequest]:
        yield fed.PushUpdateRequest(header=header(self.ticket, self.manifest))
        for offset in range(self._start, len(self.data)):
            await asyncio.sleep(3600 if offset == self._stops_at else self.pause_s)
            chunk = tensor_pb2.Chunk(offset=offset, data=self.data[offset : offset + 1])
            yield fed.PushUpdateRequest(chunk=chunk)

    async def push(self) -> fed.PushUpdateResponse:
        return await self.client.send(self._requests())

    async def begun(self) -> None:
        """Waits until the server holds something of it."""
        async with asyncio.timeout(10):
            while not (await self.client.upload(self.ticket, self.manifest.sha256)).committed_bytes:
                await asyncio.sleep(0.02)


@pytest.mark.timed(transfer_turn_s=0.5)
async def test_slow_uploads_give_way_and_go_on_where_they_stood(start: StartDaemon) -> None:
    daemon = await start(max_transfers=2)
    run = await daemon.create(config(rounds={"count": 1, "clients": 3}))
    clients = await daemon.clients("a", "b", "c")
    tickets = [t.ticket for t in await asyncio.gather(*(c.task() for c in clients))]
    slow = [Trickle(c, t) for c, t in zip(clients[:2], tickets[:2], strict=True)]
    pushes = [asyncio.create_task(s.push()) for s in slow]
    await asyncio.gather(*(s.begun() for s in slow))
    async with asyncio.timeout(8):
        await clients[2].push(tickets[2], filled(1.0))
        ended, _ = await asyncio.wait(pushes, return_when=asyncio.FIRST_COMPLETED)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ended.pop()
    over = from_rpc_error(caught.value)
    assert (caught.value.code(), over.reason, over.retry_s) == (grpc.StatusCode.ABORTED, "TURN_OVER", 0.0)
    for each in slow:
        each.pause_s = 0.0
    await asyncio.wait(pushes)
    gave_way = [s for s, p in zip(slow, pushes, strict=True) if p.exception()]  # both, where their turns end at once
    assert gave_way
    for each in gave_way:
        held = (await each.client.upload(each.ticket, each.manifest.sha256)).committed_bytes
        assert 0 < held < len(each.data)
        await Trickle(each.client, each.ticket, held, pause_s=0.0).push()
    done = await daemon.until(run.id, lambda r: r.version == 1)
    assert done.state == run_pb2.RUN_STATE_COMPLETED


@pytest.mark.parametrize("after", [0, 3])
@pytest.mark.timed(transfer_turn_s=0.5)
async def test_uploads_that_send_nothing_give_way_when_their_turn_is_over(start: StartDaemon, after: int) -> None:
    """Eight of them kept an honest client waiting for 58 seconds: until each had stalled."""
    daemon = await start(max_transfers=2)
    await daemon.create(config(rounds={"count": 1, "clients": 3}))
    clients = await daemon.clients("a", "b", "c")
    tickets = [t.ticket for t in await asyncio.gather(*(c.task() for c in clients))]
    silent = [Trickle(c, t, pause_s=0.01, stops_at=after) for c, t in zip(clients[:2], tickets[:2], strict=True)]
    pushes = [asyncio.create_task(s.push()) for s in silent]
    async with asyncio.timeout(10):
        while not all(daemon.server.uploads.has(c.name) for c in clients[:2]):
            await asyncio.sleep(0.02)
        await clients[2].push(tickets[2], filled(1.0))
        ended, _ = await asyncio.wait(pushes, return_when=asyncio.FIRST_COMPLETED)
        assert await refused(ended.pop()) == "TURN_OVER"
    for push in pushes:
        push.cancel()
    await asyncio.gather(*pushes, return_exceptions=True)


@pytest.mark.timed(transfer_turn_s=0.1)
async def test_a_silent_upload_that_nobody_waits_for_keeps_its_turn(start: StartDaemon) -> None:
    daemon = await start(max_transfers=1)
    await daemon.create(config(rounds={"count": 1, "clients": 1}))
    (a,) = await daemon.clients("a")
    ticket = (await a.task()).ticket
    push = asyncio.create_task(Trickle(a, ticket, stops_at=2, pause_s=0.01).push())
    await asyncio.wait({push}, timeout=1.0)
    assert not push.done()
    push.cancel()
    await asyncio.gather(push, return_exceptions=True)


@pytest.mark.timed(transfer_turn_s=0.5)
async def test_pulls_that_read_nothing_give_way_when_their_turn_is_over(start: StartDaemon) -> None:
    daemon = await start(max_transfers=1)
    run = await daemon.create(spec=LARGE, arrays={"head.weight": np.zeros(6_000_000, np.float32)})
    silent, quick = await daemon.clients("silent", "quick")
    call = silent.stub.PullAdapter(fed.PullAdapterRequest(run=run.id), metadata=silent.metadata)
    await call.read()
    async with asyncio.timeout(10):
        _, data = await quick.pull(run.id, 0)
    assert len(data) == 24_000_000
    call.cancel()


@pytest.mark.timed(transfer_turn_s=0.1)
async def test_a_slow_upload_that_nobody_waits_for_is_left_alone(start: StartDaemon) -> None:
    daemon = await start(max_transfers=1)
    await daemon.create(config(rounds={"count": 1, "clients": 1}))
    (a,) = await daemon.clients("a")
    ticket = (await a.task()).ticket
    assert (await Trickle(a, ticket, pause_s=0.01).push()).ticket == ticket


@pytest.mark.timed(transfer_turn_s=0.3)
async def test_slow_pulls_give_way_and_go_on_where_they_stood(start: StartDaemon) -> None:
    daemon = await start(max_transfers=1)
    run = await daemon.create(spec=LARGE, arrays={"head.weight": np.zeros(6_000_000, np.float32)})
    slow, quick = await daemon.clients("slow", "quick")
    call = slow.stub.PullAdapter(fed.PullAdapterRequest(run=run.id), metadata=slow.metadata)
    sha256 = (await call.read()).header.manifest.sha256
    got = bytearray()

    async def read_slowly() -> None:
        while (message := await call.read()) is not grpc.aio.EOF:
            got.extend(message.chunk.data)
            await asyncio.sleep(0.2)

    reading = asyncio.create_task(read_slowly())
    await asyncio.sleep(0.5)
    async with asyncio.timeout(10):
        _, data = await quick.pull(run.id, 0)
        assert await refused(reading) == "TURN_OVER"
    assert len(data) == 24_000_000 and 0 < len(got) < 24_000_000
    _, rest = await slow.pull(run.id, 0, offset=len(got))
    assert hashlib.sha256(bytes(got) + rest).digest() == sha256


async def test_an_upload_that_was_cut_off_does_not_keep_its_own_client_waiting(start: StartDaemon) -> None:
    """Its server may not know yet that the connection is gone."""
    daemon = await start(max_transfers=1)
    await daemon.create(config(rounds={"count": 1, "clients": 1}))
    (a,) = await daemon.clients("a")
    ticket = (await a.task()).ticket
    dead = Trickle(a, ticket, pause_s=0.2, stops_at=4)
    first = asyncio.create_task(dead.push())
    await dead.begun()
    held = (await a.upload(ticket, dead.manifest.sha256)).committed_bytes
    async with asyncio.timeout(5):
        receipt = await Trickle(a, ticket, held, pause_s=0.0).push()
    assert receipt.sha256 == dead.manifest.sha256
    async with asyncio.timeout(5):
        assert await refused(first) == "TURN_OVER"


async def test_a_pull_that_nobody_reads_ends_as_soon_as_its_client_pulls_again(start: StartDaemon) -> None:
    """Its slot and its file are free at once; its status lies behind what was sent, so the client has it later."""
    daemon = await start(max_transfers=1)
    run = await daemon.create(spec=LARGE, arrays={"head.weight": np.zeros(6_000_000, np.float32)})
    (a,) = await daemon.clients("a")
    blocked = a.stub.PullAdapter(fed.PullAdapterRequest(run=run.id), metadata=a.metadata)
    await blocked.read()
    async with asyncio.timeout(20):
        while not daemon.server.downloads.has("a"):
            await asyncio.sleep(0.01)
        async with grpc.aio.insecure_channel(daemon.server.settings.listen) as channel:
            _, data = await RawClient(channel, "a").pull(run.id, 0)
    labels = {"method": "/fedpeft.v1.FederationService/PullAdapter", "code": "ABORTED"}
    assert len(data) == 24_000_000
    assert daemon.server.metrics.registry.get_sample_value("fedpeft_grpc_requests_total", labels) == 1
    blocked.cancel()


async def come(line: TransferSlots, client: str, order: list[str], stack: AsyncExitStack) -> None:
    await stack.enter_async_context(line.take(client))
    order.append(client)


async def test_turns_come_in_the_order_in_which_they_were_asked_for() -> None:
    line, order = TransferSlots(1, TIMING), []
    async with AsyncExitStack() as stack:
        stacks = {name: await stack.enter_async_context(AsyncExitStack()) for name in "abcd"}
        await come(line, "a", order, stacks["a"])
        waiting = [asyncio.create_task(come(line, name, order, stacks[name])) for name in "bcd"]
        await asyncio.sleep(0)
        for name in "abc":
            await stacks[name].aclose()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        await asyncio.gather(*waiting)
    assert order == ["a", "b", "c", "d"]


async def test_who_asks_again_at_once_keeps_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    line, order = TransferSlots(1, TIMING), []
    async with AsyncExitStack() as first, AsyncExitStack() as second, AsyncExitStack() as third:
        await come(line, "a", order, first)
        monkeypatch.setattr(transfer_slots, "HOLD_S", 0.05)
        with pytest.raises(TransfersBusy, match="1 other transfer"):
            await come(line, "b", order, second)
        monkeypatch.setattr(transfer_slots, "HOLD_S", 20.0)
        waiting = [asyncio.create_task(come(line, "c", order, third))]
        await asyncio.sleep(0)
        waiting.append(asyncio.create_task(come(line, "b", order, second)))
        await asyncio.sleep(0)
        await first.aclose()
        await asyncio.sleep(0.01)
        await second.aclose()
        await asyncio.gather(*waiting)
    assert order == ["a", "b", "c"]


async def test_who_does_not_come_back_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    line = TransferSlots(1, replace(TIMING, transfer_turn_s=0.0))
    monkeypatch.setattr(transfer_slots, "HOLD_S", 0.05)
    async with line.take("a") as slot:
        slot.check()
        with pytest.raises(TransfersBusy):
            await line.take("gone").__aenter__()
        with pytest.raises(TurnOver, match="others wait"):
            slot.check()
        line._line["gone"].until = time.monotonic()  # it has not asked again in time
        slot.check()
    async with line.take("c") as slot:
        slot.check()


async def test_a_wait_that_is_cancelled_takes_no_turn_with_it() -> None:
    line = TransferSlots(1, TIMING)
    async with line.take("a"):
        waits = asyncio.create_task(line.take("b").__aenter__())
        await asyncio.sleep(0)
        waits.cancel()
        granted = asyncio.create_task(line.take("c").__aenter__())
        await asyncio.sleep(0)
    granted.cancel()  # in the instant in which its slot comes
    await asyncio.wait({waits, granted})
    assert not line.has("b") and not line.has("c")
    async with asyncio.timeout(1), line.take("d"):
        assert line.has("d")


async def test_a_client_has_one_turn_and_one_place() -> None:
    line = TransferSlots(2, TIMING)
    async with line.take("a") as first:
        async with line.take("a") as second:
            second.check()
            with pytest.raises(TurnOver, match="another transfer of client a"):
                first.check()
            async with line.take("b"):
                waits = asyncio.create_task(line.take("c").__aenter__())
                await asyncio.sleep(0)
                again = asyncio.create_task(line.take("c").__aenter__())
                await asyncio.sleep(0)
                with pytest.raises(TurnOver, match="another transfer of client c"):
                    await waits
        async with asyncio.timeout(1):
            await again
        assert line.has("c") and not line.has("a")


@pytest.mark.parametrize("change", [TransferSlot.replace, TransferSlot.end_if_due])
async def test_a_wait_that_is_just_ending_cannot_be_ended_again(change: Callable[[TransferSlot], None]) -> None:
    """The newer transfer or the one in the queue was refused with a RuntimeError in that instant."""
    async with TransferSlots(1, replace(TIMING, transfer_turn_s=-1.0)).take("a") as slot:
        ended: list[str] = []

        async def wait() -> None:
            try:
                async with slot.bounded(0.0):
                    await asyncio.Event().wait()
            except (TimeoutError, TurnOver) as error:
                ended.append(type(error).__name__)

        waits = asyncio.create_task(wait())
        while slot._waiting is None or not slot._waiting.expired():
            await asyncio.sleep(0)
        assert not ended, "its time is over, and it has not heard of that yet"
        change(slot)
        await waits
    assert ended == ["TurnOver" if change is TransferSlot.replace else "TimeoutError"]
