"""Messages are received a few at a time, and what is refused of them takes no memory meanwhile."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections import Counter
from contextlib import AsyncExitStack, suppress
from typing import Any

import grpc
import pytest

from fedpeft.errors import TransferStalled
from fedpeft.identity.subject import Role
from fedpeft.rpc import wire
from fedpeft.rpc.status import from_rpc_error
from fedpeft_server.access import bounds
from fedpeft_server.access.bounds import ReceivingBound
from fedpeft_server.access.call import Party
from fedpeft_server.uploads import incoming
from fedpeft_server.uploads.incoming import ReceiveSlots

from ..access.test_bounds import WHO, padded, sent
from ..secured import Federation

ANSWER = "/fedpeft.v1.FederationService/AnswerOffer"
CHECK = "/grpc.health.v1.Health/Check"
LARGE = padded(wire.MESSAGE_LIMIT_BYTES - 64)
A, B, C = (Party(Role.CLIENT, name) for name in "abc")


async def held(slots: ReceiveSlots, party: Party, leave: asyncio.Event) -> None:
    async with slots.take(party):
        await leave.wait()


class Takers:
    """Tasks that hold or await slots."""

    def __init__(self, slots: ReceiveSlots) -> None:
        self.slots = slots
        self._leave: dict[asyncio.Task[None], asyncio.Event] = {}

    async def take(self, party: Party) -> asyncio.Task[None]:
        leave = asyncio.Event()
        task = asyncio.create_task(held(self.slots, party, leave))
        self._leave[task] = leave
        await asyncio.sleep(0)
        return task

    async def end(self, task: asyncio.Task[None]) -> None:
        self._leave[task].set()
        await task
        await asyncio.sleep(0)

    async def __aenter__(self) -> Takers:
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._leave:
            task.cancel()
        await asyncio.gather(*self._leave, return_exceptions=True)
        assert self.slots.held == 0
        assert not any(self.slots._waiting) and not self.slots._limits, "nothing is left of who is gone"


async def test_slots_are_few_for_each_and_for_all_and_go_to_who_has_the_fewest() -> None:
    async with Takers(ReceiveSlots(ReceivingBound(3, 2, 60))) as takers:
        slots = takers.slots
        first = [await takers.take(A) for _ in range(4)]
        assert slots.of(A) == 2
        await takers.take(B)
        await takers.take(B)
        assert slots.of(B) == 1 and slots.held == 3
        await takers.take(C)
        await takers.end(first[0])
        assert [slots.of(party) for party in (A, B, C)] == [1, 1, 1], "who has none comes before who has one"
        await takers.end(first[1])
        assert [slots.of(party) for party in (A, B, C)] == [1, 1, 1], "of those with as many, who asked first"
        first[3].cancel()
        await takers.end(first[2])
        assert [slots.of(party) for party in (A, B, C)] == [0, 2, 1]


async def test_who_leaves_while_a_slot_comes_gives_it_on() -> None:
    async with Takers(ReceiveSlots(ReceivingBound(1, 1, 60))) as takers:
        holder, second, third = await takers.take(A), await takers.take(B), await takers.take(C)
        await takers.take(B)
        takers._leave[holder].set()
        await asyncio.sleep(0)  # the slot is given to `second`, which has not run
        second.cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert takers.slots.of(C) == 1
        await takers.end(third)
        assert takers.slots.of(B) == 1


async def test_a_slot_ends_in_time_once_others_wait_for_it() -> None:
    slots = ReceiveSlots(ReceivingBound(2, 1, 0.05))
    async with Takers(slots) as takers:
        slow, other = await takers.take(A), await takers.take(B)
        await asyncio.sleep(0.1)
        assert not slow.done() and not other.done(), "nobody waits"
        again = await takers.take(A)
        with pytest.raises(TimeoutError):
            await slow
        assert not other.done(), "nobody waits for that one"
        third = await takers.take(C)
        with pytest.raises(TimeoutError):
            await other
        assert slots.of(A) == slots.of(C) == 1
        await takers.end(again)
        await takers.end(third)


async def test_a_wait_for_a_slot_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Takers(ReceiveSlots(ReceivingBound(2, 1, 60))) as takers:
        await takers.take(A)
        monkeypatch.setattr(incoming, "STALL_S", 0.05)
        with pytest.raises(TransferStalled, match="1 messages of one caller at once, and client a had others"):
            await (await takers.take(A))


class Counted:
    """Counts the calls that are receiving, as gRPC is asked for messages."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        read = incoming.next_message

        async def counted(context: Any) -> Any:
            caller = context.auth_context()["x509_common_name"][0].decode()
            for who in (caller, "all"):
                self.now[who] += 1
                self.most[who] = max(self.most[who], self.now[who])
            try:
                return await read(context)
            finally:
                self.now.subtract((caller, "all"))

        monkeypatch.setattr(incoming, "next_message", counted)


