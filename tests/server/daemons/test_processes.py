"""Three processes on one PostgreSQL and one S3, behind gRPC's own balancer of calls; one of them is killed."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

import grpc
import numpy as np
import pytest

from fedpeft.adapters import payload
from fedpeft.identity import audit
from fedpeft.rounds.record import verify_chain
from fedpeft.rpc import wire
from fedpeft.v1 import federation_service_pb2 as fed
from fedpeft.v1 import run_pb2
from fedpeft_server.store.database import Database
from fedpeft_server.store.rows import Place
from fedpeft_server.timing import TIMING

from ...ports import free_port
from ..conftest import SPEC, Arrays, Daemon, RawClient, StartDaemon, config, header
from ..test_process import running

T = TypeVar("T")

CLIENTS = ("a", "b", "c", "d", "e", "f")
ROUNDS = 5
BALANCED = [
    ("grpc.service_config", json.dumps({"loadBalancingConfig": [{"round_robin": {}}]})),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
]
"""Options of a channel that sends each call to the next address."""


class Roamer(RawClient):
    """A client that trains in no time, tries again what is UNAVAILABLE, and keeps its receipts."""

    def __init__(self, channel: grpc.aio.Channel, name: str) -> None:
        super().__init__(channel, name)
        self.metadata = (*self.metadata, (wire.PROCESS_KEY, secrets.token_hex(16)))
        self.receipts: list[fed.PushUpdateResponse] = []

    async def take_part(self, received: Callable[[int], Awaitable[None]]) -> None:
        """Takes part until the run is finished; `received` is called after each receipt, with its round."""
        await again(self.register)
        while True:
            answer = await again(self.wait)
            if answer.idle.finished:
                return
            if answer.HasField("training"):
                await self._train(answer.training)
                await received(answer.training.round)

    async def _train(self, task: fed.TrainingTask) -> None:
        head, data = await again(lambda: self.pull(task.run, task.version))
        base = payload.decode(wire.manifest_from_proto(head.manifest), memoryview(data))
        manifest, change = payload.encode(trained(base, self.name, task.round), SPEC.sent(1), "float32")
        first = header(task.ticket, manifest, 10 + CLIENTS.index(self.name))
        self.receipts.append(await again(lambda: self.push_raw(first, [(0, change)])))


def trained(base: Arrays, client: str, number: int) -> Arrays:
    """A change that depends on what it began with, so that any difference stays to the end."""
    factor = np.float32((CLIENTS.index(client) + 1) / (7 * number))
    return {name: (np.cos(values) * factor).astype(np.float32) for name, values in base.items()}


async def again(call: Callable[[], Awaitable[T]]) -> T:
    """Makes a call until it is answered; one that is not answered for a while makes the test fail."""
    async with asyncio.timeout(60):
        while True:
            try:
                return await call()
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise
            await asyncio.sleep(0.05)


class Several:
    """Processes on one database and one bucket."""

    def __init__(self, folder: Path, places: dict[str, str]) -> None:
        self.ports = [free_port() for _ in range(3)]
        self._folder = folder
        self._flags = [part for flag, value in places.items() for part in (flag, value)]
        self._lives: list[ExitStack] = [ExitStack() for _ in self.ports]

    def start(self, number: int) -> None:
        """Starts a daemon, as it was before it was killed."""
        flags = (*self._flags, "--metrics", "", "--drain-s", "1")
        daemon = running(self._folder / f"daemon-{number}", *flags, port=self.ports[number])
        self._lives[number].enter_context(daemon)

    def kill(self, number: int) -> None:
        """Kills a daemon with SIGKILL."""
        self._lives[number].close()

    @property
    def target(self) -> str:
        """All addresses, as one target of gRPC."""
        return "ipv4:" + ",".join(f"127.0.0.1:{port}" for port in self.ports)


@contextmanager
def several(folder: Path, places: dict[str, str]) -> Iterator[Several]:
    daemons = Several(folder, places)
    try:
        for number in range(3):
            daemons.start(number)
        yield daemons
    finally:
        for number in range(3):
            daemons.kill(number)


async def hold(daemon: Daemon, received: Callable[[int], Awaitable[None]]) -> tuple[str, list[Roamer], bytes]:
    """Holds a run to its end; returns its id, the clients, and the bytes of its last version."""
    run = await daemon.create(config(rounds={"count": ROUNDS, "clients": len(CLIENTS), "deadline_s": 120.0}))
    roamers = [Roamer(daemon.channel, name) for name in CLIENTS]
    async with asyncio.timeout(120):
        await asyncio.gather(*(roamer.take_part(received) for roamer in roamers))
    ended = await again(lambda: daemon.run(run.id))
    assert (ended.state, ended.version) == (run_pb2.RUN_STATE_COMPLETED, ROUNDS)
    reader = Roamer(daemon.channel, "reader")
    await again(lambda: reader.register(fed.CLIENT_ROLE_EVALUATOR))
    _, data = await again(lambda: reader.pull(run.id, ROUNDS))
    return run.id, roamers, data


async def nothing(number: int) -> None:
    """Stands for what happens where nothing happens."""


def check(database: Database, run: str, roamers: list[Roamer]) -> None:
    """Each update that has a receipt was counted once, each round folded once, and the bytes of all daemons add up."""
    rounds, _ = database.rounds_from(run, Place(), 99, 999, {})
    verify_chain([done.record for done in rounds])
    tickets = {t.ticket.id: t for done in rounds for t in done.tickets}
    receipts = {receipt.ticket: receipt for roamer in roamers for receipt in roamer.receipts}
    assert len(receipts) == len(tickets) == ROUNDS * len(CLIENTS)
    for ticket, receipt in receipts.items():
        assert tickets[ticket].payload_sha256 == receipt.sha256.hex()
    entries = database.transactions.entries_after(0, 10_000)
    audit.verify(entries)
    done = Counter(entry.action for entry in entries if entry.object == run)
    assert (done["update.received"], done["round.committed"]) == (ROUNDS * len(CLIENTS), ROUNDS)
    size = 4 * SPEC.parameters
    for ticket in tickets.values():
        assert ticket.traffic.payload_up >= size and ticket.traffic.wire_up > ticket.traffic.payload_up


@pytest.mark.slow
@pytest.mark.timeout(240)
async def test_one_of_three_is_killed_and_the_bits_are_those_of_one(
    start: StartDaemon, tmp_path: Path, migrated_postgresql_url: str, s3: str
) -> None:
    places = {"--database": migrated_postgresql_url, "--blobs": f"{s3}/versions", "--updates": f"{s3}/updates"}
    _, _, alone = await hold(await start(), nothing)
    with several(tmp_path, places) as daemons:
        counts = Counter[int]()

        async def received(number: int) -> None:
            counts[number] += 1
            if counts[2] == 3 and number == 2:
                daemons.kill(1)
            if counts[4] == 1 and number == 4:
                await asyncio.to_thread(daemons.start, 1)
                daemons.kill(0)

        async with grpc.aio.insecure_channel(daemons.target, options=BALANCED) as channel:
            run, roamers, together = await hold(Daemon(None, channel, nothing), received)  # type: ignore[arg-type]
    assert together == alone
    database = Database.open(migrated_postgresql_url, TIMING)
    try:
        check(database, run, roamers)
    finally:
        database.close()
