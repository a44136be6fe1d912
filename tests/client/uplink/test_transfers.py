"""Pull and push against a real server whose connections break."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace

import numpy as np
import pytest
from structlog.testing import capture_logs

from fedpeft.adapters import payload
from fedpeft.adapters.payload import CHUNK_BYTES
from fedpeft.adapters.spec import AdapterSpec, TensorRole, TensorSpec
from fedpeft.errors import (
    ChecksumMismatch,
    ManifestInvalid,
    ServerUnreachable,
    VersionNotFound,
)
from fedpeft.rpc import wire
from fedpeft.v1 import federation_service_pb2 as pb
from fedpeft.v1 import run_pb2
from fedpeft_client.egress.entries import read
from fedpeft_client.egress.message_entries import update
from fedpeft_client.state.outbox import Outcome
from fedpeft_client.state.runs import KnownRun
from fedpeft_client.timing import TIMING
from fedpeft_client.uplink import pull
from fedpeft_client.uplink.channel import Channel
from fedpeft_client.uplink.push import Pusher

from ..federation import FakeTicket, Federation
from ..transfer_site import Site, a_run


async def test_pull_brings_a_version_and_then_nothing_more(site: Site) -> None:
    held = await site.puller.pull(0)
    manifest, data = site.federation.run.encoded(0)
    assert held.payload.read_bytes() == data and held.manifest == manifest
    assert [e.name for e in manifest.entries] == ["a", "z"], "local tensors do not travel"
    assert await site.puller.pull(0) == held
    site.federation.run.versions.append(site.federation.run.versions[0])
    assert (await site.puller.pull(1)).version == 1
    assert site.federation.pulled == [(0, 0, False), (0, 0, True), (1, 0, True)]


async def test_pull_continues_at_the_byte_where_it_broke_off(site: Site) -> None:
    site.federation.break_pull_after = [1_500_000, 900_000]
    held = await site.puller.pull(0)
    assert held.payload.read_bytes() == site.federation.run.encoded(0)[1]
    offsets = [offset for _, offset, _ in site.federation.pulled]
    assert offsets[0] == 0 and offsets[1] >= 1_500_000 and len(offsets) == 3
    assert offsets == sorted(offsets)


async def test_pull_continues_what_a_killed_process_began(site: Site) -> None:
    data = site.federation.run.encoded(0)[1]
    site.cache.part(0).write_bytes(data[:1_000_001])
    held = await site.puller.pull(0)
    assert held.payload.read_bytes() == data
    assert site.federation.pulled == [(0, 1_000_001, False)]


@pytest.mark.parametrize("part", [b"garbage", bytes(4_000_000)])
async def test_pull_starts_over_from_a_part_that_is_wrong(site: Site, part: bytes) -> None:
    site.cache.part(0).write_bytes(part)
    held = await site.puller.pull(0)
    assert held.payload.read_bytes() == site.federation.run.encoded(0)[1]
    assert [offset for _, offset, _ in site.federation.pulled] == [len(part), 0]


async def test_pull_of_a_version_that_is_not_there_fails_at_once(site: Site) -> None:
    with pytest.raises(VersionNotFound):
        await site.puller.pull(7)


async def test_pull_of_an_adapter_that_does_not_fit_the_spec_is_refused(site: Site) -> None:
    other = AdapterSpec("bias", (TensorSpec("a", (900_001,)),))
    site.federation.run.spec = other
    site.federation.run.versions = [{"a": np.zeros(900_001, np.float32)}]
    with pytest.raises(ManifestInvalid, match="adapter version 0: tensor z is missing"):
        await site.puller.pull(0)
    assert site.cache.held() is None


async def test_damage_on_the_way_is_seen_and_given_up_after_three_starts(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = site.federation.run.encoded

    def damaged(version: int) -> tuple[payload.Manifest, bytes]:
        manifest, data = real(version)
        return manifest, b"\0" + data[1:]

    monkeypatch.setattr(site.federation.run, "encoded", damaged)
    with pytest.raises(ChecksumMismatch):
        await site.puller.pull(0)
    assert len(site.federation.pulled) == pull.STARTS


TURNS = (TensorRole.SENT, TensorRole.FROZEN)
TWO_HALVES = AdapterSpec(
    "rolora", (TensorSpec("a", (500_000,), TURNS[::-1]), TensorSpec("b", (400_000,), TURNS), TensorSpec("head", (3,)))
)
B, A, HEAD, WHOLE = 1_600_000, 2_000_000, 12, 3_600_012
"""Bytes of the tensors."""


class TestAVersionOfWhichAPartChanged:
    """The version held is completed: round 1 changes b and the head, round 2 a and the head."""

    @pytest.fixture
    def partly(self, site: Site) -> Site:
        fake, draw = site.federation.run, np.random.default_rng(1)
        versions = [{t.name: draw.standard_normal(t.shape).astype(np.float32) for t in TWO_HALVES.tensors}]
        for number in (1, 2, 3):
            changed = {t.name: versions[-1][t.name] + 1 for t in TWO_HALVES.sent(number)}
            versions.append({**versions[-1], **changed})
        fake.spec, fake.versions = TWO_HALVES, versions
        site.run = KnownRun.of(fake.message())
        site.puller = pull.Puller(site.channel, site.retry, site.run, site.cache)
        return site

    def holds(self, site: Site, version: int) -> bool:
        held = site.cache.held()
        assert held is not None and [path.name for path in held.payload.parent.glob("*.part")] == []
        return (held.version, held.payload.read_bytes()) == (version, site.federation.run.encoded(version)[1])

    async def test_costs_that_part_up_to_a_client_that_missed_a_round(self, partly: Site) -> None:
        for version, cost in ((0, WHOLE), (1, B + HEAD), (3, WHOLE), (2, B + HEAD), (3, B + HEAD)):
            await partly.puller.pull(version)
            assert self.holds(partly, version)
            assert partly.federation.pulled_bytes[-1] == cost

    async def test_is_continued_where_it_broke_off(self, partly: Site) -> None:
        await partly.puller.pull(0)
        partly.federation.break_pull_after = [500_000, 600_000]
        await partly.puller.pull(1)
        assert self.holds(partly, 1)
        pulls = [offset for version, offset, _ in partly.federation.pulled if version == 1]
        assert pulls[0] == 0 and pulls[1] >= 500_000 and len(pulls) == 3
        assert [offset + n for offset, n in zip(pulls, partly.federation.pulled_bytes[1:], strict=True)] == [
            B + HEAD
        ] * 3

    async def test_comes_whole_from_a_server_that_knows_no_parts(self, partly: Site) -> None:
        partly.federation.sends_parts = False
        await partly.puller.pull(0)
        partly.federation.break_pull_after = [900_000]
        await partly.puller.pull(1)
        assert self.holds(partly, 1)
        pulls, left = partly.federation.pulled, partly.federation.pulled_bytes
        assert [offset + n for (_, offset, _), n in zip(pulls, left, strict=True)] == [WHOLE] * 3

    async def test_comes_whole_where_the_server_is_replaced_by_an_old_one_in_the_middle(self, partly: Site) -> None:
        await partly.puller.pull(0)
        partly.federation.break_pull_after = [500_000]
        partly.federation.on_pull = lambda request: setattr(partly.federation, "sends_parts", not request.offset)
        await partly.puller.pull(1)
        assert self.holds(partly, 1)

    async def test_comes_whole_where_what_is_held_does_not_complete_it(self, partly: Site) -> None:
        await partly.puller.pull(1)
        partly.federation.run.versions[2] = partly.federation.run.versions[0]  # rolled back: b differs too
        with capture_logs() as logs:
            await partly.puller.pull(2)
        assert self.holds(partly, 2)
        assert partly.federation.pulled_bytes == [WHOLE, A + HEAD, WHOLE]
        assert [line["version"] for line in logs if "pulled again" in line["event"]] == [2]

    async def test_is_refused_where_the_server_names_tensors_that_are_none(
        self, partly: Site, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await partly.puller.pull(0)
        for wrong in ((0, 0), (1, 0), (0, 3), (7,)):
            monkeypatch.setattr(payload, "missing", lambda *_, wrong=wrong: wrong)
            with pytest.raises(ManifestInvalid, match="not ascending positions of 3 tensors"):
                await partly.puller.pull(1)


async def test_push_gets_a_receipt_and_settles(site: Site) -> None:
    pending = site.pending()
    outcome = await site.pusher.push(pending, site.log)
    assert outcome is Outcome.COUNTED
    site.outbox.settle(pending, outcome)
    assert site.outbox.load() is None
    assert site.ticket.state == run_pb2.TICKET_STATE_RECEIVED
    assert hashlib.sha256(site.ticket.held).digest() == pending.manifest.sha256


async def test_push_continues_at_the_byte_where_it_stopped(site: Site) -> None:
    site.federation.break_push_after = [1, 1_234_567, CHUNK_BYTES]
    pending = site.pending()
    assert await site.pusher.push(pending, site.log) is Outcome.COUNTED
    assert [p.offset for p in site.federation.pushes] == [0, 1, 1_234_568, 1_234_568 + CHUNK_BYTES]
    assert sum(p.received for p in site.federation.pushes) == pending.manifest.payload_bytes
    told = sum(each.entry.wire_bytes for each in read(site.egress_log.path).booked.values())
    assert told >= site.federation.arrivals.wire_bytes, "the ledger never tells less than what left"


@asynccontextmanager
async def balanced(order: Iterable[Federation]) -> AsyncIterator[str]:
    """Passes each connection on to the next server of an order, as a TCP balancer does; yields its address."""
    servers = iter(order)
    tasks = set[asyncio.Task[None]]()
    writers = list[asyncio.StreamWriter]()

    async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there = await asyncio.open_connection("127.0.0.1", next(servers).port)
        writers.extend((writer, there[1]))
        tasks.update(asyncio.create_task(pipe(*ends)) for ends in ((reader, there[1]), (there[0], writer)))

    balancer = await asyncio.start_server(connected, "127.0.0.1")
    try:
        yield f"127.0.0.1:{balancer.sockets[0].getsockname()[1]}"
    finally:
        balancer.close()
        for writer in writers:
            writer.transport.abort()
        await asyncio.gather(*tasks)


async def test_push_that_another_server_of_the_name_takes_begins_where_that_one_stands(site: Site) -> None:
    """A balancer gives the next connection to a server that knows nothing of what another one holds of the upload."""
    pending = site.pending()
    run = a_run()
    run.number, run.tickets = 1, {"ticket-1": FakeTicket("ticket-1", "site-a", 1)}
    other = Federation(run)
    await other.start()
    site.federation.break_push_after = [1_234_567]
    try:
        async with (
            balanced([site.federation] * 2 + [other] * 9) as address,
            Channel(address, "site-a", "0" * 32) as channel,
        ):
            await channel.get_upload("ticket-1", b"")  # as a client does that trains: the first connection stays
            outcome = await Pusher(channel, site.retry, site.egress_log).push(pending, site.log)
        assert outcome is Outcome.COUNTED
        assert [push.offset for push in site.federation.pushes] == [0]
        assert [(push.offset, push.error) for push in other.pushes] == [(0, "")]
    finally:
        await other.stop()


@pytest.mark.parametrize("begun", [1_234_567, 0], ids=["a part is there", "nothing is there"])
async def test_push_behind_a_balancer_of_calls_is_sent_whole_to_the_server_that_takes_it(
    site: Site, begun: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server that takes it stands elsewhere than the one that was asked where the upload stands."""
    pending = site.pending()
    run = a_run()
    run.number, run.tickets = 1, {"ticket-1": FakeTicket("ticket-1", "site-a", 1)}
    other = Federation(run)
    await other.start()
    payload_bytes = pending.payload.read_bytes()
    site.ticket.held_sha256 = run.tickets["ticket-1"].held_sha256 = pending.manifest.sha256
    site.ticket.held = bytearray(payload_bytes if not begun else payload_bytes[:99])
    run.tickets["ticket-1"].held = bytearray(payload_bytes[:begun])
    try:
        async with (
            Channel(f"127.0.0.1:{other.port}", "site-a", "0" * 32) as there,
            there.own_connection() as taking,
            Channel(site.federation.address, "site-a", "0" * 32) as channel,
        ):
            monkeypatch.setattr(channel, "push_update", lambda _: there.push_update(taking))
            outcome = await Pusher(channel, site.retry, site.egress_log).push(pending, site.log)
        assert outcome is Outcome.COUNTED
        assert [push.received for push in other.pushes] == [0, len(payload_bytes)]
    finally:
        await other.stop()


