"""A world of a server, clients and an operator, in a hierarchy an edge too, and what a schedule of faults does to it.

    python -m simulated_time.world        # holds the schedule of each line on stdin, and prints what came of it

A world takes its process over (time, disks, gRPC), so each is held in a process of its own, forked from this one, which
has already done what is done once in a process: modules, entry points, migrations.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import json
import os
import random
import secrets
import shutil
import sqlite3
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import safetensors.numpy
import structlog

from fedpeft.adapters import payload
from fedpeft.adapters.spec import AdapterSpec, TensorSpec
from fedpeft.api import operator_client
from fedpeft.config import RunConfig, parse_config
from fedpeft.errors import DiskFull
from fedpeft.process.addresses import Address
from fedpeft.rounds.combinations import check_combination
from fedpeft.rpc import wire as messages
from fedpeft.v1 import operator_service_pb2 as op
from fedpeft.v1 import operator_service_pb2_grpc as op_grpc
from fedpeft.v1 import run_pb2, tensor_pb2
from fedpeft_client.agent import Agent
from fedpeft_client.egress.log import EgressLog
from fedpeft_client.owner.metrics import Metrics
from fedpeft_client.owner.policy import Policy
from fedpeft_client.settings import Settings as ClientSettings
from fedpeft_client.state.contact import Contact
from fedpeft_client.state.state_dir import StateDirectory
from fedpeft_client.timing import TIMING as CLIENT_TIMING
from fedpeft_client.uplink import channel as client_channel
from fedpeft_client.uplink import traffic
from fedpeft_server import app
from fedpeft_server.settings import Settings
from fedpeft_server.store import store as server_store
from fedpeft_server.store.database import Database
from fedpeft_server.timing import TIMING

from .loop import Pool, SimulatedLoop, Stuck, take_over_time
from .machines import Machine, own_mounts, watch_effects
from .relaying import AGENT, AT_EDGE, EDGE_PORT, PARENT_PORT, RELAYING, RelayProcess, at_parent
from .replay import differences
from .schedule import Schedule
from .wire import Wire
from .wire_server import SimulatedServer
from .worker import SimulatedWorker

BEGINS = 1_800_000_000.0
PATIENCE_S = 9 * 3600.0
"""A run is complete so long after the last fault, or something hangs."""
ROUNDS = 4
SPEC = AdapterSpec.of("bias", [TensorSpec("blocks.0.bias", (7,)), TensorSpec("head.weight", (3, 5))])


@dataclass
class Outcome:
    """Outcome of a world.

    Attributes:
        faults: Promises that were broken; empty if none was.
        adapter: SHA-256 of the last version, hexadecimal.
        hours: Simulated time until the run was complete.
        deaths: Processes that were killed.
        effects: Effects on the disk of each machine in its last life.
        lost: Calls to which something happened, by what.
        history: Digest of all that all machines logged, with the times: two worlds of one seed have the same.
        rotten: Stored files that were found to be corrupt.
        without_room: Lines that were logged about a full disk.
        ends: Errors that processes ended with because of a full disk; each was started again.
        resumed: Times that the operator resumed the run.
        log: The last lines of all machines, where a promise was broken.
    """

    faults: list[str] = field(default_factory=list)
    adapter: str = ""
    hours: float = 0.0
    deaths: int = 0
    effects: dict[str, int] = field(default_factory=dict)
    lost: dict[str, int] = field(default_factory=dict)
    history: str = ""
    rotten: int = 0
    without_room: int = 0
    ends: list[str] = field(default_factory=list)
    resumed: int = 0
    log: list[str] = field(default_factory=list)


def held(schedule: Schedule) -> Outcome:
    """Holds a world in a process of its own, which ends with it."""
    reading, writing = os.pipe()
    place = Path(tempfile.mkdtemp(prefix="world-", dir="/dev/shm"))
    child = os.fork()
    if not child:
        outcome = Outcome()
        try:
            os.close(reading)
            outcome = _World(schedule, place).hold()
        except BaseException:
            outcome.faults.append(traceback.format_exc())
        finally:
            with open(writing, "w") as stream:
                json.dump(outcome.__dict__, stream)
            os._exit(0)  # nothing is collected: a coroutine that is would run its `finally`
    os.close(writing)
    with open(reading) as stream:
        said = stream.read()
    os.waitpid(child, 0)
    shutil.rmtree(place)  # by now without the disks that were mounted in it
    return Outcome(**json.loads(said)) if said else Outcome(["the process died"])


BUFFERED = {
    "rounds": {
        "policy": "buffered",
        "count": 6,
        "clients": 2,
        "concurrency": 3,
        "max_staleness": 2,
        "quorum": 1,
        "min_available": 2,
        "deadline_s": 1200,
        "seed": 5,
    },
    "aggregation": {"strategy": "fedbuff"},
}


def run_config(*, buffered: bool, exact: bool, clients: int) -> RunConfig:
    """Returns the run that every world holds, or every one of buffered rounds, or of exact sums."""
    return parse_config(
        {
            "name": "simulated time",
            "model": {"name": "vit_tiny_patch16_224", "classes": ["a", "b", "c"]},
            "peft": {"method": "bias"},
            "rounds": {"count": ROUNDS, "clients": clients, "quorum": clients, "deadline_s": 7200, "seed": 5},
            "codec": {"up": "int8"},
            **({"aggregation": {"exact_sum": True}} if exact else {}),
            **(BUFFERED if buffered else {}),
        }
    )


def prepare() -> None:
    """Does what is done once in a process, so that no world does it again: a sixth of the time of one."""
    with tempfile.TemporaryDirectory() as folder:
        Database.open(f"sqlite:///{folder}/fedpeft.db", TIMING).close()
    for buffered in (False, True):
        check_combination(run_config(buffered=buffered, exact=not buffered, clients=2), SPEC)
    gc.collect()
    gc.freeze()  # a collection in a world would copy every page of what is here


class _World:
    def __init__(self, schedule: Schedule, place: Path) -> None:
        self._schedule = schedule
        self._drawn = drawn = random.Random(schedule.seed)
        self._loop = SimulatedLoop(drawn, BEGINS)
        self._place = place
        self._wire = Wire(self._loop, drawn)
        self._machines: dict[str, Machine] = {}
        self._lines: list[str] = []
        self._receipts: dict[tuple[str, int], str] = {}
        self._unforeseen: list[str] = []
        self._resumed = 0
        self._ports = {"server": PARENT_PORT, "edge": EDGE_PORT} if schedule.hierarchy else {"server": PARENT_PORT}

    def hold(self) -> Outcome:
        """Holds the world until the run is complete, and looks at what it left."""
        self._take_over()
        outcome = Outcome()
        try:
            self._loop.run_until_complete(self._history())
        except Stuck:
            outcome.faults.append("nobody has anything to do, and the run is not complete")
        except TimeoutError:
            outcome.faults.append(f"the run is not complete {PATIENCE_S / 3600:.0f} hours after the last fault")
        outcome.hours = self._loop.now / 3600
        outcome.deaths = sum(machine.deaths for machine in self._machines.values())
        outcome.effects = {name: machine.life.effects for name, machine in self._machines.items() if machine.life}
        outcome.lost = self._wire.lost
        outcome.faults += [f"{name}: {fault}" for name, m in self._machines.items() for fault in m.faults]
        outcome.faults += self._unforeseen
        outcome.faults += self._broken_promises(outcome)
        outcome.history = hashlib.sha256("\n".join(self._lines).encode()).hexdigest()
        outcome.ends = [f"{name}: {end}" for name, machine in self._machines.items() for end in machine.ends]
        outcome.resumed = self._resumed
        outcome.rotten = sum("a stored file is corrupt" in line for line in self._lines)
        outcome.without_room = sum("room" in line or "No space" in line for line in self._lines)
        outcome.log = self._lines[-400:] if outcome.faults else []
        return outcome

    def _take_over(self) -> None:
        """Puts the world in the place of what this process would have used."""
        random.seed(self._schedule.seed)
        if self._schedule.room_bytes is not None:
            own_mounts()
        take_over_time(self._loop)
        asyncio.set_event_loop(self._loop)
        tokens = random.Random("tokens")  # the same run id in each world, which is drawn before anything goes wrong
        secrets.token_hex = lambda n=32: tokens.randbytes(n).hex()
        secrets.token_bytes = lambda n=32: tokens.randbytes(n)
        secrets.choice = tokens.choice
        secrets.token_urlsafe = lambda n=32: tokens.randbytes(n).hex()
        server_store.ThreadPoolExecutor = Pool  # type: ignore[misc, assignment]
        grpc.aio.server = lambda *_, interceptors, **__: SimulatedServer(self._wire, interceptors)
        client_channel.open_channel = operator_client.open_channel = self._opened  # type: ignore[assignment, misc]
        client_channel.diagnosis.explain = _unexplained  # type: ignore[assignment]
        structlog.configure(processors=[self._note], cache_logger_on_first_use=False)
        watch_effects(self._machines, self._loop, disks_lie=self._schedule.disks_lie)

    def _opened(self, server: str, *_: Any) -> Any:
        return self._wire.channel(Address.parse(server).port)

    def _note(self, _: Any, level: str, event: dict[str, Any]) -> Any:
        error = event.pop("exc_info", None) or ()
        error = sys.exc_info()[1] if error is True else error[1] if isinstance(error, tuple) and error else error
        said = " ".join(f"{key}={value}" for key, value in event.items() if key != "event")
        self._lines.append(
            f"{self._loop.now:10.3f} {level:8} {event.get('event')} {said}".replace(str(self._place), "")[:400]
        )
        if isinstance(error, BaseException) and not isinstance(error, DiskFull):
            self._unforeseen.append(f"{event.get('event')}: {type(error).__name__}: {error}")
            self._lines += "".join(traceback.format_exception(error)).splitlines()
        if event.get("event") == "update received" and "sha256" in event:  # by a client
            self._receipts[event["client"], int(event["round"])] = event["sha256"]
        raise structlog.DropEvent

    async def _history(self) -> None:
        schedule = self._schedule
        for name, port in self._ports.items():
            self._add(name, partial(self._serve, port))
        members = (*schedule.clients, AGENT) if schedule.hierarchy else schedule.clients
        for member in members:
            self._add(member, partial(self._take_part, member))
        for fault in schedule.faults:
            self._loop.call_at(fault.at_s, self._happen, fault)
        await asyncio.sleep(0.0)  # those of the beginning happen
        for name in self._ports:
            self._machines[name].start()
        run = await self._create()
        self._wire.quality = schedule.quality
        for member in members:
            self._machines[member].start()
        last = max((fault.over_s for fault in schedule.faults), default=0.0)
        self._loop.call_at(max(last, self._loop.now), self._heal)
        async with asyncio.timeout_at(max(last, self._loop.now) + PATIENCE_S):
            while not all([await self._is_complete(run, port) for port in self._ports.values()]):
                await asyncio.sleep(20.0)
            await asyncio.sleep(60.0)  # the last receipts reach who waits for them

    def _add(self, name: str, main: Any) -> None:
        self._machines[name] = Machine(name, self._place, self._wire, main, self._schedule.room_bytes)

    def _happen(self, fault: Any) -> None:
        fault.happen(self._machines, self._wire, self._loop)

    def _heal(self) -> None:
        """Ends all faults: from now on the run must come to its end."""
        self._wire.quality = type(self._wire.quality)()
        self._wire.cut.clear()
        for machine in self._machines.values():
            machine.dies_after = None
            if self._schedule.room_bytes is not None:
                machine.fill(None)

    # What lives on the machines.

    async def _serve(self, port: int, disk: Path) -> None:
        known = {"data_dir": disk / "data", "listen": f"127.0.0.1:{port}", "metrics": ""}
        settings = Settings.model_validate({**known, "keep_updates": self._schedule.buffered})
        async with app.serving(settings, TIMING) as parts:
            await parts.stopping.wait()

    async def _take_part(self, client: str, disk: Path) -> None:
        port = EDGE_PORT if self._schedule.hierarchy and client in AT_EDGE else PARENT_PORT
        has = RELAYING if client == AGENT else {"data": disk}
        settings = ClientSettings.model_validate(
            {"server": f"127.0.0.1:{port}", "name": client, "state_dir": disk / "state", **has}
        )
        log, metrics = structlog.get_logger().bind(client=client), Metrics()
        worker: Any = SimulatedWorker(client, self._drawn, CLIENT_TIMING, self._schedule.longest_training_s)
        if client == AGENT:
            worker = RelayProcess(settings, CLIENT_TIMING)
        with StateDirectory(settings.state_dir) as directory, EgressLog(directory.path, settings.server) as egress_log:
            async with client_channel.Channel(
                settings.server, client, directory.instance, None, CLIENT_TIMING
            ) as channel:
                traffic.Traffic(channel, egress_log, metrics, Contact(directory.path, settings.server, CLIENT_TIMING))
                agent: Any = Agent(settings, Policy(), directory, channel, worker, egress_log, metrics, log)  # type: ignore[arg-type]
                await agent.live()

    # The operator.

    async def _create(self) -> str:
        arrays = {t.name: np.zeros(t.shape, np.float32) for t in SPEC.shared}
        manifest, data = payload.encode(arrays, SPEC.shared, "float32")
        first = op.CreateRunHeader(
            config=messages.config_to_proto(self._config()),
            spec=messages.spec_to_proto(SPEC),
            backbone_fingerprint="ab" * 32,
            manifest=messages.manifest_to_proto(manifest),
            request_id="r",
            model_parameters=1000,
        )
        requests = [
            op.CreateRunRequest(header=first),
            op.CreateRunRequest(chunk=tensor_pb2.Chunk(offset=0, data=data)),
        ]
        while True:
            try:
                return str((await self._operator(PARENT_PORT).CreateRun(requests)).run.id)
            except grpc.aio.AioRpcError:
                await asyncio.sleep(1.0)

    def _config(self) -> RunConfig:
        schedule = self._schedule
        clients = at_parent(hierarchy=schedule.hierarchy)
        return run_config(buffered=schedule.buffered, exact=schedule.exact, clients=len(clients))

    async def _is_complete(self, run: str, port: int) -> bool:
        """Returns True if a server's run is complete; resumes one that was paused, for want of updates or of room."""
        found = await self._run(run, port)
        if found.state == run_pb2.RUN_STATE_PAUSED:
            self._resumed += 1
            with suppress(grpc.aio.AioRpcError):  # it is tried again
                await self._operator(port).ResumeRun(op.ResumeRunRequest(run=run), timeout=30)
            await asyncio.sleep(600.0)
        return bool(found.state == run_pb2.RUN_STATE_COMPLETED)

    async def _run(self, run: str, port: int) -> Any:
        """Returns a server's run; an empty one while an edge has none."""
        while True:
            try:
                return (await self._operator(port).GetRun(op.GetRunRequest(run=run), timeout=30)).run
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.NOT_FOUND:
                    return run_pb2.Run()
                await asyncio.sleep(1.0)

    def _operator(self, port: int) -> Any:
        return op_grpc.OperatorServiceStub(self._wire.channel(port, good=True))

    # The promises.

    def _broken_promises(self, outcome: Outcome) -> Iterator[str]:
        hierarchy = self._schedule.hierarchy
        above = at_parent(hierarchy=True) if hierarchy else self._schedule.clients
        outcome.adapter = yield from self._broken_at("server", above)
        if hierarchy:
            at_edge = yield from self._broken_at("edge", AT_EDGE)
            if at_edge != outcome.adapter:
                yield f"the last version is {outcome.adapter} at the parent, and {at_edge} at the edge"

    def _broken_at(self, server: str, clients: tuple[str, ...]) -> Generator[str, None, str]:
        """Yields what is broken at a server, whose clients these are; returns the digest of its last version."""
        database = self._machines[server].disk.path / "data" / "fedpeft.db"
        if not database.exists():
            yield f"there is no database of {server}"
            return ""
        with closing(sqlite3.connect(database)) as read:
            counted = read.execute(
                "select client, number, payload_sha256 from tickets join updates on ticket = id"
                " where state = 'received'"
            ).fetchall()
            versions = read.execute("select version, draw from versions order by version").fetchall()
            traffic = read.execute(
                "select number, client, wire_up, wire_down, payload_up, payload_down from traffic"
            ).fetchall()
            told = read.execute("select details from audit where action = 'update.lost'").fetchall()
        of_ticket = Counter((client, number) for client, number, _ in counted)
        for (client, number), times in of_ticket.items():
            if times != 1:
                yield f"{client} counts {times} times in round {number}"
        there = {(client, number): sha256 for client, number, sha256 in counted}
        # In a buffered round others may come before one that the disk lost comes again.
        lost = {json.loads(details)["client"] for (details,) in told} if self._schedule.buffered else set()
        for (client, number), sha256 in self._receipts.items():
            if client not in clients:
                continue
            if client in lost and (client, number) not in there:
                continue
            if there.get((client, number)) != sha256:
                yield f"{client} has a receipt for round {number} that does not count: {there.get((client, number))}"
        if self._schedule.buffered:
            yield from differences(database.parent, self._place / "replay")
        for number, client, *wire_and_payload in traffic:
            up, down, payload_up, payload_down = wire_and_payload
            if up < payload_up or down < payload_down:
                yield f"{client} in round {number}: {wire_and_payload} bytes: a payload is larger than all that passed"
        return _digest(database.parent / "blobs", *versions[-1]) if versions else ""


def _digest(blobs: Path, version: int, draw: str) -> str:
    """Returns the digest of a version's tensors; `draw` is in the name of its file."""
    (file,) = blobs.glob(f"runs/*/versions/{version:06}{f'-draw-{draw}' if draw else ''}.safetensors")
    digest = hashlib.sha256()
    for name, values in sorted(safetensors.numpy.load_file(file).items()):
        digest.update(name.encode() + values.tobytes())
    return digest.hexdigest()


async def _unexplained(*_: Any) -> None:
    """Finds nothing."""


if __name__ == "__main__":
    prepare()
    for line in sys.stdin:
        print(json.dumps(held(Schedule.named(line.strip())).__dict__), flush=True)
