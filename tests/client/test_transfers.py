"""Pull and push against a real server whose connections break."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
from google.protobuf.message import Message
from structlog.testing import capture_logs

from fedpeft import logs, payload, wire
from fedpeft.config import parse_config
from fedpeft.errors import (
    BeingChecked,
    ChecksumMismatch,
    ClientIdInUse,
    DiskFull,
    FedpeftError,
    Internal,
    ManifestInvalid,
    MetricsInvalid,
    NotRegistered,
    PayloadInvalid,
    RoundClosed,
    ServerUnreachable,
    StateInvalid,
    TicketClosed,
    TicketNotFound,
    TooManyCalls,
    TransfersBusy,
    TurnOver,
    UpdateTooLarge,
    VersionNotFound,
)
from fedpeft.payload import CHUNK_BYTES
from fedpeft.spec import AdapterSpec, Role, TensorSpec
from fedpeft.v1 import federation_service_pb2 as pb
from fedpeft.v1 import run_pb2
from fedpeft_client import departures, patience, pull, push, state
from fedpeft_client.adapters import AdapterCache
from fedpeft_client.channel import Channel
from fedpeft_client.ledger import Ledger
from fedpeft_client.ledger_entries import Kind, read
from fedpeft_client.metrics import Metrics
from fedpeft_client.patience import Backoff, Patience
from fedpeft_client.pending import IF_COUNTED, IF_NOT, LOCAL, PAYLOAD, Outcome, Pending, PendingBox
from fedpeft_client.pull import Puller
from fedpeft_client.push import Pusher
from fedpeft_client.recall import Recall
from fedpeft_client.runs import KnownRun
from fedpeft_client.state import StateDirectory
from fedpeft_client.traffic import Traffic

from .federation import _CLOSES, FakeRun, FakeTicket, Federation

SHAPE = (900_000,)  # 3.6 MB: four chunks
SPEC = AdapterSpec("bias", (TensorSpec("a", SHAPE), TensorSpec("kept", (5,), (Role.LOCAL,)), TensorSpec("z", (3,))))


def a_run() -> FakeRun:
    config = parse_config(
        {
            "model": {"name": "vit_tiny_patch16_224", "weights": "none", "classes": ["a", "b"]},
            "peft": {"method": "bias"},
            "rounds": {"clients": 1},
        }
    )
    values = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    return FakeRun(config, SPEC, "0" * 64, {"a": values, "z": np.arange(3, dtype=np.float32)})


class Site:
    """One client's side of the transfers."""

    def __init__(self, federation: Federation, directory: StateDirectory, channel: Channel) -> None:
        self.federation, self.directory, self.channel = federation, directory, channel
        assert federation.run is not None
        self.run = KnownRun.of(federation.run.message())
        self.cache = AdapterCache(directory.run(self.run.id))
        self.log = logs.logger(client="site-a")
        self.patience = Patience(self.log, None)
        self.puller = Puller(channel, self.patience, self.run, self.cache)
        self.ledger = Ledger(directory.path, federation.address)
        Traffic(channel, self.ledger, Metrics())
        self.pusher = Pusher(channel, self.patience, self.ledger)
        self.box = PendingBox(directory, "")

    def pending(self) -> Pending:
        """Makes an update, and the ticket for it at the server."""
        assert self.federation.run is not None
        self.federation.run.number = 1
        self.federation.run.tickets["ticket-1"] = FakeTicket("ticket-1", "site-a", 1)
        delta = {"a": np.full(SHAPE, 0.5, np.float32), "z": np.ones(3, np.float32)}
        manifest, data = payload.encode(delta, SPEC.sent(1), "float32")
        draft = self.box.draft()
        (draft / PAYLOAD).write_bytes(data)
        for name in (IF_COUNTED, IF_NOT, LOCAL):
            (draft / name).write_bytes(name.encode())
        header = pb.UpdateHeader(ticket="ticket-1", manifest=wire.manifest_to_proto(manifest), examples=4)
        return self.box.commit(self.run.id, 1, header)

    @property
    def ticket(self) -> FakeTicket:
        assert self.federation.run is not None
        return self.federation.run.tickets["ticket-1"]


