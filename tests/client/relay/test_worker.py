"""The worker of a relay: no torch, an honest registration, and an edge's run that ends with the parent's."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import json_format

from fedpeft.adapters import payload
from fedpeft.errors import CertificateRevoked, FedpeftError, IdentityInvalid, RoleMayNot, VersionDiffers
from fedpeft.identity.authority import Authority
from fedpeft.identity.subject import Role
from fedpeft.process import logs
from fedpeft.rpc import wire
from fedpeft.v1 import run_pb2
from fedpeft_client.agent import registration
from fedpeft_client.relay.options import RelayOptions, check_identity
from fedpeft_client.settings import Settings
from fedpeft_client.state.runs import KnownRun
from fedpeft_client.worker.handle import WorkerProcess

from ...operator.operator_double import Double, Serving, a_run, serving
from ..enrolment.test_site_identity import enrolled
from .test_rules import EXACT, known

NOBODY = "127.0.0.1:1"
MODULES = """
import json, sys
from fedpeft_client.worker import process
process._Worker(sys.stdout, bool).answer(json.loads(sys.argv[1]))
print(json.dumps(sorted({"torch", "timm", "torchvision"} & set(sys.modules))))
"""


def opening(server: str, **more: Any) -> dict[str, Any]:
    relay = RelayOptions(server, "edge", 2, **more).as_json()
    logged = {"log_format": "json", "verbose": False, "client": "edge"}
    return {"op": "open", "data": None, "relay": relay, "policy": {}, **logged}


def ended(run: str, how: str, **more: Any) -> dict[str, Any]:
    return {"op": "finished", "run": {"id": run}, "how": how, **more}


@pytest.fixture
def served() -> Iterator[Serving]:
    with serving(Double()) as answer:
        yield answer


@pytest.fixture
async def worker(served: Serving) -> AsyncIterator[WorkerProcess]:
    made = WorkerProcess(opening(served.address, examples=900), logs.logger())
    yield made
    await made.close()


def test_it_loads_no_torch() -> None:
    command = [sys.executable, "-c", MODULES, json.dumps(opening(NOBODY))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    hello, modules = map(json.loads, done.stdout.splitlines())
    assert hello["result"]["device"] == "relay of an edge" and modules == []


async def test_it_says_what_it_is(served: Serving, worker: WorkerProcess) -> None:
    hello = await worker.start()
    flags = [
        "--server",
        NOBODY,
        "--name",
        "edge",
        "--state-dir",
        "s",
        "--relay",
        served.address,
        "--relay-clients",
        "2",
    ]
    said = registration(Settings.read(flags), hello).capabilities
    assert (said.device, said.examples, list(said.methods)) == ("relay of an edge", 900, [])
    assert said.software.startswith("fedpeft ") and "torch" not in said.software and "sum128" in said.encodings


async def test_an_edge_that_is_away_is_no_reason_against_a_run() -> None:
    worker = WorkerProcess(opening(NOBODY), logs.logger())
    try:
        fits = await worker.ask({"op": "check", "run": known(**EXACT).as_json()})
        assert fits == {"reasons": [], "report": {"examples": 0}}
        declined = await worker.ask({"op": "check", "run": known().as_json()})
        assert [reason["kind"] for reason in declined["reasons"]] == ["CONFIG_INVALID"] and not declined["report"]
        assert not (await worker.ask(ended("run-a", "stopped")))["done"], "it is to be tried again"
    finally:
        await worker.close()


async def test_it_says_at_its_start_whether_the_edges_server_answers(
    served: Serving, capfd: pytest.CaptureFixture[str]
) -> None:
    for server in (served.address, NOBODY):
        worker = WorkerProcess(opening(server), logs.logger())
        await worker.start()
        await worker.close()
    there, away = (json.loads(line) for line in capfd.readouterr().err.splitlines() if "edge's server" in line)
    assert (there["event"], there["server"]) == ("the edge's server answers", served.address)
    assert (away["level"], away["server"]) == ("warning", NOBODY)


@pytest.mark.parametrize("refusal", [RoleMayNot("viewer ada may not"), CertificateRevoked("operator ada was revoked")])
async def test_it_ends_at_its_start_where_the_edges_server_does_not_let_it_in(
    served: Serving, refusal: FedpeftError
) -> None:
    served.double.failures["ListRuns"] = [refusal]
    worker = WorkerProcess(opening(served.address), logs.logger())
    with pytest.raises(
        IdentityInvalid, match=f"{served.address} does not let this relay in: .* ada .*--relay-identity"
    ):
        await worker.start()
    await worker.close()


async def test_it_ends_where_the_edges_server_does_not_let_it_end_a_run(served: Serving, worker: WorkerProcess) -> None:
    served.double.failures["GetRun"] = [CertificateRevoked("operator ada was revoked")]
    with pytest.raises(IdentityInvalid, match="does not let this relay in"):
        await worker.ask(ended("run-a", "completed"))


async def test_it_does_not_relay_a_run_to_its_own_server(served: Serving, worker: WorkerProcess) -> None:
    parents = known(**EXACT)
    served.double.runs = {parents.id: a_run(parents.id)}
    declined = await worker.ask({"op": "check", "run": parents.as_json()})
    (reason,) = declined["reasons"]
    assert "is the run's own server" in reason["local_text"] and not declined["report"]
    served.double.runs[parents.id].config.rounds.policy = "relayed"
    assert not (await worker.ask({"op": "check", "run": parents.as_json()}))["reasons"]


async def test_a_run_that_is_over_is_stopped_at_the_edge(served: Serving, worker: WorkerProcess) -> None:
    served.double.runs = {"run-a": a_run("run-a"), "run-b": a_run("run-b", state=run_pb2.RUN_STATE_COMPLETED)}
    for run in ("run-a", "run-b", "run-c"):
        assert (await worker.ask(ended(run, "deleted")))["done"]
    stopped, over = served.double.runs.values()
    assert (stopped.state, stopped.reason) == (run_pb2.RUN_STATE_STOPPED, "the parent's run is deleted")
    assert over.state == run_pb2.RUN_STATE_COMPLETED


async def test_a_run_that_is_completed_gets_its_last_version(
    served: Serving, worker: WorkerProcess, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = served.double.runs["run-a"] = a_run("run-a", version=2)
    wants = (await worker.ask(ended("run-a", "completed")))["wants"]
    known = KnownRun.of(json_format.ParseDict(wants, run_pb2.Run()))
    manifest, data = payload.encode(
        {t.name: np.ones(t.shape, np.float32) for t in known.spec.shared}, known.spec.shared, "float32"
    )
    (tmp_path / "adapter").write_bytes(data)
    described = json_format.MessageToDict(wire.manifest_to_proto(manifest))
    adapter = {"payload": str(tmp_path / "adapter"), "manifest": described}
    assert await worker.ask(ended("run-a", "completed", adapter=adapter)) == {"done": True}
    ((header, _),) = served.double.supplied
    assert (header.version, header.client, run.version) == (3, "edge", 3)
    assert "wants" in await worker.ask(ended("run-a", "completed")), "it has the version, which is compared"
    for failure in ([], [VersionDiffers("run-a has another version 3")]):
        served.double.failures["SupplyVersion"] = failure
        assert await worker.ask(ended("run-a", "completed", adapter=adapter)) == {"done": True}
    said = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    assert [line["version"] for line in said if "is completed with" in line["event"]] == [3], "once"
    (error,) = [line for line in said if line["level"] == "error"]
    assert (error["reason"], error["cause"]) == ("VERSION_DIFFERS", "run-a has another version 3")
    stopped = served.double.runs["run-b"] = a_run("run-b", state=run_pb2.RUN_STATE_STOPPED)
    assert (await worker.ask(ended("run-b", "completed")))["done"] and not stopped.version


def test_a_relay_calls_its_edge_as_an_operator(tmp_path: Path) -> None:
    authority = Authority.make("an edge")
    check_identity("edge.example:7070", enrolled(authority, tmp_path / "ada", Role.OPERATOR), insecure=False)
    with pytest.raises(IdentityInvalid, match="a relay calls the edge's server as an operator of it"):
        check_identity("edge.example:7070", enrolled(authority, tmp_path / "noto"), insecure=False)
