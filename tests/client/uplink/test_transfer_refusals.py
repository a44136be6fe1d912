"""Push and pull where the server refuses, fails or forgets: what is kept, repeated, set aside, and said."""

from __future__ import annotations

import asyncio
import hashlib
import os
from dataclasses import replace

import pytest
from google.protobuf.message import Message
from structlog.testing import capture_logs

from fedpeft.adapters.payload import CHUNK_BYTES
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
    StoreUnavailable,
    TicketClosed,
    TicketNotFound,
    TooManyCalls,
    TransfersBusy,
    TurnOver,
    Unauthenticated,
    UpdateTooLarge,
)
from fedpeft.process import logs
from fedpeft.rpc.chunk_messages import WrittenChunk
from fedpeft.v1 import federation_service_pb2 as pb
from fedpeft.v1 import run_pb2
from fedpeft_client.egress import message_entries
from fedpeft_client.egress.entries import Kind, read
from fedpeft_client.state import state_dir
from fedpeft_client.state.outbox import PAYLOAD, Outcome
from fedpeft_client.timing import TIMING
from fedpeft_client.uplink import push, retry
from fedpeft_client.uplink.exclusion_check import ExclusionCheck
from fedpeft_client.uplink.retry import Backoff, Retry

from ..federation import _CLOSES
from ..transfer_site import IF_COUNTED, IF_NOT, Site


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


def _newer(status: str) -> FedpeftError:
    """Returns an error of a newer server, whose reason this client does not know."""
    error = FedpeftError("something that came later")
    error.reason, error.status = "OF_A_NEWER_SERVER", status  # type: ignore[misc]
    return error


@pytest.mark.parametrize("status", ["UNAVAILABLE", "RESOURCE_EXHAUSTED", "ABORTED"])
async def test_an_update_waits_out_an_unknown_reason_whose_status_says_later(site: Site, status: str) -> None:
    site.retry.timing = replace(TIMING, first_pause_s=0.01)
    site.federation.refuse_push = [_newer(status) for _ in range(retry.FAULT_ATTEMPTS + 1)]
    assert await site.pusher.push(site.pending(), site.log) is Outcome.COUNTED
    assert not site.federation.withdrawn


@pytest.mark.parametrize(
    ("status", "outcome"),
    [
        ("INVALID_ARGUMENT", Outcome.SET_ASIDE),
        ("FAILED_PRECONDITION", Outcome.NOT_COUNTED),
        ("PERMISSION_DENIED", Outcome.NOT_COUNTED),
    ],
)
async def test_an_unknown_reason_whose_status_says_never_is_not_repeated(
    site: Site, status: str, outcome: Outcome
) -> None:
    site.federation.refuse_push = [_newer(status)]
    assert await site.pusher.push(site.pending(), site.log) is outcome
    assert len(site.federation.pushes) == 1 and site.federation.withdrawn


async def test_an_unknown_reason_that_tells_who_calls_leaves_the_update_pending(site: Site) -> None:
    site.federation.refuse_push = [_newer("UNAUTHENTICATED")]
    pending = site.pending()
    with pytest.raises(Unauthenticated, match="something that came later"):
        await site.pusher.push(pending, site.log)
    assert await site.pusher.push(pending, site.log) is Outcome.COUNTED


async def test_an_update_that_arrived_stays_pending_when_the_ledger_cannot_say_so(site: Site) -> None:
    egress_log, counted = site.egress_log._file._file, site.channel.sent
    kept, full = os.dup(egress_log), os.open("/dev/full", os.O_WRONLY)

    def fill_the_disk(message: Message | WrittenChunk) -> None:
        counted(message)
        if isinstance(message, WrittenChunk):
            os.dup2(full, egress_log)

    site.channel.sent = fill_the_disk
    pending = site.pending()
    with pytest.raises(StateInvalid, match="cannot write the ledger"):
        await site.pusher.push(pending, site.log)
    assert site.ticket.receipt is not None, "the server has it: as a residual it would count twice"
    os.dup2(kept, egress_log)
    assert await site.pusher.push(pending, site.log) is Outcome.COUNTED