@pytest.fixture
async def site(federation: Federation, tmp_path: Path) -> AsyncIterator[Site]:
    federation.run = a_run()
    with StateDirectory(tmp_path / "state") as directory:
        async with Channel(federation.address, "site-a", directory.instance) as channel:
            yield Site(federation, directory, channel)


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


async def test_push_gets_a_receipt_and_settles(site: Site) -> None:
    pending = site.pending()
    outcome = await site.pusher.push(pending, site.log)
    assert outcome is Outcome.COUNTED
    site.box.settle(pending, outcome)
    assert site.box.load() is None
    assert site.ticket.state == run_pb2.TICKET_STATE_RECEIVED
    assert hashlib.sha256(site.ticket.held).digest() == pending.manifest.sha256


async def test_push_continues_at_the_byte_where_it_stopped(site: Site) -> None:
    site.federation.break_push_after = [1, 1_234_567, CHUNK_BYTES]
    pending = site.pending()
    assert await site.pusher.push(pending, site.log) is Outcome.COUNTED
    assert [p.offset for p in site.federation.pushes] == [0, 1, 1_234_568, 1_234_568 + CHUNK_BYTES]
    assert sum(p.received for p in site.federation.pushes) == pending.manifest.payload_bytes
    told = sum(each.departure.wire_bytes for each in read(site.ledger.path).booked.values())
    assert told >= site.federation.arrivals.wire_bytes, "the ledger never tells less than what left"


@pytest.mark.parametrize("direction", ["push", "pull"])
async def test_patience_does_not_end_while_a_transfer_makes_progress(site: Site, direction: str) -> None:
    site.patience.give_up_s = 3.0  # pauses that grew over eight breaks would take longer
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


