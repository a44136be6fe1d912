"""A server that means harm gets a client's patience alone: no busy loop, no dead worker, no file outside, no growth."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status
from structlog.testing import capture_logs

from fedpeft.config import TrainingConfig
from fedpeft.errors import FedpeftError, Internal, LocalError, TurnOver
from fedpeft.process import logs
from fedpeft.rpc.status import MAX_MESSAGE
from fedpeft.v1 import federation_service_pb2 as pb
from fedpeft.v1 import run_pb2
from fedpeft_client.eligibility.policy_rules import MOST_STEPS, RunDemand, broken
from fedpeft_client.owner.policy import NO_LIMITS, Policy
from fedpeft_client.state.outbox import Outcome
from fedpeft_client.state.runs import KnownRun
from fedpeft_client.state.state_dir import StateDirectory
from fedpeft_client.timing import TIMING
from fedpeft_client.uplink import retry
from fedpeft_client.uplink.channel import Channel
from fedpeft_client.uplink.pace import FREE_OFFERS, Pace
from fedpeft_client.uplink.push import Pusher
from fedpeft_client.uplink.retry import Retry
from fedpeft_client.worker import verdicts
from fedpeft_client.worker.verdicts import Verdicts

from .conftest import ClientProcess, StartClient, tiny_run, until
from .federation import FakeRun, Federation
from .hostile import Context, Hostile
from .transfer_site import Site, a_run

BAD_IDS = ["", "..", "../../etc", "/tmp/x", "a/b", "run-1\n", "x" * 65, "run 1", "\x1b[2J", "é"]
TICKET = "ticket-0123456789abcdef"


@pytest.fixture
async def hostile() -> AsyncIterator[Hostile]:
    server = Hostile()
    yield server
    await server.stop()


@pytest.fixture
async def channel(hostile: Hostile) -> AsyncIterator[Channel]:
    async with Channel(await hostile.start(), "site-a", "0" * 32) as channel:
        yield channel


async def asked(hostile: Hostile, channel: Channel, answer: pb.AwaitRoundResponse, run: str = "") -> FedpeftError:
    """Returns the error that an answer of AwaitRound is for a client."""
    hostile.answer = lambda: answer
    with pytest.raises(Internal) as caught:
        await channel.await_round(run, until_finished=False)
    return caught.value


def training(**wrong: Any) -> pb.AwaitRoundResponse:
    task = {"ticket": TICKET, "run": "run-1", "round": 1, "version": 0, **wrong}
    return pb.AwaitRoundResponse(training=pb.TrainingTask(**task))


class TestAnswers:
    """An answer that the protocol does not allow is a fault of the server, found where it comes from the wire."""

    @pytest.mark.parametrize("bad", BAD_IDS)
    async def test_ids(self, hostile: Hostile, channel: Channel, bad: str) -> None:
        offered = await asked(hostile, channel, pb.AwaitRoundResponse(offer=pb.RunOffer(run=run_pb2.Run(id=bad))))
        assert "run.id is" in offered.message and offered.message.isprintable()
        assert "training.run is" in (await asked(hostile, channel, training(run=bad))).message
        assert "training.ticket is" in (await asked(hostile, channel, training(ticket=bad))).message
        scoring = pb.AwaitRoundResponse(evaluation=pb.EvaluationTask(run=bad))
        assert "evaluation.run is" in (await asked(hostile, channel, scoring)).message

    @pytest.mark.parametrize(
        ("wrong", "field"),
        [
            ({"round": 0}, "training.round"),
            ({"round": 2**32 - 1}, "training.round"),
            ({"version": 1}, "training.version"),
            ({"version": 2**32 - 1}, "training.version"),
            ({"deadline": {"seconds": 2**62}}, "training.deadline"),
            ({"deadline": {"seconds": -(2**62)}}, "training.deadline"),
        ],
    )
    async def test_numbers(self, hostile: Hostile, channel: Channel, wrong: dict[str, Any], field: str) -> None:
        assert field in (await asked(hostile, channel, training(**wrong))).message

    async def test_a_deadline_in_the_past_or_none_is_no_fault(self, hostile: Hostile, channel: Channel) -> None:
        for wrong in ({"deadline": {"seconds": 1}}, {}):
            hostile.answer = lambda wrong=wrong: training(**wrong)
            assert (await channel.await_round("", until_finished=False)).training.ticket == TICKET

    async def test_work_for_another_run_than_was_asked_for(self, hostile: Hostile, channel: Channel) -> None:
        assert "'run-2' was asked for" in (await asked(hostile, channel, training(), run="run-2")).message

    async def test_nothing_at_all(self, hostile: Hostile, channel: Channel) -> None:
        assert "outcome" in (await asked(hostile, channel, pb.AwaitRoundResponse())).message


def details(*messages: Any, code: int = code_pb2.INTERNAL, text: str = "no") -> status_pb2.Status:
    status = status_pb2.Status(code=code, message=text)
    for message in messages:
        status.details.add().Pack(message)
    return status


class TestErrors:
    """A server's name for its error is never one of this side, never what a terminal obeys, never a crash."""

    async def caught(self, hostile: Hostile, channel: Channel, status: status_pb2.Status) -> FedpeftError:
        async def refuse(context: Context) -> None:
            found = rpc_status.to_status(status)
            await context.abort(found.code, found.details, found.trailing_metadata)

        hostile.refuse = refuse
        with pytest.raises(FedpeftError) as error:
            await channel.await_round("", until_finished=False)
        return error.value

    @pytest.mark.parametrize("reason", ["STATE_INVALID", "REFUSED_BY_POLICY", "SETTINGS_INVALID", "TRAINING_FAILED"])
    async def test_an_error_of_this_side_does_not_cross_the_network(
        self, hostile: Hostile, channel: Channel, reason: str
    ) -> None:
        info = error_details_pb2.ErrorInfo(reason=reason, domain="fedpeft")
        found = await self.caught(hostile, channel, details(info))
        assert isinstance(found, Internal) and not isinstance(found, LocalError)

    async def test_sentences_are_cut_and_plain(self, hostile: Hostile, channel: Channel) -> None:
        found = await self.caught(hostile, channel, details(text="\x1b[2J" + "x" * 5000))
        assert len(found.message) <= MAX_MESSAGE + 100 and found.message.isprintable()

    async def test_details_that_are_none(self, hostile: Hostile, channel: Channel) -> None:
        async def refuse(context: Context) -> None:
            await context.abort(grpc.StatusCode.INTERNAL, "no", (("grpc-status-details-bin", b"\xff\xff\xff"),))

        hostile.refuse = refuse
        with pytest.raises(Internal):
            await channel.await_round("", until_finished=False)

        async def differ(context: Context) -> None:
            other = details(code=code_pb2.NOT_FOUND).SerializeToString()
            await context.abort(grpc.StatusCode.INTERNAL, "no", (("grpc-status-details-bin", other),))

        hostile.refuse = differ
        with pytest.raises(Internal, match="cannot be read"):
            await channel.await_round("", until_finished=False)


