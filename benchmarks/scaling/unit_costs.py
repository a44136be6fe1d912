"""Unit costs of a daemon: processor time, memory, SQL statements and bucket requests of each thing that a device does.

    unit_costs.py processor [--tls]      a daemon in a process of its own: processor time, memory
    unit_costs.py counts --database URL  a daemon in this process: SQL statements, transactions, requests to an S3
    unit_costs.py known                  devices that are registered and away: memory, processor time of a start
    unit_costs.py pieces                 parts of the core alone: sampling, seats told by other daemons

Each device has a connection of its own. Counts do not depend on the machine, and processor time little on what else it
does; wall time is not measured. `federation.py` computes with what is kept in `unit_costs.json`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import grpc  # noqa: E402
from clients import Update, pull, push, random_update  # noqa: E402
from round import create, synthetic_spec  # noqa: E402
from sqlalchemy import event  # noqa: E402
from workload import (  # noqa: E402
    Daemon,
    daemon,
    free_address,
    machine,
    process,
    processor_seconds,
    resident_bytes,
    scratch,
)

from fedpeft import PROTOCOL  # noqa: E402
from fedpeft.api.operator_client import OperatorClient  # noqa: E402
from fedpeft.config import parse_config  # noqa: E402
from fedpeft.identity.folder import Identity  # noqa: E402
from fedpeft.rounds.events import Waiting  # noqa: E402
from fedpeft.rounds.state_machine import Round, advance  # noqa: E402
from fedpeft.rpc import wire  # noqa: E402
from fedpeft.rpc.channel import open_channel  # noqa: E402
from fedpeft.v1 import federation_service_pb2 as pb  # noqa: E402
from fedpeft.v1 import federation_service_pb2_grpc as pb_grpc  # noqa: E402

Measures = dict[str, float]
Read = Callable[[], Measures]
MOTO = HERE.parents[1] / ".venv-s3" / "bin" / "moto_server"
STARTED_S = 60.0
S3_KEYS = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_REGION": "us-east-1", "AWS_ALLOW_HTTP": "true"}

SETTLE_S = 8.0
"""Time in which a daemon that has started reads what it keeps at hand."""


class Book:
    """Resources that were used between marks, by phase, for each thing that was done in it."""

    def __init__(self, read: Read) -> None:
        self._read, self._last = read, read()
        self.used: dict[str, Counter[str]] = {}

    def mark(self, phase: str, things: int) -> None:
        """Books all that was used since the last mark."""
        now = self._read()
        booked = self.used.setdefault(phase, Counter())
        booked.update({name: now[name] - self._last[name] for name in now})
        booked["things"] += things
        self._last = now

    def each(self) -> dict[str, Measures]:
        """The use of each thing, by phase."""
        return {
            phase: {name: round(value / booked["things"], 6) for name, value in booked.items() if name != "things"}
            for phase, booked in self.used.items()
        }


class Devices:
    """Devices of one process, each with a connection of its own; they train nothing."""

    def __init__(self, address: str, run: str, count: int, update: Update, identities: Path | None) -> None:
        self.run, self.update = run, update
        self.calls: list[tuple[pb_grpc.FederationServiceStub, grpc.aio.Metadata]] = []
        self.sampled: asyncio.Queue[tuple[int, pb.TrainingTask]] = asyncio.Queue()
        self._channels = []
        for number in range(count):
            name = f"client-{number:03}"
            identity = Identity.load(identities / name) if identities else None
            alone = [("grpc.use_local_subchannel_pool", 1)]
            channel = open_channel(address, identity) if identity else grpc.aio.insecure_channel(address, alone)
            self._channels.append(channel)
            metadata = [(wire.INSTANCE_KEY, name.encode().hex().ljust(32, "0")[:32])]
            metadata += [] if identity else [(wire.CLIENT_KEY, name)]
            self.calls.append((pb_grpc.FederationServiceStub(channel), grpc.aio.Metadata(*metadata)))

    async def every(self, step: Callable[[int], Any], at_once: int = 100) -> None:
        """Lets all devices do something, so many at once."""
        turns = asyncio.Semaphore(at_once)

        async def one(number: int) -> None:
            async with turns:
                await step(number)

        await asyncio.gather(*(one(number) for number in range(len(self.calls))))

    async def register(self, number: int) -> None:
        """Registers a device."""
        stub, metadata = self.calls[number]
        hello = pb.RegisterRequest(
            min_protocol=PROTOCOL, max_protocol=PROTOCOL, role=pb.CLIENT_ROLE_TRAINER, run=self.run
        )
        await stub.Register(hello, metadata=metadata)

    async def accept(self, number: int) -> None:
        """Has a device accept the run."""
        stub, metadata = self.calls[number]
        await stub.AwaitRound(pb.AwaitRoundRequest(run=self.run), metadata=metadata)
        await stub.AnswerOffer(pb.AnswerOfferRequest(run=self.run, answer=pb.ANSWER_ACCEPTED), metadata=metadata)

    async def poll(self, number: int) -> pb.AwaitRoundResponse:
        """Has a device wait once."""
        stub, metadata = self.calls[number]
        return await stub.AwaitRound(pb.AwaitRoundRequest(run=self.run), metadata=metadata)

    async def wait(self, number: int) -> None:
        """Waits for tickets until the run is over."""
        while True:
            answer = await self.poll(number)
            if answer.HasField("training"):
                done = asyncio.Event()
                await self.sampled.put((number, answer.training))
                self.pushing[number] = done
                await done.wait()
            elif answer.idle.finished:
                return

    async def rounds(self, book: Book, sampled: int, count: int) -> None:
        """Holds rounds, each in three steps of all sampled devices together."""
        self.pushing: dict[int, asyncio.Event] = {}
        waiting = [asyncio.create_task(self.wait(number)) for number in range(len(self.calls))]
        for round_ in range(count):
            given = [await self.sampled.get() for _ in range(sampled)]
            book.mark("commit and sampling" if round_ else "first sampling", sampled)
            await asyncio.gather(*(pull(*self.calls[n], self.run, task.version) for n, task in given))
            book.mark("pull", sampled)
            await asyncio.gather(*(push(*self.calls[n], task.ticket, self.update) for n, task in given))
            book.mark("push", sampled)
            for number, _ in given:
                self.pushing.pop(number).set()
        await asyncio.gather(*waiting)

    async def close(self) -> None:
        """Closes all connections."""
        for channel in self._channels:
            await channel.close()


async def walk(
    address: str, operator: OperatorClient, run: str, chosen: Any, read: Read, identities: Path | None
) -> Any:
    """Lets devices join, wait and train; returns the use of each thing, and the memory of each that waits."""
    update = random_update(synthetic_spec("small"), 0)
    book = Book(read)
    devices = Devices(address, run, chosen.devices, update, identities)
    before = read().get("memory_bytes", 0.0)
    await devices.every(devices.register)
    book.mark("register", chosen.devices)
    await devices.every(devices.accept)
    book.mark("accept", chosen.devices)
    waits = asyncio.gather(*(devices.poll(number) for number in range(chosen.devices)))
    await asyncio.sleep(10)
    memory = (read().get("memory_bytes", 0.0) - before) / chosen.devices
    await waits
    book.mark("poll", chosen.devices)
    await operator.resume(run)
    await devices.rounds(book, chosen.sampled, chosen.rounds)
    await devices.close()
    found = book.each()
    for measures in found.values():
        measures.pop("memory_bytes", None)
    return {"each": found, **({"memory_each_bytes": round(memory)} if memory else {})}


def processor(chosen: Any) -> Any:
    """Measures a daemon in a process of its own."""
    with scratch() as folder, daemon(folder, tls=chosen.tls, open_files=4096) as server:
        if chosen.tls:
            server.enroll(folder, chosen.devices)
        run = create(server, synthetic_spec("small"), chosen.sampled, chosen.rounds)

        def read() -> Measures:
            return {"processor_s": processor_seconds(server.pid), "memory_bytes": resident_bytes(server.pid)}

        async def measured() -> Any:
            async with OperatorClient(server.address, server.identity) as operator:
                await operator.pause(run)
                identities = folder / "identities" if chosen.tls else None
                return await walk(server.address, operator, run, chosen, read, identities)

        return asyncio.run(measured())


@contextmanager
def s3(folder: Path, program: Path = MOTO) -> Iterator[tuple[str, Callable[[], Counter[str]]]]:
    """Runs moto's S3; gives the URL of a bucket, and what reads the requests so far, by method."""
    address, log = free_address(), folder / "s3.log"
    with log.open("wb") as out:
        child = subprocess.Popen([program, "-H", "127.0.0.1", "-p", address.rpartition(":")[2]], stdout=out, stderr=out)
    try:
        until = time.monotonic() + STARTED_S
        while b"Running on" not in log.read_bytes():
            if child.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"{program} does not start: {log.read_text()}")
            time.sleep(0.1)
        os.environ.update({**S3_KEYS, "AWS_ENDPOINT": f"http://{address}"})
        request = urllib.request.Request(f"http://{address}/bucket", method="PUT", headers={"Host": "s3.amazonaws.com"})
        urllib.request.urlopen(request, timeout=10).close()
        yield "s3://bucket", lambda: Counter(re.findall(r'"([A-Z]+) /', log.read_text()))
    finally:
        child.terminate()
        child.wait()