@pytest.mark.timed(refusal_delay_s=0.0)
async def test_so_many_large_messages_are_received_at_once(
    secured: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Counted(monkeypatch)
    names = [f"client-{number}" for number in range(10)]
    channels = [secured.certificate(Role.CLIENT, name) for name in names]
    reasons = await asyncio.gather(*(sent(channel, ANSWER, LARGE) for channel in channels for _ in range(4)))
    assert set(reasons) == {"MESSAGE_TOO_LARGE"} and len(reasons) == 40
    assert counted.most["all"] <= bounds.RECEIVING.at_once
    assert {name: counted.most[name] for name in names} == dict.fromkeys(names, bounds.RECEIVING.of_one)


async def test_callers_that_send_nothing_keep_nobody_waiting(
    secured: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Counted(monkeypatch)
    monkeypatch.setattr(bounds, "RECEIVING", ReceivingBound(4, 2, 0.5))
    monkeypatch.setattr(secured.server.interceptor, "_slots", ReceiveSlots(bounds.RECEIVING))
    async with AsyncExitStack() as stack:
        silent = []
        channels = [secured.certificate(Role.CLIENT, name) for name in ("x", "y", "z")]
        # A connection may take longer to stand than a slot is held: then four would never be held at once.
        await asyncio.gather(*(channel.channel_ready() for channel in channels))
        for channel in channels:
            calls = [channel.stream_unary(ANSWER)(metadata=WHO) for _ in range(3)]
            silent += calls
            for call in calls:
                stack.callback(call.cancel)
        async with asyncio.timeout(10):
            while counted.most["all"] < 4:
                await asyncio.sleep(0.01)
        assert await sent(secured.certificate(Role.CLIENT, "honest"), CHECK, b"") == "OK"
        async with asyncio.timeout(10):
            ended = await silent[0].code()
        assert ended is grpc.StatusCode.UNAVAILABLE
        assert "while others waited; call again" in str(await silent[0].details())
    assert counted.most["all"] == 4 and counted.most["x"] == 2


@pytest.mark.timed(refusal_delay_s=60.0)
async def test_a_message_that_is_refused_takes_no_memory_while_its_caller_is_held(secured: Federation) -> None:
    channel = secured.certificate(Role.CLIENT, "large")
    pacing = secured.server.admission._pacing
    await sent(channel, CHECK, b"")  # the connection stands
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        calls = [channel.unary_unary(ANSWER)(LARGE, metadata=WHO) for _ in range(8)]
        async with asyncio.timeout(20):
            while pacing._held < len(calls):
                await asyncio.sleep(0.02)
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        for call in calls:
            call.cancel()
    assert after - before < len(LARGE), "of eight messages not even one is kept"


async def test_a_stream_that_is_no_transfer_is_received_in_slots_too(
    secured: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Counted(monkeypatch)
    method = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
    calls = [secured.operators().stream_stream(method)(metadata=WHO) for _ in range(3)]

    async def write(call: grpc.aio.StreamStreamCall) -> None:
        with suppress(asyncio.InvalidStateError):  # it may be refused while it is still written
            await call.write(LARGE)

    await asyncio.gather(*map(write, calls))  # at once: any two of them may have the slots, and must not wait for it
    for call in calls:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert from_rpc_error(caught.value).reason == "MESSAGE_TOO_LARGE"
    assert counted.most["all"] <= bounds.RECEIVING.of_one