class TestPace:
    """A step that brings nothing at once is followed by a pause, each longer than the one before."""

    @pytest.fixture(autouse=True)
    def pauses(self, monkeypatch: pytest.MonkeyPatch) -> list[float]:
        slept: list[float] = []

        async def sleep(seconds: float) -> None:
            slept.append(seconds)

        monkeypatch.setattr(retry.asyncio, "sleep", sleep)
        return slept

    async def test_idle_at_once(self, pauses: list[float]) -> None:
        found = Pace()
        for _ in range(8):
            found.begin()
            await found.nothing()
        assert len(pauses) == 8
        assert pauses[0] <= TIMING.first_pause_s and pauses[-1] >= TIMING.longest_pause_s / 2

    async def test_an_answer_that_was_held_back_is_followed_by_none(self, pauses: list[float]) -> None:
        found = Pace(replace(TIMING, quick_s=-1.0))
        found.begin()
        await found.nothing()
        assert pauses == []

    async def test_offers(self, pauses: list[float]) -> None:
        found = Pace()
        for _ in range(FREE_OFFERS):
            await found.offered(new=True)
        assert pauses == []
        await found.offered(new=True)
        await found.offered(new=False)
        assert len(pauses) == 2
        found.worked()
        await found.offered(new=True)
        assert len(pauses) == 2
        await found.offered(new=False)
        assert len(pauses) == 3, "the same one again"

    async def test_a_server_that_asks_to_be_called_again_at_once_for_ever(self, pauses: list[float]) -> None:
        calls = 0

        async def attempt() -> str:
            nonlocal calls
            calls += 1
            if calls < 10:
                raise TurnOver("go on")
            return "done"

        assert await Retry(logs.logger(), None).call(attempt) == "done"
        assert len(pauses) == 9
        assert pauses[-1] >= TIMING.longest_pause_s / 4 > pauses[0]