def counts(chosen: Any) -> Any:
    """Counts what a daemon in this process asks of its database and its bucket."""
    from fedpeft_server import app
    from fedpeft_server.settings import Settings
    from fedpeft_server.timing import TIMING

    async def counted(folder: Path, bucket: str, requests: Callable[[], Counter[str]]) -> Any:
        address = free_address()
        places = {"blobs": f"{bucket}/versions", "updates": f"{bucket}/updates", "database": chosen.database}
        settings = Settings.model_validate({"data_dir": folder / "data", "listen": address, "metrics": "", **places})
        async with app.serving(settings, TIMING) as parts:
            transactions, found = parts.store.db.transactions, Counter[str]()

            def statement(_c: Any, _cursor: Any, text: str, _p: Any, _x: Any, many: bool) -> None:
                found["statements"] += 1
                found["writes"] += text.lstrip().split(" ", 1)[0] in ("INSERT", "UPDATE", "DELETE")

            for engine in (transactions.engine, transactions.readers):
                event.listen(engine, "before_cursor_execute", statement)
            event.listen(transactions.engine, "commit", lambda _: found.update(commits=1))

            def read() -> Measures:
                by_method = requests()
                asked = {f"bucket_{method}": by_method[method] for method in ("PUT", "POST", "GET", "HEAD", "DELETE")}
                return {name: found[name] for name in ("statements", "writes", "commits")} | asked

            server = Daemon(0, address, "")
            run = await asyncio.to_thread(create, server, synthetic_spec("small"), chosen.sampled, chosen.rounds)
            async with OperatorClient(address) as operator:
                await operator.pause(run)
                result = await walk(address, operator, run, chosen, read, None)
            parts.stopping.set()
        return result

    with scratch() as folder, s3(folder) as (bucket, requests):
        return asyncio.run(counted(folder, bucket, requests))


