"""The table of bounds: each is tried at its limit and beyond it, on the wire."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import replace

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor

from fedpeft.errors import MessageInvalid, MessageTooLarge, TooManyCalls
from fedpeft.identity.subject import Role
from fedpeft.rpc import wire
from fedpeft.rpc.status import from_rpc_error
from fedpeft.v1 import federation_service_pb2 as fed
from fedpeft.v1 import operator_service_pb2 as op
from fedpeft_server.access import bounds
from fedpeft_server.access.bounds import CALLERS, CALLS, CallBound, Rate
from fedpeft_server.access.call import Party
from fedpeft_server.access.pacing import Pacing
from fedpeft_server.access.peers import address_of
from fedpeft_server.access.rights import RIGHTS
from fedpeft_server.rpc.requests import Requests
from fedpeft_server.timing import TIMING

from ..conftest import Daemon, StartDaemon
from ..secured import METHODS, Federation

WHO = ((wire.INSTANCE_KEY, "0" * 32),)
PADDING = 15
"""A field that no message has: what is unknown is skipped."""


def padded(size: int) -> bytes:
    """Returns a message of so many bytes, all in one field that nobody knows."""
    head = bytes([PADDING << 3 | 2])
    for length in range(max(0, size - 6), size):
        data = head + varint(length) + bytes(length)
        if len(data) == size:
            return data
    raise AssertionError(size)


def varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


async def sent(channel: grpc.aio.Channel, method: str, data: bytes) -> str:
    """Sends one message to a method; returns the reason with which it is refused, or OK."""
    kind = METHODS[method]

    async def one() -> AsyncIterator[bytes]:
        yield data

    try:
        async with asyncio.timeout(10):
            if kind.client_streaming and kind.server_streaming:
                await channel.stream_stream(method)(one(), metadata=WHO).read()
            elif kind.client_streaming:
                await channel.stream_unary(method)(one(), metadata=WHO)
            elif kind.server_streaming:
                call = channel.unary_stream(method)(data, metadata=WHO)
                await call.read()
                call.cancel()
            else:
                await channel.unary_unary(method)(data, metadata=WHO)
    except grpc.aio.AioRpcError as error:
        return from_rpc_error(error).reason
    return "OK"


def test_the_table_has_every_call_and_every_role() -> None:
    assert CALLS.keys() == METHODS.keys() == RIGHTS.keys()
    assert CALLERS.keys() == {*Role, None}


async def test_every_call_takes_a_message_of_its_size_and_none_that_is_larger(secured: Federation) -> None:
    at_once = asyncio.Semaphore(8)  # a refusal is held back for a second

    async def wrong(number: int, method: str) -> list[tuple[str, str]]:
        bound = CALLS[method]
        role = next(role for role in Role if role in RIGHTS[method])
        channel = secured.certificate(role, f"caller-{number}")  # one each, since who calls Leave is refused then
        most = min(bound.message_bytes, bounds.MESSAGE_LIMIT_BYTES - 1)  # beyond that gRPC refuses by itself
        faults = []
        async with at_once:
            found = await sent(channel, method, padded(bound.message_bytes + 1))
            if found != ("MESSAGE_TOO_LARGE" if most == bound.message_bytes else "INTERNAL"):
                faults.append((method, found))
            if await sent(channel, method, padded(most)) == "MESSAGE_TOO_LARGE":
                faults.append((method, "at its limit"))
        return faults

    found = await asyncio.gather(*(wrong(number, method) for number, method in enumerate(CALLS)))
    assert not [fault for faults in found for fault in faults]


def growing(method: str) -> bytes | None:
    """Returns the beginning of a field, of two bytes, of which the method's message may have many; None if of none."""
    for field in METHODS[method].input_type.fields:
        if field.is_repeated and field.type in (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_MESSAGE):
            return bytes([field.number << 3 | 2, 0])
    return None


@pytest.mark.parametrize("method", [m for m in CALLS if m in METHODS])
def test_every_call_takes_a_message_of_its_number_of_fields_and_none_that_has_more(method: str) -> None:
    bound, kind = CALLS[method], METHODS[method].input_type._concrete_class
    field = growing(method) or bytes([PADDING << 3 | 2, 0])
    requests = Requests(method, bound, kind, kind.FromString)
    requests.take(field * bound.elements)
    with pytest.raises(MessageTooLarge, match=f"more than {bound.elements} fields"):
        requests.take(field * (bound.elements + 1))


def nested(depth: int) -> bytes:
    """Returns a header of CreateRun with an option of lists within lists."""
    value = b""
    for _ in range(depth):
        value = b"\x32" + varint(len(value) + len(varint(len(value))) + 1) + b"\x0a" + varint(len(value)) + value
    for tag in (b"\x12", b"\x0a", b"\x12", b"\x12", b"\x0a", b"\x0a"):
        value = tag + varint(len(value)) + value
    return value


