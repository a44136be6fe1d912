"""Uploads to three daemons whose PostgreSQL is restarted every 5 to 40 s, as by `pg_ctl -m immediate`.

    python -m chaos.database_restarts [--uploads 10000] [--clients 100] [--seed 1] [--folder]

Clients that train in no time send small updates, and another daemon has each next call. All durations are a user's.
Afterwards each receipt must count once, the chain of records and the audit log must be whole, and no update has fewer
bytes booked than it has.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import secrets
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar

import grpc
import numpy as np
from ports import free_ports
from server.conftest import SPEC, Daemon, RawClient, config, header

from fedpeft.adapters import payload
from fedpeft.identity import audit
from fedpeft.rounds.record import verify_chain
from fedpeft.rpc import wire
from fedpeft.v1 import federation_service_pb2 as fed
from fedpeft.v1 import run_pb2
from fedpeft_server.store.database import Database
from fedpeft_server.timing import TIMING

from . import mains, processes, shared_places
from .machines import Machine

T = TypeVar("T")

PAUSES_S = (5.0, 40.0)
BALANCED = [
    ("grpc.service_config", json.dumps({"loadBalancingConfig": [{"round_robin": {}}]})),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
]
AGAIN = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.ABORTED)
BOUND_S = 300.0


class Uploader(RawClient):
    """A client that calls again until it is answered, and keeps its receipts."""

    def __init__(self, channel: grpc.aio.Channel, name: str) -> None:
        super().__init__(channel, name)
        self.metadata = (*self.metadata, (wire.PROCESS_KEY, secrets.token_hex(16)))
        self.receipts: list[fed.PushUpdateResponse] = []
        self.waits_s: list[float] = []
        self.repetitions = 0

    async def take_part(self) -> None:
        """Takes part until the run is finished."""
        await self.again(self.register)
        while not (answer := await self.again(self.wait)).idle.finished:
            if answer.HasField("training"):
                await self._train(answer.training)

    async def again(self, call: Callable[[], Awaitable[T]]) -> T:
        """Makes a call until it is answered."""
        async with asyncio.timeout(BOUND_S):
            while True:
                try:
                    return await call()
                except grpc.aio.AioRpcError as error:
                    if error.code() not in AGAIN:
                        raise
                self.repetitions += 1
                await asyncio.sleep(0.1)

    async def _train(self, task: fed.TrainingTask) -> None:
        change = {t.name: np.full(t.shape, 1 / task.round, np.float32) for t in SPEC.sent(1)}
        manifest, data = payload.encode(change, SPEC.sent(1), "float32")
        first, began = header(task.ticket, manifest), time.monotonic()
        self.receipts.append(await self.again(lambda: self.push_raw(first, [(0, data)])))
        self.waits_s.append(time.monotonic() - began)


def keep_restarting(postgres: Machine, restarts: Path, drawn: random.Random) -> int:
    """Restarts the database again and again, in a process of its own: one that uses gRPC should not fork.

    It begins once there is the file of restarts, of which each adds a line, and ends as that is removed.
    """
    postgres.start()
    while not restarts.exists():
        time.sleep(0.05)
    while restarts.exists():
        due = time.monotonic() + drawn.uniform(*PAUSES_S)
        while restarts.exists() and time.monotonic() < due:
            time.sleep(0.05)
        postgres.leave(0.0)
        while postgres.is_leaving:
            postgres.look(time.monotonic())
            time.sleep(0.02)
        if restarts.exists():
            with restarts.open("a") as file:
                file.write(f"{time.time()}\n")
    while True:  # the database ends with this process
        time.sleep(1)


async def hold(ports: list[int], restarts: Path, chosen: argparse.Namespace) -> tuple[str, list[Uploader]]:
    """Holds a run to its end; returns its id and the clients."""
    target = "ipv4:" + ",".join(f"127.0.0.1:{port}" for port in ports)
    rounds = {"count": chosen.uploads // chosen.clients, "clients": chosen.clients, "quorum": chosen.clients}
    async with grpc.aio.insecure_channel(target, options=BALANCED) as channel:
        uploaders = [Uploader(channel, f"c{number}") for number in range(chosen.clients)]
        daemon = Daemon(None, channel, None)  # type: ignore[arg-type]
        run = await uploaders[0].again(lambda: daemon.create(config(rounds={**rounds, "deadline_s": 600.0})))
        restarts.touch()  # noqa: ASYNC240
        telling = asyncio.create_task(tell(uploaders, restarts))
        await asyncio.gather(*(uploader.take_part() for uploader in uploaders))
        telling.cancel()
        ended = await uploaders[0].again(lambda: daemon.run(run.id))
    assert ended.state == run_pb2.RUN_STATE_COMPLETED, ended
    return run.id, uploaders


async def tell(uploaders: list[Uploader], restarts: Path) -> None:
    while True:
        await asyncio.sleep(15)
        print(f"{sum(len(u.receipts) for u in uploaders)} receipts, {_count(restarts)} restarts", flush=True)


def _count(restarts: Path) -> int:
    return len(restarts.read_text().splitlines())


def faults(database: Database, read: Any, run: str, uploaders: list[Uploader]) -> list[str]:
    """Returns the promises that were broken."""
    found = list[str]()
    with closing(read) as rows:
        joined = "from tickets join updates on ticket = id where state = 'received'"
        counted = dict(rows.execute(f"select id, payload_sha256 {joined}").fetchall())
        records = [text for (text,) in rows.execute("select record from rounds where record != '' order by number")]
        booked = dict(rows.execute("select client, sum(payload_up) from traffic group by client").fetchall())
    verify_chain(records)
    receipts = {receipt.ticket: receipt.sha256.hex() for u in uploaders for receipt in u.receipts}
    lost = [ticket for ticket, sha256 in receipts.items() if counted.get(ticket) != sha256]
    folded = Counter(c["ticket"] for record in records for c in json.loads(record)["contributions"])
    doubled = [ticket for ticket, times in folded.items() if times > 1]
    missing = [ticket for ticket in receipts if ticket not in folded]
    entries = database.transactions.entries_after(0, 10**6)
    audit.verify(entries)
    done = Counter(entry.action for entry in entries if entry.object == run)
    print(f"lost {len(lost) + len(missing)}, doubled {len(doubled)}, of {len(receipts)} receipts; {dict(done)}")
    if (
        lost
        or doubled
        or missing
        or done["update.received"] != len(receipts)
        or done["round.committed"] != len(records)
    ):
        found.append("receipts, folds and audit log do not agree")
    size = 4 * SPEC.parameters * len(records)
    found += [f"{u.name}: {booked[u.name]} bytes booked of {size}" for u in uploaders if booked[u.name] < size]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--uploads", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", action="store_true", help="updates and versions in a shared folder, not in the S3")
    chosen = parser.parse_args()
    shared_places.prepare()
    with tempfile.TemporaryDirectory(prefix="chaos-restarts-", ignore_cleanup_errors=True) as folder:
        place = Path(folder)
        (place / "logs").mkdir()
        drawn_ports = free_ports()
        port, *ports = (next(drawn_ports) for _ in range(4))
        shared = shared_places.SharedPlaces(place, port)
        drawn = random.Random(f"restarts {chosen.seed}")
        postgres, restarts = shared.machine(place, drawn), place / "restarts"
        processes.start(lambda: keep_restarting(postgres, restarts, drawn), place / "logs" / "restarts.log")
        shared.await_postgres()
        flags, found = shared.flags(port), shared.environment()
        if chosen.folder:
            flags[2:] = ["--blobs", str(place / "blobs"), "--updates", str(place / "updates")]
        for at in ports:
            log, data = place / "logs" / f"{at}.log", place / str(at)
            processes.start(lambda at=at, data=data: mains.serve(data, at, flags, found), log)  # type: ignore[misc]
        began = time.monotonic()
        run, uploaders = asyncio.run(hold(ports, restarts, chosen))
        took_s, times = time.monotonic() - began, _count(restarts)
        restarts.unlink()
        time.sleep(1)  # the last one may be under way
        shared.await_postgres()
        database = Database.open(shared.flags(port)[1], TIMING)
        broken = faults(database, shared.read(), run, uploaders)
        database.close()
    waits = sorted(wait for uploader in uploaders for wait in uploader.waits_s)
    print(
        f"{len({r.ticket for u in uploaders for r in u.receipts})} updates, {len(waits)} uploads in {took_s:.0f} s, "
        f"{times} restarts, "
        f"{sum(u.repetitions for u in uploaders)} calls repeated, upload median {waits[len(waits) // 2]:.3f} s, "
        f"longest {waits[-1]:.1f} s, load {os.getloadavg()[0]:.1f}"
    )
    print("\n".join(broken) or "every receipt counts, once", flush=True)
    raise SystemExit(bool(broken))


if __name__ == "__main__":
    main()