def known(chosen: Any) -> Any:
    """Measures what a daemon keeps of devices that are away."""
    with scratch() as folder:
        address, url = free_address(), chosen.database or f"sqlite:///{folder / 'fedpeft.db'}"
        arguments = ["-m", "fedpeft_server", "--data-dir", str(folder / "data"), "--listen", address, "--metrics", ""]
        arguments += ["--max-clients", "10000000", "--database", url]
        with process(arguments, address, folder / "log"):
            run = create(Daemon(0, address, ""), synthetic_spec("small"), 8, 1)

        def used() -> tuple[int, float]:
            with process(arguments, address, folder / "log") as pid:
                time.sleep(SETTLE_S)
                return resident_bytes(pid), processor_seconds(pid)

        empty, began = used()
        _register(url, run, chosen.devices)
        memory, ended = used()
    return {
        "memory_each_bytes": round((memory - empty) / chosen.devices),
        "start_each_s": round((ended - began) / chosen.devices, 7),
    }


def _register(url: str, run: str, devices: int) -> None:
    """Writes devices that registered once and accepted a run."""
    from fedpeft_server.store.database import Database
    from fedpeft_server.store.rows import AnswerRow, ClientRow
    from fedpeft_server.timing import TIMING

    database = Database.open(url, TIMING)
    said = pb.Capabilities(software="0.1.0", device="NVIDIA Jetson Orin").SerializeToString()
    for first in range(0, devices, 1000):
        names = [f"device-{number:07}" for number in range(first, first + 1000)]
        database.see_clients([ClientRow(n, n.encode().hex()[:32], "trainer", said, 1.0, 1.0) for n in names])
        database.put_answers([AnswerRow(run, n, True, (), 100, 1.0) for n in names])
    database.close()