@pytest.mark.parametrize(
    "data",
    [
        b"\x0a\xff",
        b"\x0a",
        b"\xff" * 11,
        b"\x0b",
        b"\x0c",
        b"\x0d\x00",
        b"\x09\x00\x00",
        b"\x22\x03\x12\x05a",
        b"\x0a\x02\xff\xfe",
        b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
    ],
    ids=bytes.hex,
)
def test_what_is_no_message_is_said_to_be_none(data: bytes) -> None:
    tight = CallBound(elements=1)  # so that it is looked at before it is parsed
    for bound in (CallBound(), tight):
        requests = Requests("Register", bound, fed.RegisterRequest, fed.RegisterRequest.FromString)
        if data == b"\x0a\x02\xff\xfe":
            requests = Requests("Withdraw", bound, fed.WithdrawRequest, fed.WithdrawRequest.FromString)
        with pytest.raises((MessageInvalid, MessageTooLarge), match=r"not a \w+Request of protobuf|more than 1 fields"):
            requests.take(data)


def test_messages_within_messages_have_an_end() -> None:
    requests = Requests("CreateRun", CallBound(elements=4), op.CreateRunRequest, op.CreateRunRequest.FromString)
    with pytest.raises((MessageInvalid, MessageTooLarge)):
        requests.take(nested(2000))


def test_two_million_empty_messages_are_refused_before_they_take_memory() -> None:
    bound = CALLS["/fedpeft.v1.FederationService/PushUpdate"]
    requests = Requests("PushUpdate", bound, fed.PushUpdateRequest, fed.PushUpdateRequest.FromString)
    tensors = b"\x0a\x00" * 1_000_000
    manifest = b"\x12" + varint(len(tensors)) + tensors
    begun = time.process_time()
    with pytest.raises(MessageTooLarge, match="fields"):
        requests.take(b"\x0a" + varint(len(manifest)) + manifest)
    assert time.process_time() - begun < 1, "the counting ends at the bound"


def test_a_stream_of_tiny_messages_ends_and_one_of_chunks_does_not() -> None:
    bound = CALLS["/fedpeft.v1.FederationService/PushUpdate"]
    tiny = Requests("PushUpdate", bound, None, bytes)
    for _ in range(bounds.STREAM_MESSAGES + 1):  # which are `CHUNK_BYTES` by then, and so worth one more
        tiny.take(b"x")
    with pytest.raises(MessageTooLarge, match="send chunks"):
        tiny.take(b"x")
    chunks, chunk = Requests("PushUpdate", bound, None, bytes), bytes(bounds.CHUNK_BYTES)
    for _ in range(3 * bounds.STREAM_MESSAGES):
        chunks.take(chunk)


# Rates


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self.slept: list[float] = []
        monkeypatch.setattr(asyncio, "sleep", self.sleep)

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


async def call(pacing: Pacing, party: Party, method: str = "/x/y") -> None:
    async with pacing.paced(party, method):
        pass


@pytest.mark.parametrize("right", CALLERS, ids=str)
async def test_every_role_has_its_rate(clock: Clock, right: Role | None) -> None:
    pacing, me = Pacing(TIMING, clock), Party(right, "me")
    await spent(pacing, clock, me, "/x/y", CALLERS[right].rate)
    clock.slept.clear()
    await call(pacing, Party(right, "another"))
    assert not clock.slept, "the bound is one caller's"


@pytest.mark.parametrize("method", [m for m, bound in CALLS.items() if bound.rate])
async def test_every_call_with_a_rate_of_its_own_has_it(clock: Clock, method: str) -> None:
    rate = CALLS[method].rate
    assert rate is not None
    await spent(Pacing(TIMING, clock), clock, Party(Role.CLIENT, "me"), method, rate)


async def spent(pacing: Pacing, clock: Clock, me: Party, method: str, rate: Rate) -> None:
    """Makes calls: a burst is free, then they wait a while at most, then they are refused, and later free again."""
    for _ in range(rate.burst):
        await call(pacing, me, method)
    assert not clock.slept
    for number in range(1, int(rate.per_s * TIMING.call_wait_s) + 1):
        await call(pacing, me, method)
        assert clock.slept[-1] == pytest.approx(number / rate.per_s)
    with pytest.raises(TooManyCalls, match=f"more than {rate.per_s:g} "):
        await call(pacing, me, method)
    assert clock.slept[-1] == TIMING.refusal_delay_s, "who repeats a refused call at once gains nothing"
    clock.now += 1 / rate.per_s + TIMING.call_wait_s
    clock.slept.clear()
    await call(pacing, me, method)
    assert not clock.slept or clock.slept[-1] < TIMING.call_wait_s


@pytest.mark.parametrize("right", CALLERS, ids=str)
async def test_every_role_has_so_many_calls_under_way(clock: Clock, right: Role | None) -> None:
    pacing, me = Pacing(TIMING, clock), Party(right, "me")
    held = [pacing.paced(me, "/x/y") for _ in range(CALLERS[right].under_way)]
    for each in held:
        await each.__aenter__()
    with pytest.raises(TooManyCalls, match="under way"):
        await call(pacing, me)
    await call(pacing, Party(right, "another"))
    await held[0].__aexit__(None, None, None)
    await call(pacing, me)