async def test_each_attempt_of_a_push_is_permitted_for_what_is_left_of_it(site: Site) -> None:
    asked = list[int]()

    async def permit(more_bytes: int) -> bool:
        asked.append(more_bytes)
        return len(asked) == 2  # it waited: where the upload stands is asked again

    site.federation.break_push_after = [1_234_567]
    pending = site.pending()
    pusher = Pusher(site.channel, site.retry, site.egress_log, permit)
    assert await pusher.push(pending, site.log) is Outcome.COUNTED
    assert [p.offset for p in site.federation.pushes] == [0, 1_234_567]
    wanted = [update(pending, offset).wire_bytes for offset in (0, 1_234_567, 1_234_567)]
    assert asked == wanted and wanted[0] > pending.manifest.payload_bytes, "of whole messages"


async def test_a_push_that_waits_for_the_bytes_of_a_day_ends_with_its_ticket(site: Site) -> None:
    async def permit(more_bytes: int) -> bool:
        site.ticket.state = run_pb2.TICKET_STATE_WITHDRAWN
        await asyncio.sleep(60)
        return True

    pending = site.pending()
    site.channel.timing = replace(TIMING, ticket_check_s=0.05)
    pusher = Pusher(site.channel, site.retry, site.egress_log, permit)
    assert await asyncio.wait_for(pusher.push(pending, site.log), 10) is Outcome.NOT_COUNTED
    assert site.federation.pushes == []