async def test_an_upload_that_was_given_up_and_counted_after_all_is_not_kept_as_well(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(_CLOSES, "UpdateTooLarge", run_pb2.TICKET_STATE_RECEIVED)
    site.federation.refuse_push = [UpdateTooLarge("over 1 GB")]
    assert await site.pusher.push(site.pending(), site.log) is Outcome.COUNTED


async def test_a_server_that_gives_neither_turn_nor_answer_is_not_waited_for_without_end(site: Site) -> None:
    site.channel.timing = replace(TIMING, stall_s=0.3)
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

    monkeypatch.setattr(site.retry, "_rest", rest)
    site.retry.give_up_s = 0.0
    site.federation.refuse_push = [error] * 20
    with capture_logs() as lines:
        assert await site.pusher.push(site.pending(), site.log) is Outcome.COUNTED
    assert len(pauses) == 20 and len(site.federation.pushes) == 21
    assert error.retry_s <= pauses[0] <= max(error.retry_s, TIMING.first_pause_s)
    assert all(error.retry_s <= pause <= TIMING.longest_pause_s for pause in pauses)
    assert pauses[-1] >= TIMING.longest_pause_s / 2, "it said so at once"
    said = [line["reason"] for line in lines if line["event"] == "retrying as the server asked"]
    assert said == [error.reason] * 20
    assert not [line for line in lines if line["log_level"] == "warning"]


async def test_a_hint_to_go_on_at_once_makes_no_busy_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []

    async def sleep(pause_s: float) -> None:
        slept.append(pause_s)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    for hint_s in (0.0, 5.0, 3600.0):
        await Retry(logs.logger(), None)._rest(hint_s)
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
    assert site.outbox.load() is not None


async def test_a_server_without_room_is_waited_for_by_whatever_call(site: Site) -> None:
    site.federation.refuse_register = [DiskFull("no room"), DiskFull("no room")]
    site.federation.refuse_push = [DiskFull("no room"), StoreUnavailable("read-only")]
    with capture_logs() as lines:
        with site.egress_log.record(message_entries.registration(pb.RegisterRequest())):
            await site.retry.call(lambda: site.channel.register(pb.RegisterRequest()))
        assert await site.pusher.push(site.pending(), site.log) is Outcome.COUNTED
    assert site.federation.registrations == 1 and len(site.federation.pushes) == 3
    full = [line["cause"] for line in lines if line["event"].startswith("the server's disk is full; retrying")]
    assert full == [f"the server's disk is full: {DiskFull.for_sites}"] * 2
    assert [line["cause"] for line in lines if line["event"].startswith("server is unavailable")] == [
        StoreUnavailable.for_sites
    ]


@pytest.fixture
def no_pauses(site: Site) -> None:
    site.retry.timing = replace(TIMING, first_fault_pause_s=0.001)


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
    assert len(site.federation.pushes) == retry.FAULT_ATTEMPTS
    assert bool(site.federation.withdrawn) is withdraws
    events = [line["event"] for line in lines if line["log_level"] in ("error", "warning")]
    assert events[:2] == [
        retry.FAILS,
        "the server cannot take this update; it is set aside, and its content goes into the residual",
    ]
    assert ("ticket could not be given back; its round waits until its deadline" in events) is not withdraws
    site.outbox.settle(pending, Outcome.SET_ASIDE)
    residual = site.directory.path / "runs" / site.run.id / "residual.safetensors"
    assert residual.read_bytes() == IF_NOT.encode()
    (kept,) = site.outbox.aside.iterdir()
    assert hashlib.sha256((kept / PAYLOAD).read_bytes()).digest() == pending.manifest.sha256
    booked = list(read(site.directory.path / "ledger.jsonl").booked.values())
    uploads = [each for each in booked if each.entry.kind is Kind.UPDATE]
    assert uploads and all("INTERNAL" in each.words for each in uploads)
    assert booked[-1].entry.said["reason"].startswith("set aside: ")


@pytest.mark.usefixtures("no_pauses")
async def test_a_server_that_failed_a_few_times_and_then_works_gets_the_update(site: Site) -> None:
    site.federation.refuse_push = [Internal("StateInvalid") for _ in range(retry.FAULT_ATTEMPTS - 1)]
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
    assert len(site.federation.fail["PullAdapter"]) == 20 - retry.FAULT_ATTEMPTS


@pytest.mark.usefixtures("no_pauses")
async def test_calls_beside_which_nothing_else_can_be_done_are_repeated_as_long_as_it_takes(site: Site) -> None:
    site.federation.refuse_register = [Internal("StateInvalid") for _ in range(12)]
    with site.egress_log.record(message_entries.registration(pb.RegisterRequest())):
        await site.retry.call(lambda: site.channel.register(pb.RegisterRequest()), faults=None)
    assert site.federation.registrations == 1


async def test_checksum_mismatch_starts_over_and_is_then_given_up(site: Site) -> None:
    site.federation.refuse_push = [ChecksumMismatch("no") for _ in range(push.STARTS)]
    assert await site.pusher.push(site.pending(), site.log) is Outcome.NOT_COUNTED
    assert len(site.federation.pushes) == push.STARTS and site.federation.withdrawn


async def test_patience_ends_when_it_was_told_to(site: Site) -> None:
    await site.federation.stop()
    patient = Retry(site.log, 2.0)
    with capture_logs() as lines, pytest.raises(ServerUnreachable, match="nothing listens on port"):
        await patient.call(lambda: site.channel.get_upload("t", bytes(32)))
    assert [line["event"] for line in lines] == ["server is unavailable; retrying until it answers"]


def test_pauses_grow_to_a_cap_and_are_never_none() -> None:
    backoff = Backoff(TIMING.first_pause_s, TIMING.longest_pause_s)
    pauses = [backoff.draw() for _ in range(12)]
    assert all(0 < pause <= TIMING.longest_pause_s for pause in pauses)
    assert pauses[0] <= TIMING.first_pause_s and pauses[-1] >= TIMING.longest_pause_s / 2
    backoff.reset()
    assert backoff.draw() <= TIMING.first_pause_s


EXCLUDED = "UPDATE_EXCLUDED: its norm 3e+38 is more than 30 times 1"


class TestExcludedAfterTheReceipt:
    async def counted(self, site: Site) -> ExclusionCheck:
        pending = site.pending()
        outcome = await site.pusher.push(pending, site.log)
        assert outcome is Outcome.COUNTED
        site.outbox.settle(pending, outcome)
        return ExclusionCheck(site.channel, site.retry, site.outbox)

    def residual(self, site: Site) -> str:
        return state_dir.group(site.directory.run(site.run.id), "residual").read_text()

    async def test_it_goes_into_the_residual_before_the_next_training(self, site: Site) -> None:
        check = await self.counted(site)
        site.ticket.state, site.ticket.reason = run_pb2.TICKET_STATE_REFUSED, EXCLUDED
        assert self.residual(site) == IF_COUNTED
        await check.settle(site.run.id, site.log)
        assert self.residual(site) == IF_NOT
        await check.settle(site.run.id, site.log)
        assert self.residual(site) == IF_NOT, "it is asked once"

    @pytest.mark.parametrize("gone", [False, True])
    async def test_what_was_folded_or_is_unknown_by_now_stays_as_it_is(self, site: Site, gone: bool) -> None:
        check = await self.counted(site)
        if gone:
            del site.federation.run.tickets["ticket-1"]
        await check.settle(site.run.id, site.log)
        assert self.residual(site) == IF_COUNTED
        assert site.outbox.counted(site.run.id) is None

    async def test_an_upload_whose_receipt_was_lost_finds_it_out_as_well(self, site: Site) -> None:
        pending = site.pending()
        site.ticket.state, site.ticket.reason = run_pb2.TICKET_STATE_REFUSED, EXCLUDED
        assert await site.pusher.push(pending, site.log) is Outcome.NOT_COUNTED
