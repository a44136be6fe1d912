"""A hierarchy of real processes: an edge's daemon and agent between a parent's daemon and clients."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedpeft.api.operator_client import OperatorClient

from ..ports import free_port
from ..run_files import TINY_MODEL
from .conftest import WAIT_S, Federation, Process, wait_for, write_site
from .test_over_tls import command

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("preloaded"), pytest.mark.timeout(600)]

RUN_FILE = f"""
name = "hierarchy"
{TINY_MODEL}
[peft]
method = "bias"
[rounds]
count = COUNT
clients = CLIENTS
quorum = CLIENTS
deadline_s = 300
seed = 3
[training]
steps = 3
batch_size = 4
learning_rate = 0.05
[aggregation]
exact_sum = true
"""


def run_file(clients: int, count: int = 2) -> str:
    return RUN_FILE.replace("CLIENTS", str(clients)).replace("COUNT", str(count))


class Edge(Federation):
    """An edge: a daemon, an agent that relays for it, and its clients."""

    def secure(self) -> None:
        """Has its daemon speak TLS, to those it enrolled."""
        person = ["--operator", "ada", "--operator-identity", str(self.folder / "ada")]
        command("fedpeft_server", "init", "--data-dir", str(self.folder / "server"), "--port", str(self.port), *person)

    def agent(self, parent: Federation, *flags: str, clients: int = 2, name: str = "") -> Process:
        """Starts the agent, or another one under a name of its own; it ends when the parent's runs are over."""
        where = [
            "--server",
            f"127.0.0.1:{parent.port}",
            "--name",
            name or self.folder.name,
            "--state-dir",
            str(self.folder / (name or "agent")),
        ]
        what = ["--relay", f"127.0.0.1:{self.port}", "--relay-clients", str(clients), "--once", *flags]
        process = self._start("fedpeft_client", name or "agent", *where, *what)
        self.clients.append(process)
        return process

    def end(self) -> None:
        """Waits until its agent and clients have ended by themselves."""
        for each in self.clients:
            assert each.process.wait(WAIT_S) == 0, each.log.read_text()[-3000:]


@pytest.fixture
def federations(tmp_path: Path) -> Iterator[Callable[[str], Edge]]:
    """Makes federations by name, in folders of their own."""
    made = list[Edge]()

    def make(name: str) -> Edge:
        folder = tmp_path / name
        folder.mkdir()
        made.append(Edge(folder))
        return made[-1]

    yield make
    for each in made:
        each.close()


def rounds_of(found: Any, run: str) -> list[Any]:
    return list(found.show(run)["rounds"])


async def stop(port: int, run: str) -> None:
    async with OperatorClient(f"127.0.0.1:{port}") as server:
        await server.stop(run, "enough")


