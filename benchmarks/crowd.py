"""A process of many clients that wait: some share a connection, few are ever sampled, and those push without training.

    crowd.py bare SERVER CLIENTS          each makes one AwaitRound call, with nothing before it
    crowd.py join SERVER CLIENTS RUN SPEC each registers, accepts the run, waits, and pushes when it is sampled

A line on standard input lets clients that are sampled push; until then they keep their tickets, as one that trains
does. A line on standard output says how many updates were pushed once the run is finished.
"""

from __future__ import annotations

import asyncio
import hashlib
import sys
from pathlib import Path

import grpc
from clients import Update, pull, push, random_update

from fedpeft import PROTOCOL
from fedpeft.rpc import wire
from fedpeft.rpc.channel import open_channel
from fedpeft.v1 import federation_service_pb2 as pb
from fedpeft.v1 import federation_service_pb2_grpc as pb_grpc
from fedpeft.v1 import tensor_pb2

SHARED_BY = 100
"""Clients of one connection; a server takes 128 calls of each at once."""
JOINING = 100
"""Clients that register at once: 10,000 sites do not start in the same instant."""


def name_of(number: int) -> tuple[str, grpc.aio.Metadata]:
    """A client's name, and the metadata of its calls."""
    name = f"client-{number:05}"
    instance = hashlib.sha256(name.encode()).hexdigest()[:32]
    return name, grpc.aio.Metadata((wire.CLIENT_KEY, name), (wire.INSTANCE_KEY, instance))


class Crowd:
    """The clients of one process, all for one run."""

    def __init__(self, run: str, update: Update) -> None:
        self.run, self.update = run, update
        self.pushed = 0
        self.go = asyncio.Event()
        self._joining = asyncio.Semaphore(JOINING)

    async def client(self, stub: pb_grpc.FederationServiceStub, number: int) -> None:
        """One client until the run is finished."""
        _, metadata = name_of(number)
        async with self._joining:
            hello = pb.RegisterRequest(
                min_protocol=PROTOCOL, max_protocol=PROTOCOL, role=pb.CLIENT_ROLE_TRAINER, run=self.run
            )
            await stub.Register(hello, metadata=metadata)
            await stub.AwaitRound(pb.AwaitRoundRequest(run=self.run), metadata=metadata)
            accepted = pb.AnswerOfferRequest(run=self.run, answer=pb.ANSWER_ACCEPTED)
            await stub.AnswerOffer(accepted, metadata=metadata)
        while True:
            answer = await stub.AwaitRound(pb.AwaitRoundRequest(run=self.run), metadata=metadata)
            if answer.HasField("training"):
                await self.go.wait()
                await pull(stub, metadata, self.run, answer.training.version)
                await push(stub, metadata, answer.training.ticket, self.update)
                self.pushed += 1
            elif answer.idle.finished:
                return

    async def listen(self) -> None:
        """Lets sampled clients push once a line comes."""
        await asyncio.to_thread(sys.stdin.readline)
        self.go.set()


async def join(server: str, count: int, run: str, update: Update) -> int:
    """All clients until the run is finished; returns the updates pushed."""
    crowd = Crowd(run, update)
    channels = [open_channel(server) for _ in range(0, count, SHARED_BY)]
    stubs = [pb_grpc.FederationServiceStub(channel) for channel in channels]
    async with asyncio.TaskGroup() as group:
        group.create_task(crowd.listen())
        for number in range(count):
            group.create_task(crowd.client(stubs[number // SHARED_BY], number))
    for channel in channels:
        await channel.close()
    return crowd.pushed


async def wait_bare(server: str, count: int) -> None:
    """All calls at once; none of them is answered before the server ends."""
    channels = [open_channel(server) for _ in range(0, count, SHARED_BY)]
    stubs = [pb_grpc.FederationServiceStub(channel) for channel in channels]
    calls = [
        stubs[number // SHARED_BY].AwaitRound(pb.AwaitRoundRequest(run="run"), metadata=name_of(number)[1])
        for number in range(count)
    ]
    await asyncio.gather(*calls, return_exceptions=True)


def main() -> None:
    match sys.argv[1:]:
        case ["bare", server, count]:
            asyncio.run(wait_bare(server, int(count)))
        case ["join", server, count, run, spec]:
            adapter = wire.spec_from_proto(tensor_pb2.AdapterSpec.FromString(Path(spec).read_bytes()))
            print(asyncio.run(join(server, int(count), run, random_update(adapter, 0))))
        case _:
            raise SystemExit(str(__doc__))


if __name__ == "__main__":
    main()
