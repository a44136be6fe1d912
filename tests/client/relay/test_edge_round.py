"""A round at the edge, against an OperatorService on a real socket: what a relay makes of each answer."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from structlog.testing import capture_logs

from fedpeft.adapters import payload
from fedpeft.adapters.payload import Manifest
from fedpeft.api import operator_client
from fedpeft.errors import (
    CertificateRevoked,
    ConfigInvalid,
    DiskFull,
    Draining,
    FedpeftError,
    IdentityInvalid,
    RelayDiffers,
    RequestIdReused,
    RoleMayNot,
    TrainingFailed,
    VersionDiffers,
)
from fedpeft.process import logs
from fedpeft.v1 import operator_service_pb2 as pb
from fedpeft.v1 import run_pb2, tensor_pb2
from fedpeft_client.eligibility.rules import Reason
from fedpeft_client.relay.edge import Edge
from fedpeft_client.relay.edge_round import EdgeRound, RoundRequest
from fedpeft_client.relay.options import RelayOptions
from fedpeft_client.relay.parent_version import Version
from fedpeft_client.state.runs import KnownRun
from fedpeft_client.timing import TIMING, Timing

from ...operator.operator_double import Double, Serving, a_round, a_run, serving
from .test_rules import EXACT, known

FAST = replace(TIMING, relay_report_s=0.05)
SUM = bytes(160)
PAUSED, STOPPED = run_pb2.RUN_STATE_PAUSED, run_pb2.RUN_STATE_STOPPED
COMPLETED = run_pb2.RUN_STATE_COMPLETED


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serving]:
    monkeypatch.setattr(operator_client, "PAUSE_S", 0.01)
    double = Double()
    manifest = tensor_pb2.Manifest(payload_bytes=len(SUM), sha256=hashlib.sha256(SUM).digest())
    double.sums["run-a", 2] = pb.DownloadSumHeader(manifest=manifest, examples=64, metrics={"updates": 2}), SUM
    with serving(double) as answer:
        yield answer


@dataclass
class Relay:
    """A relay of one run, and what it says."""

    folder: Path
    address: str
    run: KnownRun = field(default_factory=lambda: known(rounds={"deadline_s": 100.0}, **EXACT))
    said: list[dict[str, Any]] = field(default_factory=list)

    async def collect(
        self, number: int = 2, stop: Callable[[], bool] = lambda: False, timing: Timing = FAST
    ) -> pb.DownloadSumHeader:
        manifest = self._adapter()
        version = Version(self.run, number - 1, manifest, self.folder / "adapter")
        wanted = RoundRequest(number, version, self.folder / "sum")
        options = RelayOptions(self.address, "north", 2)
        return await EdgeRound(Edge(options, timing), options, wanted, self.said.append, stop, logs.logger()).collect()

    def _adapter(self) -> Manifest:
        """Writes the version as clients pull it, in an encoding that is not float32."""
        values = {"a": np.arange(10, dtype=np.float32)}
        manifest, data = payload.encode(values, self.run.spec.shared, "float16")
        (self.folder / "adapter").write_bytes(data)
        return manifest


@pytest.fixture
def relay(served: Serving, tmp_path: Path) -> Relay:
    return Relay(tmp_path, served.address)


def seen(run: run_pb2.Run, *rounds: run_pb2.Round) -> pb.WatchRunResponse:
    return pb.WatchRunResponse(run=run, rounds=rounds)


async def test_a_run_that_the_edge_does_not_know_is_created_from_the_version(served: Serving, relay: Relay) -> None:
    run = a_run("run-a", version=1)
    served.double.script = [seen(run, a_round(2, committed=False)), 0.3, seen(run, a_round(2))]
    found = await relay.collect()
    assert (found.examples, (relay.folder / "sum").read_bytes()) == (64, SUM)
    ((header, data),) = served.double.created.values()
    assert header.relays == pb.Relay(run="run-a", version=1, client="north")
    assert np.array_equal(np.frombuffer(data, "<f4"), np.arange(10))
    assert (header.config.rounds.policy, header.config.rounds.clients) == ("relayed", 2)
    assert header.config.rounds.deadline_s == 75.0
    waiting = [each for each in relay.said if each["updates"] == 1]
    assert waiting and all((each["step"], each["steps"], each["of"]) == (100, 200, 2) for each in waiting)


async def test_a_version_is_supplied_to_a_run_that_has_an_older_one(served: Serving, relay: Relay) -> None:
    served.double.runs["run-a"] = a_run("run-a")
    served.double.script = [seen(a_run("run-a", version=1), a_round(2))]
    await relay.collect()
    ((header, data),) = served.double.supplied
    assert header.version == 1 and np.array_equal(np.frombuffer(data, "<f4"), np.arange(10))
    assert [(each.name, each.encoding) for each in header.manifest.tensors] == [("a", "float32")]
    assert not served.double.created


@pytest.mark.parametrize("state", [run_pb2.RUN_STATE_RUNNING, PAUSED, STOPPED, COMPLETED])
async def test_a_sum_that_is_there_is_fetched_again(
    served: Serving, relay: Relay, state: run_pb2.RunState.ValueType
) -> None:
    served.double.runs["run-a"] = a_run("run-a", version=1, state=state)
    served.double.rounds["run-a"] = [a_round(1), a_round(2)]
    assert (await relay.collect()).examples == 64
    assert served.double.asked == ["GetRun", "ListRounds", "SupplyVersion", "DownloadSum"], "the version is compared"


@pytest.mark.parametrize(("state", "word"), [(PAUSED, "paused"), (STOPPED, "stopped")])
@pytest.mark.parametrize("at_once", [True, False])
async def test_a_run_that_does_not_go_on_gives_no_sum_and_its_reason_stays_here(
    served: Serving, relay: Relay, state: run_pb2.RunState.ValueType, word: str, at_once: bool
) -> None:
    ended = a_run("run-a", version=1, state=state, reason="still awaited: noto")
    served.double.runs["run-a"] = ended if at_once else a_run("run-a", version=1)
    served.double.rounds["run-a"] = [a_round(2, committed=False)]
    served.double.script = [seen(ended, a_round(2, committed=False))]
    with capture_logs() as lines, pytest.raises(TrainingFailed) as caught:
        await relay.collect()
    assert str(caught.value) == f"the edge's run is {word}, with 1 update of round 2; its operator sees why"
    assert [line["cause"] for line in lines if line["log_level"] == "error"] == ["still awaited: noto"]


async def test_an_edge_that_went_on_has_no_sum(served: Serving, relay: Relay) -> None:
    words = "has version 4 of the run, and the ticket starts from version 1: was this server restored from a backup"
    for state, rounds in ((run_pb2.RUN_STATE_RUNNING, []), (COMPLETED, [a_round(2), a_round(4)])):
        served.double.runs["run-a"] = a_run("run-a", version=4, state=state)
        served.double.rounds["run-a"] = rounds
        with pytest.raises(TrainingFailed, match=words):
            await relay.collect()
    served.double.runs["run-a"] = a_run("run-a", version=1)
    served.double.rounds["run-a"] = [a_round(2)]
    with pytest.raises(TrainingFailed, match="its server fails with SUM_NOT_FOUND"):
        served.double.sums.clear()
        await relay.collect()


@pytest.mark.parametrize("committed", [False, True])
async def test_a_version_that_the_parent_made_again_gives_no_sum(
    served: Serving, relay: Relay, committed: bool
) -> None:
    served.double.runs["run-a"] = a_run("run-a", version=1)
    served.double.rounds["run-a"] = [a_round(2, committed=committed)]
    why = "run-a has another version 1; stop and delete the run at the edge"
    served.double.failures["SupplyVersion"] = [VersionDiffers(why)]
    with capture_logs() as lines, pytest.raises(TrainingFailed, match=r"another version 1 .* stopped and deleted at"):
        await relay.collect()
    (said,) = [line for line in lines if line["log_level"] == "error"]
    assert (said["reason"], said["cause"]) == ("VERSION_DIFFERS", why)
    assert "DownloadSum" not in served.double.asked, "its sum is not that of the parent's version"


@pytest.mark.parametrize(
    ("refusal", "error", "words"),
    [
        (
            ConfigInvalid("rounds.policy: there is none"),
            ConfigInvalid,
            "the edge's server does not take the run: rounds",
        ),
        (
            RelayDiffers("run-a is relayed for client south"),
            RelayDiffers,
            "does not take the run: run-a is relayed for",
        ),
        (DiskFull("noto has no room"), TrainingFailed, "its server fails with DISK_FULL; the log of"),
    ],
)
async def test_a_refusal_is_an_error_of_the_run_or_of_its_training_and_not_of_the_parent(
    served: Serving, relay: Relay, refusal: FedpeftError, error: type[FedpeftError], words: str
) -> None:
    served.double.failures["CreateRun"] = [refusal] * 20
    with capture_logs() as lines, pytest.raises(error, match=words) as caught:
        await relay.collect(timing=replace(FAST, relay_away_s=0.1))
    assert "noto" not in str(caught.value)
    assert error is not TrainingFailed or "noto" in lines[-1]["cause"]


@pytest.mark.parametrize("refusal", [RoleMayNot("viewer ada may not"), CertificateRevoked("operator ada was revoked")])
async def test_a_relay_that_is_locked_out_under_way_ends_as_at_its_start(
    served: Serving, relay: Relay, refusal: FedpeftError
) -> None:
    """It is of no use until a person acts, and the parent must not count on it."""
    served.double.runs["run-a"] = a_run("run-a", version=1)
    served.double.script = [seen(a_run("run-a", version=1), a_round(2, committed=False)), refusal]
    with pytest.raises(IdentityInvalid, match=r"does not let this relay in: .* ada .*--relay-identity") as caught:
        await relay.collect()
    assert "ada" not in Reason.of(caught.value).public_text


async def test_a_run_that_another_agent_makes_meanwhile_is_looked_at_again(served: Serving, relay: Relay) -> None:
    served.double.failures["CreateRun"] = [RequestIdReused("run-a is here already")]
    served.double.script = [seen(a_run("run-a", version=1), a_round(2))]
    assert (await relay.collect()).examples == 64
    assert served.double.asked.count("GetRun") == 2


async def test_a_server_that_is_away_is_called_again_for_a_while(served: Serving, relay: Relay) -> None:
    served.double.runs["run-a"] = a_run("run-a", version=1)
    served.double.script = [Draining("the server is shutting down"), seen(a_run("run-a", version=1), a_round(2))]
    assert (await relay.collect()).examples == 64
    served.stop()
    with capture_logs() as lines, pytest.raises(TrainingFailed) as caught:
        await relay.collect(timing=replace(FAST, relay_away_s=0.1))
    assert "its server fails with SERVER_UNREACHABLE" in str(caught.value) and served.address not in str(caught.value)
    assert [line["event"] for line in lines][:1] == ["the edge's server is away; it is called again"]
    assert relay.said[-1] == {"step": 0, "steps": 200, "updates": 0, "of": 2}, "progress is said all the time"


async def test_a_relay_stops_as_asked(served: Serving, relay: Relay) -> None:
    served.double.runs["run-a"] = a_run("run-a", version=1)
    served.double.script = [seen(a_run("run-a", version=1), a_round(2, committed=False)), 60.0]
    began = asyncio.get_running_loop().time()

    def stop() -> bool:
        return asyncio.get_running_loop().time() > began + 0.5

    with pytest.raises(TrainingFailed, match="it was stopped as asked, with 1 update"):
        await relay.collect(stop=stop)
