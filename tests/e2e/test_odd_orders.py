"""Things in an order that nobody planned, between real processes: the client goes on, or says why it ends."""

from __future__ import annotations

import asyncio
import shutil

import grpc
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedpeft.api.operator_client import OperatorClient
from fedpeft.rpc import wire
from fedpeft.v1 import federation_service_pb2 as fed
from fedpeft.v1 import federation_service_pb2_grpc as fed_grpc
from fedpeft_client.state import processes

from ..run_files import TINY_MODEL
from .conftest import Federation, Process, wait_for

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.usefixtures("preloaded"),
    pytest.mark.xdist_group("odd orders"),
    pytest.mark.timeout(600),
]

ONE_CLIENT = f"""
name = "odd"
{TINY_MODEL}
[peft]
method = "bias"
[rounds]
count = 1
clients = 1
[training]
steps = 3
batch_size = 4
"""


async def stop(port: int, run: str) -> None:
    """Stops a run; the command line would take longer than the training."""
    async with OperatorClient(f"127.0.0.1:{port}") as server:
        await server.stop(run)


async def delete(port: int, run: str) -> None:
    """Stops and deletes a run."""
    await stop(port, run)
    async with OperatorClient(f"127.0.0.1:{port}") as server:
        await server.delete(run)


def training(client: Process, run: str) -> bool:
    return any(line["run"] == run for line in client.events("training begins"))


@pytest.mark.slow
def test_a_client_outlives_its_runs_and_its_server(federation: Federation) -> None:
    """A training that cannot count any more ends: its run is stopped, deleted, or gone with its server.

    Otherwise it would be hours of somebody's GPU. A run follows that counts.
    """
    federation.run_file.write_text(ONE_CLIENT.replace("steps = 3", "steps = 1_000_000"))
    server = federation.server()
    alice = federation.client("alice")
    stopped = federation.create()
    wait_for(lambda: training(alice, stopped), "training for a run that is going to be stopped")
    deleted = federation.create()  # before the other ends: with nothing left to do, a client with --once would end too
    asyncio.run(stop(federation.port, stopped))
    wait_for(lambda: training(alice, deleted), "training for a run that is going to be deleted")
    lost = federation.create()
    asyncio.run(delete(federation.port, deleted))
    wait_for(lambda: training(alice, lost), "training for a run that is going to be lost")
    server.kill()
    shutil.rmtree(federation.folder / "server")
    federation.server()
    federation.run_file.write_text(ONE_CLIENT)
    kept = federation.create()
    federation.finish(kept)

    given_up = alice.events("ticket is given up")
    assert [line["run"] for line in given_up] == [stopped, deleted, lost]
    assert given_up[0]["cause"] == "the run was stopped, or is complete; its training ends"
    assert all(line["cause"].startswith("there is no ticket") for line in given_up[1:])
    assert [line["run"] for line in alice.events("update received")] == [kept]
    assert alice.events("the server was restarted; registering again")
    (shown,) = federation.show(kept)["rounds"]
    assert shown["clients"] == ["alice"]


def test_a_site_that_does_not_suit_declines_by_name_and_takes_part_once_it_is_mended(federation: Federation) -> None:
    federation.run_file.write_text(ONE_CLIENT)
    federation.server()
    data = federation.folder / "alice" / "data.parquet"
    good = data.read_bytes()
    pq.write_table(pq.read_table(data).set_column(1, "label", pa.array(["cat", "fox"] * 8)), data)
    run = federation.create()
    misfit = federation.client("alice")
    assert misfit.process.wait(150) == 4
    assert "'fox' (8 rows) is not among the run's" in misfit.log.read_text().splitlines()[-1]
    shown = federation.show(run)
    assert shown["reason"].endswith("0 of 1 available, 1 declined")
    why = "1 of its 2 classes is not among the run's; a label map can rename or drop them"
    assert [(d["client"], d["reasons"]) for d in shown["declines"]] == [("alice", [why])]
    data.write_bytes(good)
    federation.clients.clear()
    federation.client("alice")
    federation.finish(run)
    assert not federation.show(run)["declines"]


def test_of_two_processes_on_copies_of_one_state_the_older_ends(federation: Federation) -> None:
    federation.run_file.write_text(ONE_CLIENT)
    federation.server()
    older = federation.client("alice")
    wait_for(lambda: older.events("registered"), "the first client")
    shutil.copytree(federation.folder / "alice", federation.folder / "copy")
    where = ["--server", f"127.0.0.1:{federation.port}", "--name", "alice", "--threads", "1", "--once"]
    what = [
        "--data",
        str(federation.folder / "copy/data.parquet"),
        "--state-dir",
        str(federation.folder / "copy/state"),
    ]
    younger = federation._start("fedpeft_client", "copy", *where, *what)
    assert older.process.wait(150) == 1
    assert "as happens on a copy of a state directory" in older.log.read_text().splitlines()[-1]
    federation.clients = [younger]
    federation.finish(federation.create())


def test_a_client_goes_on_where_a_process_before_it_is_taken_for_the_last(federation: Federation) -> None:
    """The call of one that was killed may be served late; a server cannot tell it from that of one that begins."""
    federation.run_file.write_text(ONE_CLIENT)
    federation.server()
    killed = federation.client("alice")
    wait_for(lambda: killed.events("registered"), "the first client")
    federation.kill(killed)
    state = federation.folder / "alice" / "state"
    (before,) = (state / processes.FILE).read_text().split()
    alice = federation.client("alice")
    wait_for(lambda: alice.events("registered"), "the next one")
    instance = (state / "instance").read_text().strip()
    who = ((wire.CLIENT_KEY, "alice"), (wire.INSTANCE_KEY, instance), (wire.PROCESS_KEY, before))
    with grpc.insecure_channel(f"127.0.0.1:{federation.port}") as channel:
        request = fed.RegisterRequest(min_protocol=1, max_protocol=1, role=fed.CLIENT_ROLE_TRAINER)
        fed_grpc.FederationServiceStub(channel).Register(request, metadata=who, timeout=30)
    federation.finish(federation.create())
    assert len(alice.events("registered")) == 2