async def test_refusals_are_held_back_only_while_they_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "MOST_REFUSALS_HELD", 1)
    pacing, me = Pacing(replace(TIMING, refusal_delay_s=30.0)), Party(None, "me")
    held = [pacing.paced(me, "/x/y") for _ in range(CALLERS[None].under_way)]
    for each in held:
        await each.__aenter__()
    first = asyncio.create_task(call(pacing, me))
    await asyncio.sleep(0)
    with pytest.raises(TooManyCalls):
        await asyncio.wait_for(call(pacing, me), 5)
    assert not first.done()
    first.cancel()


async def test_the_callers_that_are_remembered_are_bounded(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "MOST_CALLERS", 10)
    pacing = Pacing(TIMING, clock)
    for number in range(50):
        await call(pacing, Party(Role.CLIENT, str(number)))
    assert len(pacing._buckets) == 10 and not pacing._under_way


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        ("ipv4:10.0.0.7:49152", "10.0.0.7"),
        ("ipv6:%5B2001:db8::7%5D:49152", "2001:db8::/64"),
        ("ipv6:[2001:db8:0:0:1::]:1", "2001:db8::/64"),
        ("ipv6:[::ffff:10.0.0.7]:1", "10.0.0.7"),
        ("ipv6:[fe80::1%25eth0]:1", "fe80::/64"),
        ("unix:", "unix:"),
        ("ipv4:nonsense:1", "nonsense"),
    ],
)
def test_an_address_is_a_machine(peer: str, address: str) -> None:
    assert address_of(peer) == address


# On the wire


@pytest.mark.timed(call_wait_s=0.1, refusal_delay_s=0.0)
async def test_a_client_that_calls_too_fast_waits_and_is_then_refused(
    secured: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = "/fedpeft.v1.FederationService/Withdraw"
    monkeypatch.setitem(CALLS, method, CallBound(rate=Rate(0.5, 3)))  # type: ignore[arg-type]
    fast, other = secured.certificate(Role.CLIENT, "fast"), secured.certificate(Role.CLIENT, "other")
    found = [await sent(fast, method, b"") for _ in range(5)]
    assert found == ["TICKET_NOT_FOUND"] * 3 + ["TOO_MANY_CALLS"] * 2
    assert await sent(other, method, b"") == "TICKET_NOT_FOUND"


@pytest.mark.timed(refusal_delay_s=0.0)
async def test_an_unknown_method_is_paced_as_the_others_are(
    secured: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CALLERS, Role.CLIENT, bounds.CallerBound(Rate(0.01, 3), 32))  # type: ignore[arg-type]
    channel = secured.certificate(Role.CLIENT, "fast")
    codes = []
    for _ in range(5):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary("/no/such")(b"")
        codes.append(caught.value.code().name)
    assert codes == ["UNIMPLEMENTED"] * 3 + ["RESOURCE_EXHAUSTED"] * 2


async def test_nothing_is_read_of_who_may_not_call(secured: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    take = Requests.take

    def counted(self: Requests, data: bytes) -> object:
        read.append(len(data))
        return take(self, data)

    monkeypatch.setattr(Requests, "take", counted)
    viewer = secured.certificate(Role.VIEWER, "vera")
    assert await sent(viewer, "/fedpeft.v1.FederationService/AnswerOffer", padded(60_000)) == "ROLE_MAY_NOT"
    assert not read
    assert await sent(viewer, "/fedpeft.v1.OperatorService/ListRuns", b"") == "OK"
    assert read == [0]


async def test_malformed_bytes_are_answered_with_a_reason_by_every_call(secured: Federation) -> None:
    channels = {role: secured.certificate(role, f"my-{role}") for role in Role}
    wrong = []
    for method in CALLS:
        role = next(role for role in Role if role in RIGHTS[method])
        found = await sent(channels[role], method, b"\x0a\xff")
        if found != "MESSAGE_INVALID":
            wrong.append((method, found))
    assert not wrong


async def test_a_call_that_never_sends_its_message_ends(start: StartDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedpeft_server.uploads.incoming.STALL_S", 0.2)
    daemon = await start()
    call = daemon.channel.stream_unary("/fedpeft.v1.OperatorService/GetRun")()
    async with asyncio.timeout(10):
        assert await call.code() is grpc.StatusCode.UNAVAILABLE
    assert "did not come" in str(await call.details())


async def test_a_call_without_a_message_is_told_so(daemon: Daemon) -> None:
    call = daemon.channel.stream_unary("/fedpeft.v1.OperatorService/GetRun")()
    await call.done_writing()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert from_rpc_error(caught.value).reason == "MESSAGE_INVALID"