class TestVerdicts:
    class Worker:
        """Finds no fault with any run."""

        def __init__(self) -> None:
            self.asked: list[str] = []

        async def ask(self, request: dict[str, Any]) -> dict[str, Any]:
            self.asked.append(request["run"]["id"])
            return {"reasons": [], "report": {"examples": 3}}

    def offer(self, run: FakeRun, name: str, **changed: Any) -> run_pb2.Run:
        message = run.message()
        message.id = name
        for field, value in changed.items():
            setattr(message, field, value)
        return message

    async def test_are_kept_in_a_bounded_number(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(verdicts, "MOST", 3)
        worker, run = self.Worker(), tiny_run()
        found = Verdicts(worker, logs.logger())  # type: ignore[arg-type]
        for number in range(10):
            assert (await found.judge(self.offer(run, f"run-{number}"))).is_eligible
        assert list(found.verdicts) == ["run-7", "run-8", "run-9"]
        assert (await found.judge(self.offer(run, "run-0"))).is_eligible
        assert worker.asked.count("run-0") == 2

    async def test_the_same_id_with_other_terms_is_declined(self) -> None:
        worker, run = self.Worker(), tiny_run()
        found = Verdicts(worker, logs.logger())  # type: ignore[arg-type]
        assert (await found.judge(self.offer(run, "run-1"))).is_eligible
        assert (await found.judge(self.offer(run, "run-1", version=5, reason="later"))).is_eligible, "these may change"
        again = await found.judge(self.offer(run, "run-1", backbone_fingerprint="f" * 64))
        assert not again.is_eligible and "never change" in again.reasons[0].public_text
        assert not (await found.judge(self.offer(run, "run-1"))).is_eligible, "nor the first one any more"
        assert worker.asked == ["run-1"]

    async def test_a_run_with_a_setting_of_a_newer_version_is_declined(self) -> None:
        """Ignored, it would have this site train otherwise than all others."""
        worker, newer = self.Worker(), self.offer(tiny_run(), "run-1")
        newer.config.training.MergeFromString(b"\xb8\x3e\x01")  # field 999, a number, 1
        found = await Verdicts(worker, logs.logger()).judge(newer)  # type: ignore[arg-type]
        (reason,) = found.reasons
        assert "does not know field 999 of training; update the software here" in reason.public_text
        assert worker.asked == []

    async def test_no_verdict_on_a_run_without_an_id(self) -> None:
        worker = self.Worker()
        found = Verdicts(worker, logs.logger())  # type: ignore[arg-type]
        for bad in BAD_IDS:
            with pytest.raises(Internal):
                await found.judge(run_pb2.Run(id=bad))
        assert worker.asked == [] and not found.verdicts


class TestTraining:
    def rules(self, policy: Policy, examples: int | None = 1000, **settings: Any) -> list[str]:
        training = TrainingConfig.model_validate(settings)
        asked = RunDemand(KnownRun.of(tiny_run().message()), training, None, examples)
        return [each.key for each in broken(policy, asked)]

    def test_for_ever_is_refused_without_a_policy(self) -> None:
        assert self.rules(NO_LIMITS, epochs=100_000, batch_size=1) == ["training.max_steps"]
        assert self.rules(NO_LIMITS, steps=MOST_STEPS + 1) == ["training.max_steps"]
        assert self.rules(NO_LIMITS, steps=MOST_STEPS) == []
        assert self.rules(NO_LIMITS, epochs=100, batch_size=1) == []

    def test_an_owner_may_allow_more(self) -> None:
        policy = Policy.model_validate({"training": {"max_steps": 10_000_000}})
        assert self.rules(policy, steps=5_000_000) == []


class TestUpload:
    """A server's answer about an upload is no reason to send, book or believe anything else."""

    @pytest.fixture
    async def pusher(self, federation: Federation, channel: Channel, tmp_path: Path) -> AsyncIterator[Any]:
        federation.run = a_run()
        with StateDirectory(tmp_path / "state") as directory:
            site = Site(federation, directory, channel)
            site.pusher = Pusher(channel, Retry(logs.logger(), 0.0), site.egress_log)
            yield site

    @pytest.mark.parametrize(
        ("standing", "receipt", "field"),
        [
            ({"committed_bytes": 2**63, "state": run_pb2.TICKET_STATE_ISSUED}, {}, "committed_bytes"),
            ({"state": run_pb2.TICKET_STATE_RECEIVED}, {}, "receipt.ticket"),
            (
                {"state": run_pb2.TICKET_STATE_RECEIVED, "receipt": {"ticket": "ticket-1", "sha256": b"1"}},
                {},
                "receipt.sha256",
            ),
            ({"state": run_pb2.TICKET_STATE_ISSUED}, {"ticket": "ticket-2", "sha256": bytes(32)}, "ticket"),
            ({"state": run_pb2.TICKET_STATE_ISSUED}, {"ticket": "ticket-1", "sha256": bytes(32)}, "sha256"),
        ],
    )
    async def test_a_standing_or_receipt_that_is_none(
        self, hostile: Hostile, pusher: Any, standing: dict[str, Any], receipt: dict[str, Any], field: str
    ) -> None:
        hostile.standing = pb.GetUploadResponse(**standing)
        hostile.receipt = pb.PushUpdateResponse(**receipt)
        pending = pusher.pending()
        with capture_logs() as lines:
            assert await pusher.pusher.push(pending, pusher.log) is Outcome.SET_ASIDE, "it is kept for a person"
        assert any(f"{field} is" in str(line.get("cause")) for line in lines)


@pytest.mark.usefixtures("preloaded")
class TestAgent:
    """The client as people start it."""

    async def started(self, start_client: StartClient, hostile: Hostile) -> ClientProcess:
        return await start_client("--server", await hostile.start(), timing={"longest_pause_s": 0.5})

    async def test_is_not_hurried_and_its_worker_lives(
        self, hostile: Hostile, start_client: StartClient, tmp_path: Path
    ) -> None:
        run = tiny_run()
        answers: list[pb.AwaitRoundResponse] = []
        hostile.answer = lambda: answers[0] if answers else pb.AwaitRoundResponse(idle=pb.Idle(reason="\x1b[2J" * 9999))
        client = await self.started(start_client, hostile)
        await client.said("waiting")
        worker, egress_log = client.worker(), tmp_path / "site-a" / "ledger.jsonl"
        before = hostile.calls["AwaitRound"]
        await asyncio.sleep(1)
        assert hostile.calls["AwaitRound"] - before < 8, "pauses of 0.1 s and more, growing; 868 a second were counted"

        for bad in ("", "../../../escape"):
            message = run.message()
            message.id = bad
            answers[:] = [pb.AwaitRoundResponse(offer=pb.RunOffer(run=message))]
            before = hostile.calls["AwaitRound"]
            await until(lambda before=before: hostile.calls["AwaitRound"] > before + 1, client.text)
        assert not hostile.accepted and not hostile.declined
        assert client.worker() == worker and not client.events("worker died")
        assert sorted(os.listdir(tmp_path)) == ["images.parquet", "site-a"]
        assert egress_log.stat().st_size < 10_000
        assert all(len(line) < 5000 for line in client.text)

        message = run.message()
        message.id = "run-1"
        answers[:] = [pb.AwaitRoundResponse(offer=pb.RunOffer(run=message))]
        await until(lambda: len(hostile.accepted) >= 3, client.text)
        assert client.process.returncode is None