@pytest.mark.parametrize("direction", ["push", "pull"])
async def test_patience_does_not_end_while_a_transfer_makes_progress(site: Site, direction: str) -> None:
    site.retry.give_up_s = 3.0  # pauses that grew over eight breaks would take longer
    site.federation.break_push_after = [400_000] * 8
    site.federation.break_pull_after = [400_000 * breaks for breaks in range(1, 9)]
    if direction == "push":
        assert await site.pusher.push(site.pending(), site.log) is Outcome.COUNTED
        assert len(site.federation.pushes) == 9
    else:
        assert (await site.puller.pull(0)).payload.read_bytes() == site.federation.run.encoded(0)[1]
        assert len(site.federation.pulled) == 9


async def test_push_whose_answer_was_lost_counts_once(site: Site) -> None:
    site.federation.receive_but_do_not_answer = 1
    assert await site.pusher.push(site.pending(), site.log) is Outcome.COUNTED
    assert len(site.federation.pushes) == 1, "GetUpload had the receipt"
    assert len(site.federation.run.versions) == 2


async def test_push_survives_a_server_that_restarts(site: Site) -> None:
    site.federation.chunk_pause_s = 0.2
    pending = site.pending()
    pushing = asyncio.create_task(site.pusher.push(pending, site.log))
    while not (site.federation.pushes and site.federation.pushes[0].received):
        await asyncio.sleep(0.01)
    with capture_logs() as lines:
        await site.federation.stop()
        await asyncio.sleep(1.5)
        await site.federation.start()
        assert await pushing is Outcome.COUNTED
    assert len(site.federation.pushes) > 1, "the first was cut off"
    assert sum(p.received for p in site.federation.pushes) == pending.manifest.payload_bytes, "no byte went twice"
    events = [line["event"] for line in lines]
    assert sum(event.startswith("server is unavailable") for event in events) == 1
    assert events.count("server is back") == 1