def test_a_tree_of_three_levels_makes_the_bits_of_a_flat_federation(federations: Callable[[str], Edge]) -> None:
    """Carol calls the parent, bob an edge, and alice an edge of that edge; flat, all three call one server."""
    flat, parent, edge, leaf = (federations(name) for name in ("flat", "parent", "edge", "leaf"))
    for each in (flat, parent):
        write_site(each.folder / "carol" / "data.parquet", 2, count=24)
    flat.run_file.write_text(run_file(3))
    parent.run_file.write_text(run_file(2))

    for each in (parent, edge, leaf):
        each.server()
    agents = [edge.agent(parent, "--relay-quorum", "2", "--relay-examples", "32"), leaf.agent(edge, clients=1)]
    leaf.client("alice")
    edge.client("bob")
    parent.client("carol")
    run = parent.create()
    found = parent.finish(run)
    edge.end()
    leaf.end()
    assert [(each.show(run)["state"], each.show(run)["version"]) for each in (edge, leaf)] == 2 * [("completed", 2)]
    assert not any("torch" in each.log.read_text() for each in agents)

    flat.server()
    for name in ("alice", "bob", "carol"):
        flat.client(name)
    whole = flat.create()
    expected = flat.finish(whole)
    assert found.keys() == expected.keys()
    assert [name for name in found if not np.array_equal(found[name], expected[name])] == []

    up = [[each["payload_bytes_up"] for each in rounds_of(*at)] for at in ((flat, whole), (parent, run), (edge, run))]
    update = up[0][0] // 3
    assert up == [2 * [3 * update], 2 * [5 * update], 2 * [5 * update]], "a sum is four updates of float32"
    examples = [each["metrics"]["train_examples"] for each in rounds_of(parent, run)]
    assert examples == [each["metrics"]["train_examples"] for each in rounds_of(flat, whole)] == [56, 56]
    losses = [[each["metrics"]["train_loss"] for each in rounds_of(*at)] for at in ((flat, whole), (parent, run))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


def test_a_relay_outlives_kills_of_its_server_and_of_itself(federations: Callable[[str], Edge]) -> None:
    parent, edge = federations("parent"), federations("edge")
    parent.run_file.write_text(run_file(1))
    parent.server()
    daemon = edge.server()
    agent = edge.agent(parent)
    edge.client("alice")  # alone, so the first round cannot open
    run = parent.create()
    wait_for(lambda: agent.events("run is created at the edge"), "the edge's run")
    daemon.kill()
    wait_for(lambda: agent.events("the edge's server is away; it is called again"), "a word on the dead server")
    edge.kill(agent)
    agent = edge.agent(parent, "-v")
    wait_for(lambda: agent.events("training"), "progress that is said although nobody answers")
    edge.server()
    edge.client("bob")
    edge.end()
    assert parent.show(run)["state"] == "completed"
    assert not agent.events("run is created at the edge"), "it was there"
    assert [line["version"] for line in agent.events("version is supplied to the edge")] == [1]
    first, second = agent.events("trained")
    assert (first["updates"], second["updates"], second["examples"]) == (2.0, 2.0, 32)
    assert rounds_of(parent, run)[1]["metrics"]["train_examples"] == 32
    assert [each["clients"] for each in rounds_of(edge, run)] == 2 * [["alice", "bob"]]


@pytest.mark.slow  # its parts are tested with a server alone; waits for both agents take a minute
def test_a_second_agent_of_an_edge_is_refused(federations: Callable[[str], Edge]) -> None:
    """Two clients of the parent's server with one edge behind them: its updates are counted once."""
    parent, edge = federations("parent"), federations("edge")
    parent.run_file.write_text(run_file(2).replace("quorum = 2", "quorum = 1").replace("300", "8"))
    parent.server()
    edge.server()
    agents = [edge.agent(parent, clients=1, name=name) for name in ("north", "south")]
    alice = edge.client("alice")
    run = parent.create()
    assert alice.process.wait(WAIT_S) == 0, alice.log.read_text()[-3000:]
    assert sorted(each.process.wait(WAIT_S) for each in agents) == [0, 4]
    assert parent.show(run)["state"] == "completed"
    worked, refused = sorted(agents, key=lambda each: each.process.returncode)
    (said,) = refused.events("run is declined")
    assert "is relayed for client" in said["cause"] and "stop one of the two agents" in said["cause"]
    (name,) = {client for each in rounds_of(parent, run) for client in each["clients"]}
    assert worked.log.stem == name
    assert [each["metrics"]["train_examples"] for each in rounds_of(parent, run)] == [16, 16]


@pytest.mark.slow
def test_a_parent_that_makes_a_version_again_is_found_out(federations: Callable[[str], Edge]) -> None:
    """Its database is restored from a backup, and other clients make version 1 than before."""
    parent, edge = federations("parent"), federations("edge")
    write_site(parent.folder / "carol" / "data.parquet", 2)
    parent.run_file.write_text(run_file(1, count=3).replace("300", "20").replace("steps = 3", "steps = 200"))
    daemon = parent.server()
    edge.server()
    run = parent.create()
    daemon.kill()
    shutil.copytree(parent.folder / "server", parent.folder / "backup")
    daemon = parent.server()
    agent, alice = edge.agent(parent, clients=1), edge.client("alice")
    wait_for(lambda: agent.events("version is supplied to the edge"), "version 1 at the edge")
    for each in (agent, alice):
        edge.kill(each)
    daemon.kill()
    shutil.rmtree(parent.folder / "server")
    shutil.move(parent.folder / "backup", parent.folder / "server")
    parent.server()
    carol = parent.client("carol")
    wait_for(lambda: parent.show(run)["version"] == 1, "another version 1 at the parent")
    parent.kill(carol)
    agent, alice = edge.agent(parent, clients=1), edge.client("alice")
    (said,) = wait_for(lambda: agent.events("the edge's version is not the parent's of that number"), "a word")
    shown = edge.show(run)
    assert (shown["state"], shown["reason"]) == ("paused", said["cause"])
    assert "stop and delete the run at the edge" in said["cause"]
    for verb in ("stop", "delete"):
        edge.fedpeft("run", verb, run)
    assert alice.process.wait(WAIT_S) == 0, "its run was stopped"
    wait_for(lambda: agent.events("run is created at the edge"), "the run anew, from the parent's version")
    edge.client("alice")
    edge.end()
    assert parent.show(run)["state"] == "completed"
    assert [each["clients"] for each in rounds_of(parent, run)] == [["carol"], ["edge"], ["edge"]]


@pytest.mark.slow
def test_a_restored_parent_is_found_out_where_the_edges_run_is_over(federations: Callable[[str], Edge]) -> None:
    """It goes on from its backup, and other clients make the versions that the edge has already."""
    parent, edge = federations("parent"), federations("edge")
    write_site(parent.folder / "carol" / "data.parquet", 2)
    parent.run_file.write_text(run_file(1))
    daemon = parent.server()
    edge.server()
    run = parent.create()
    daemon.kill()
    shutil.copytree(parent.folder / "server", parent.folder / "backup")
    daemon = parent.server()
    edge.agent(parent, clients=1)
    edge.client("alice")
    edge.end()
    assert (edge.show(run)["state"], edge.show(run)["reason"]) == ("completed", "")
    daemon.kill()
    shutil.rmtree(parent.folder / "server")
    shutil.move(parent.folder / "backup", parent.folder / "server")
    parent.server()
    agent = edge.agent(parent, clients=1)
    first, *_ = wait_for(lambda: agent.events("ticket is given up"), "a ticket that is given back")
    words = "the edge has version 2 of the run, and the ticket starts from version 0: was this server restored"
    assert words in first["cause"]
    wait_for(lambda: words in parent.show(run)["reason"], "the words at the parent")
    parent.client("carol")
    parent.finish(run)
    edge.end()
    (said,) = agent.events("the edge's last version is not the parent's")
    shown = edge.show(run)
    assert (shown["state"], shown["reason"], said["reason"]) == ("completed", said["cause"], "VERSION_DIFFERS")
    assert "has another version 2 than the parent's server" in shown["reason"]


@pytest.mark.slow
def test_a_round_that_closed_without_the_edge_is_left_for_the_next_one(federations: Callable[[str], Edge]) -> None:
    parent, edge = federations("parent"), federations("edge")
    write_site(parent.folder / "carol" / "data.parquet", 2)
    text = run_file(2).replace("quorum = 2", "quorum = 1\nmin_available = 2").replace("300", "30")
    parent.run_file.write_text(text)
    parent.server()
    edge.server()
    agent = edge.agent(parent, clients=1)  # of which none is there
    parent.client("carol")
    run = parent.create()
    (given_up,) = wait_for(lambda: agent.events("ticket is given up"), "the end of the first round")
    assert given_up["cause"] == "the ticket is TICKET_STATE_LATE; its training ends"
    edge.client("alice")
    parent.finish(run)
    edge.end()
    assert [each["clients"] for each in rounds_of(parent, run)] == [["carol"], ["carol", "edge"]]
    assert [(each["version"], each["clients"]) for each in rounds_of(edge, run)] == [(2, ["alice"])]


def test_a_parents_run_that_is_stopped_is_stopped_at_the_edge(federations: Callable[[str], Edge]) -> None:
    parent, edge = federations("parent"), federations("edge")
    parent.run_file.write_text(run_file(1).replace("steps = 3", "steps = 1_000_000"))
    parent.server()
    edge.server()
    edge.agent(parent, clients=1)
    alice = edge.client("alice")
    run = parent.create()
    wait_for(lambda: alice.events("training begins"), "training at the edge")
    asyncio.run(stop(parent.port, run))
    edge.end()
    assert edge.show(run)["state"] == "stopped" and edge.show(run)["reason"] == "the parent's run is stopped"


def test_a_relay_is_an_operator_of_an_edge_over_tls(federations: Callable[[str], Edge]) -> None:
    parent, edge = federations("parent"), federations("edge")
    parent.run_file.write_text(run_file(1, count=1))
    parent.server()
    edge.secure()
    relay = ["--operator", "relay", "--operator-identity", str(edge.folder / "relay")]
    command("fedpeft_server", "init", "--data-dir", str(edge.folder / "server"), *relay)
    enrollment = f"127.0.0.1:{free_port()}"
    told = ["--advertise", f"localhost:{edge.port}", "--advertise-enroll", enrollment]
    edge.server(("--enroll", enrollment, *told))
    ada = ["--identity", str(edge.folder / "ada")]
    token = command("fedpeft_operator.app", *ada, "token", "create", "--name", "alice")
    state = ["--state-dir", str(edge.folder / "alice" / "state")]
    command("fedpeft_client", "enroll", "-", *state, given=token.strip())
    plain = edge.agent(parent, clients=1)
    assert plain.process.wait(WAIT_S) == 2
    assert "speaks TLS" in plain.log.read_text() and "with --relay-identity" in plain.log.read_text()
    run = parent.create()
    revoked = edge.agent(parent, "--relay-identity", str(edge.folder / "relay"), clients=1)
    wait_for(lambda: revoked.events("run is created at the edge"), "the edge's run")
    command("fedpeft_operator.app", *ada, "client", "revoke", "relay", "--role", "operator")
    assert revoked.process.wait(WAIT_S) == 2
    assert "does not let this relay in" in revoked.log.read_text()
    said = "the ticket of edge was withdrawn: IDENTITY_INVALID: the edge's server does not let its agent in"
    assert said in parent.show(run)["reason"]
    edge.clients.clear()
    for verb in ("pause", "resume"):  # it has its ticket again at once
        parent.fedpeft("run", verb, run)
    edge.clients.append(
        edge._start("fedpeft_client", "alice", *state, "--data", str(edge.folder / "alice" / "data.parquet"), "--once")
    )
    edge.agent(parent, "--relay-identity", str(edge.folder / "ada"), clients=1)
    edge.end()
    assert parent.show(run)["state"] == "completed"