def pieces(chosen: Any) -> Any:
    """Measures parts of the core alone, in this process."""
    from fedpeft_server.daemons.presence import _seat
    from fedpeft_server.rpc.sessions import Sessions
    from fedpeft_server.runs.lobby import Lobby
    from fedpeft_server.store.notices.notices import Notice, Topic
    from fedpeft_server.store.rows import ClientRow
    from fedpeft_server.timing import TIMING

    names = [f"device-{number:07}" for number in range(chosen.devices)]
    rounds = parse_config(
        {
            "model": {"name": "x", "classes": ["a", "b"]},
            "peft": {"method": "bias"},
            "rounds": {"clients": chosen.sampled},
        }
    ).rounds
    began = time.process_time()
    waiting = frozenset(names)
    advance(Round("run-000000000001", 1), Waiting(waiting), rounds, 1.0)
    sampling = time.process_time() - began
    texts = list(Notice("0" * 12, Topic.SEATS, tuple([name, "", []] for name in names)).payloads())
    lobby = Lobby(lambda run: None, TIMING)
    began = time.process_time()
    for text in texts:
        notice = Notice.parse(text)
        assert notice is not None
        lobby.seat_elsewhere(notice.sender, map(_seat, notice.keys))
    seats = time.process_time() - began
    known = [ClientRow(name, "ab" * 16, "trainer", b"", 1.0, float(at)) for at, name in enumerate(names)]
    sessions = Sessions(known, len(known), TIMING)
    began = time.process_time()
    asyncio.run(sessions.silences(len(known) / 2, lobby.waits_elsewhere))
    counting = time.process_time() - began
    return {
        "sampling_each_waiting_s": round(sampling / chosen.devices, 9),
        "seat_each_s": round(seats / chosen.devices, 9),
        "count_each_s": round(counting / chosen.devices, 9),
        "notices_each": round(len(texts) / chosen.devices, 6),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("processor", "counts", "known", "pieces"))
    parser.add_argument("--devices", type=int, default=200)
    parser.add_argument("--sampled", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tls", action="store_true")
    parser.add_argument("--database", default="", help="SQLAlchemy URL; SQLite if absent")
    chosen = parser.parse_args()
    measure = {"processor": processor, "counts": counts, "known": known, "pieces": pieces}[chosen.what]
    found = measure(chosen)
    print(json.dumps({"machine": machine(), **vars(chosen), "found": found}, indent=1))


if __name__ == "__main__":
    main()