async def test_push_that_stalls_is_broken_off_and_continued(site: Site) -> None:
    site.channel.timing = replace(TIMING, stall_s=0.5)
    site.federation.stall_push_after = [CHUNK_BYTES]
    pending = site.pending()
    pushing = asyncio.create_task(site.pusher.push(pending, site.log))
    while not len(site.federation.pushes) > 1:
        await asyncio.sleep(0.01)
    site.federation.stall_push_after = []
    assert await pushing is Outcome.COUNTED
    assert sum(p.received for p in site.federation.pushes) == pending.manifest.payload_bytes, "no byte went twice"


async def test_pull_that_stalls_is_broken_off(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.channel.timing = replace(TIMING, stall_s=0.3)
    stalled = asyncio.Event()
    real = site.federation.run.encoded

    async def stall(request: object, context: object) -> AsyncIterator[pb.PullAdapterResponse]:
        stalled.set()
        manifest = wire.manifest_to_proto(real(0)[0])
        yield pb.PullAdapterResponse(header=pb.PullHeader(version=0, manifest=manifest))
        await asyncio.sleep(3600)

    site.retry.give_up_s = 0.0
    await site.federation.stop()
    monkeypatch.setattr(site.federation, "PullAdapter", stall)
    await site.federation.start()
    with pytest.raises(ServerUnreachable, match="the pull stalled"):
        await site.puller.pull(0)
    assert stalled.is_set()