async def test_push_that_stalls_is_broken_off_and_continued(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(push, "STALL_S", 0.5)
    site.federation.stall_push_after = [CHUNK_BYTES]
    pending = site.pending()
    pushing = asyncio.create_task(site.pusher.push(pending, site.log))
    while not len(site.federation.pushes) > 1:
        await asyncio.sleep(0.01)
    site.federation.stall_push_after = []
    assert await pushing is Outcome.COUNTED
    assert sum(p.received for p in site.federation.pushes) == pending.manifest.payload_bytes, "no byte went twice"


async def test_pull_that_stalls_is_broken_off(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pull, "STALL_S", 0.3)
    stalled = asyncio.Event()
    real = site.federation.run.encoded

    async def stall(request: object, context: object) -> AsyncIterator[pb.PullAdapterResponse]:
        stalled.set()
        manifest = wire.manifest_to_proto(real(0)[0])
        yield pb.PullAdapterResponse(header=pb.PullHeader(version=0, manifest=manifest))
        await asyncio.sleep(3600)

    site.patience.give_up_s = 0.0
    await site.federation.stop()
    monkeypatch.setattr(site.federation, "PullAdapter", stall)
    await site.federation.start()
    with pytest.raises(ServerUnreachable, match="the pull stalled"):
        await site.puller.pull(0)
    assert stalled.is_set()


@pytest.mark.parametrize(
    ("error", "outcome", "withdraws"),
    [
        (RoundClosed("too late"), Outcome.NOT_COUNTED, False),
        (TicketClosed("withdrawn"), Outcome.NOT_COUNTED, False),
        (TicketNotFound("gone"), Outcome.NOT_COUNTED, True),
        (UpdateTooLarge("over 1 GB"), Outcome.NOT_COUNTED, True),
        (PayloadInvalid("NaN"), Outcome.DROPPED, False),
        (ManifestInvalid("a is missing"), Outcome.DROPPED, True),
    ],
)
async def test_refusals(site: Site, error: Exception, outcome: Outcome, withdraws: bool) -> None:
    site.federation.refuse_push = [error]
    assert await site.pusher.push(site.pending(), site.log) is outcome
    assert bool(site.federation.withdrawn) is withdraws


async def test_an_update_that_arrived_stays_pending_when_the_ledger_cannot_say_so(site: Site) -> None:
    ledger, counted = site.ledger._file._file, site.channel.sent
    kept, full = os.dup(ledger), os.open("/dev/full", os.O_WRONLY)

    def fill_the_disk(message: Message) -> None:
        counted(message)
        if isinstance(message, pb.PushUpdateRequest) and message.HasField("chunk"):
            os.dup2(full, ledger)

    site.channel.sent = fill_the_disk
    pending = site.pending()
    with pytest.raises(StateInvalid, match="cannot write the ledger"):
        await site.pusher.push(pending, site.log)
    assert site.ticket.receipt is not None, "the server has it: as a residual it would count twice"
    os.dup2(kept, ledger)
    assert await site.pusher.push(pending, site.log) is Outcome.COUNTED


async def test_an_upload_that_was_given_up_and_counted_after_all_is_not_kept_as_well(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(_CLOSES, "UpdateTooLarge", run_pb2.TICKET_STATE_RECEIVED)
    site.federation.refuse_push = [UpdateTooLarge("over 1 GB")]
    assert await site.pusher.push(site.pending(), site.log) is Outcome.COUNTED


async def test_a_server_that_gives_neither_turn_nor_answer_is_not_waited_for_without_end(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(push, "STALL_S", 0.3)
    site.federation.hang_before_turn = 1
    async with asyncio.timeout(5):
        assert await site.pusher.push(site.pending(), site.log) is Outcome.COUNTED
    assert len(site.federation.pushes) == 2


async def test_round_that_closes_during_the_upload(site: Site) -> None:
    site.federation.close_round_after = CHUNK_BYTES
    pending = site.pending()
    assert await site.pusher.push(pending, site.log) is Outcome.NOT_COUNTED
    assert CHUNK_BYTES <= site.federation.pushes[0].received < pending.manifest.payload_bytes


async def test_update_for_an_unknown_ticket_is_not_counted(site: Site) -> None:
    pending = site.pending()
    site.federation.run.tickets.clear()
    assert await site.pusher.push(pending, site.log) is Outcome.NOT_COUNTED
    assert not site.federation.pushes


async def test_full_server_is_asked_again(site: Site) -> None:
    site.federation.refuse_push = [TransfersBusy("8 are under way"), TransfersBusy("8 are under way")]
    assert await site.pusher.push(site.pending(), site.log) is Outcome.COUNTED
    assert len(site.federation.pushes) == 3


@pytest.mark.parametrize(
    "error", [TransfersBusy("8 are"), TurnOver("others wait"), BeingChecked("wait"), TooManyCalls("32 are")]
)
async def test_a_status_with_a_retry_hint_is_no_failure(
    site: Site, monkeypatch: pytest.MonkeyPatch, error: FedpeftError
) -> None:
    """However often it comes: no attempt is counted, no absence noted, patience does not end."""
    pauses: list[float] = []

    async def rest(hint_s: float) -> None:
        pauses.append(hint_s)

    monkeypatch.setattr(patience, "_rest", rest)
    site.patience.give_up_s = 0.0
    site.federation.refuse_push = [error] * 20
    with capture_logs() as lines:
        assert await site.pusher.push(site.pending(), site.log) is Outcome.COUNTED
    assert len(pauses) == 20 and len(site.federation.pushes) == 21
    assert error.retry_s <= pauses[0] <= max(error.retry_s, patience.FIRST_PAUSE_S)
    assert all(error.retry_s <= pause <= patience.LONGEST_PAUSE_S for pause in pauses)
    assert pauses[-1] >= patience.LONGEST_PAUSE_S / 2, "it said so at once"
    said = [line["reason"] for line in lines if line["event"] == "retrying as the server asked"]
    assert said == [error.reason] * 20
    assert not [line for line in lines if line["log_level"] == "warning"]


async def test_a_hint_to_go_on_at_once_makes_no_busy_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []

    async def sleep(pause_s: float) -> None:
        slept.append(pause_s)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    for hint_s in (0.0, 5.0, 3600.0):
        await patience._rest(hint_s)
    assert 0.1 <= slept[0] <= 0.2 and 2.5 <= slept[1] <= 5.0 and 5.0 <= slept[2] <= 10.0


async def test_an_update_that_an_earlier_attempt_was_refused_for_is_dropped(site: Site) -> None:
    pending = site.pending()
    site.ticket.state = run_pb2.TICKET_STATE_REFUSED  # the answer was lost on its way
    assert await site.pusher.push(pending, site.log) is Outcome.DROPPED
    assert not site.federation.pushes and not site.federation.withdrawn


@pytest.mark.parametrize("error", [NotRegistered("who?"), ClientIdInUse("another")])
async def test_refusal_of_the_client_leaves_the_update_pending(site: Site, error: Exception) -> None:
    site.federation.refuse_push = [error]
    with pytest.raises(type(error)):
        await site.pusher.push(site.pending(), site.log)
    assert site.box.load() is not None


async def test_a_server_without_room_is_waited_for_by_whatever_call(site: Site) -> None:
    site.federation.refuse_register = [DiskFull("no room"), DiskFull("no room")]
    site.federation.refuse_push = [DiskFull("no room")]
    with capture_logs() as lines:
        with site.ledger.booked(departures.registration(pb.RegisterRequest())):
            await site.patience.keep(lambda: site.channel.register(pb.RegisterRequest()))
        assert await site.pusher.push(site.pending(), site.log) is Outcome.COUNTED
    assert site.federation.registrations == 1 and len(site.federation.pushes) == 2
    full = [line["cause"] for line in lines if line["event"].startswith("the server's disk is full; retrying")]
    assert full == ["the server's disk is full: no room"] * 2
    assert not any(line["event"].startswith("server is unavailable") for line in lines)


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "FIRST_FAULT_PAUSE_S", 0.001)


@pytest.mark.usefixtures("no_pauses")
@pytest.mark.parametrize("withdraws", [True, False])
async def test_an_update_that_the_server_fails_on_is_set_aside_after_a_few_attempts(
    site: Site, withdraws: bool
) -> None:
    site.federation.refuse_push = [Internal("StateInvalid") for _ in range(20)]
    site.federation.fail = {} if withdraws else {"Withdraw": [Internal("StateInvalid") for _ in range(20)]}
    pending = site.pending()
    with capture_logs() as lines:
        assert await site.pusher.push(pending, site.log) is Outcome.SET_ASIDE
    assert len(site.federation.pushes) == patience.FAULT_ATTEMPTS
    assert bool(site.federation.withdrawn) is withdraws
    events = [line["event"] for line in lines if line["log_level"] in ("error", "warning")]
    assert events[:2] == [
        patience.FAILS,
        "the server cannot take this update; it is set aside, and its content goes into the residual",
    ]
    assert ("ticket could not be given back; its round waits until its deadline" in events) is not withdraws
    site.box.settle(pending, Outcome.SET_ASIDE)
    residual = site.directory.path / "runs" / site.run.id / "residual.safetensors"
    assert residual.read_bytes() == IF_NOT.encode()
    (kept,) = site.box.aside.iterdir()
    assert hashlib.sha256((kept / PAYLOAD).read_bytes()).digest() == pending.manifest.sha256
    booked = list(read(site.directory.path / "ledger.jsonl").booked.values())
    uploads = [each for each in booked if each.departure.kind is Kind.UPDATE]
    assert uploads and all("INTERNAL" in each.words for each in uploads)
    assert booked[-1].departure.said["reason"].startswith("set aside: ")


@pytest.mark.usefixtures("no_pauses")
async def test_a_server_that_failed_a_few_times_and_then_works_gets_the_update(site: Site) -> None:
    site.federation.refuse_push = [Internal("StateInvalid") for _ in range(patience.FAULT_ATTEMPTS - 1)]
    assert await site.pusher.push(site.pending(), site.log) is Outcome.COUNTED


async def test_an_update_with_a_fault_of_form_is_set_aside_at_once(site: Site) -> None:
    site.federation.refuse_push = [MetricsInvalid("the figure loss is -1")]
    assert await site.pusher.push(site.pending(), site.log) is Outcome.SET_ASIDE
    assert len(site.federation.pushes) == 1 and site.federation.withdrawn


@pytest.mark.usefixtures("no_pauses")
async def test_a_receipt_for_other_bytes_is_no_receipt(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    async def lie(*_: object) -> pb.PushUpdateResponse:
        return pb.PushUpdateResponse(ticket="ticket-1", sha256=bytes(32))

    monkeypatch.setattr(site.federation, "_receive", lie)
    assert await site.pusher.push(site.pending(), site.log) is Outcome.SET_ASIDE


@pytest.mark.usefixtures("no_pauses")
async def test_a_pull_that_the_server_fails_in_ends_after_a_few_attempts(site: Site) -> None:
    site.federation.fail = {"PullAdapter": [Internal("BlobCorrupt") for _ in range(20)]}
    with pytest.raises(Internal):
        await site.puller.pull(0)
    assert len(site.federation.fail["PullAdapter"]) == 20 - patience.FAULT_ATTEMPTS


@pytest.mark.usefixtures("no_pauses")
async def test_calls_beside_which_nothing_else_can_be_done_are_repeated_as_long_as_it_takes(site: Site) -> None:
    site.federation.refuse_register = [Internal("StateInvalid") for _ in range(12)]
    with site.ledger.booked(departures.registration(pb.RegisterRequest())):
        await site.patience.keep(lambda: site.channel.register(pb.RegisterRequest()), faults=None)
    assert site.federation.registrations == 1


async def test_checksum_mismatch_starts_over_and_is_then_given_up(site: Site) -> None:
    site.federation.refuse_push = [ChecksumMismatch("no") for _ in range(push.STARTS)]
    assert await site.pusher.push(site.pending(), site.log) is Outcome.NOT_COUNTED
    assert len(site.federation.pushes) == push.STARTS and site.federation.withdrawn


async def test_patience_ends_when_it_was_told_to(site: Site) -> None:
    await site.federation.stop()
    patient = Patience(site.log, 2.0)
    with capture_logs() as lines, pytest.raises(ServerUnreachable, match="nothing listens on port"):
        await patient.keep(lambda: site.channel.get_upload("t", bytes(32)))
    assert [line["event"] for line in lines] == ["server is unavailable; retrying until it answers"]


def test_pauses_grow_to_a_cap_and_are_never_none() -> None:
    backoff = Backoff()
    pauses = [backoff.draw() for _ in range(12)]
    assert all(0 < pause <= patience.LONGEST_PAUSE_S for pause in pauses)
    assert pauses[0] <= patience.FIRST_PAUSE_S and pauses[-1] >= patience.LONGEST_PAUSE_S / 2
    backoff.reset()
    assert backoff.draw() <= patience.FIRST_PAUSE_S


EXCLUDED = "UPDATE_EXCLUDED: its norm 3e+38 is more than 30 times 1"


class TestExcludedAfterTheReceipt:
    async def counted(self, site: Site) -> Recall:
        pending = site.pending()
        outcome = await site.pusher.push(pending, site.log)
        assert outcome is Outcome.COUNTED
        site.box.settle(pending, outcome)
        return Recall(site.channel, site.patience, site.box)

    def residual(self, site: Site) -> str:
        return state.residual(site.directory.run(site.run.id)).read_text()

    async def test_it_goes_into_the_residual_before_the_next_training(self, site: Site) -> None:
        recall = await self.counted(site)
        site.ticket.state, site.ticket.reason = run_pb2.TICKET_STATE_REFUSED, EXCLUDED
        assert self.residual(site) == IF_COUNTED
        await recall.settle(site.run.id, site.log)
        assert self.residual(site) == IF_NOT
        await recall.settle(site.run.id, site.log)
        assert self.residual(site) == IF_NOT, "it is asked once"

    @pytest.mark.parametrize("gone", [False, True])
    async def test_what_was_folded_or_is_unknown_by_now_stays_as_it_is(self, site: Site, gone: bool) -> None:
        recall = await self.counted(site)
        if gone:
            del site.federation.run.tickets["ticket-1"]
        await recall.settle(site.run.id, site.log)
        assert self.residual(site) == IF_COUNTED
        assert site.box.counted(site.run.id) is None

    async def test_an_upload_whose_receipt_was_lost_finds_it_out_as_well(self, site: Site) -> None:
        pending = site.pending()
        site.ticket.state, site.ticket.reason = run_pb2.TICKET_STATE_REFUSED, EXCLUDED
        assert await site.pusher.push(pending, site.log) is Outcome.NOT_COUNTED
