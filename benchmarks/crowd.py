"""A process of many clients that wait: some share a connection, few are ever sampled, and those push without training.

    crowd.py bare SERVER CLIENTS          each makes one AwaitRound call, with nothing before it
    crowd.py join SERVER CLIENTS RUN SPEC each registers, accepts the run, waits, and pushes when it is sampled

A line on standard input lets clients that are sampled push; until then they keep their tickets, as one that trains
does. A line of JSON on standard output says what was pushed, and repeated, once the run is finished.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import grpc
from clients import PAUSE_S, Update, pull, push_on, random_update, stub_of

from fedpeft import PROTOCOL
from fedpeft.rpc import wire
from fedpeft.rpc.channel import open_channel
from fedpeft.v1 import federation_service_pb2 as pb
from fedpeft.v1 import federation_service_pb2_grpc as pb_grpc
from fedpeft.v1 import tensor_pb2

SHARED_BY = 50
"""Clients of one connection; a server takes 128 calls of each at once, those included that it has just answered."""
AWAY = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
"""Statuses of a call whose connection or stream failed."""
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
        self.repeated: Counter[str] = Counter()
        self.go = asyncio.Event()
        self._joining = asyncio.Semaphore(JOINING)

    async def client(self, stub: pb_grpc.FederationServiceStub, number: int) -> None:
        """One client until the run is finished."""
        _, metadata = name_of(number)
        async with self._joining:
            hello = pb.RegisterRequest(
                min_protocol=PROTOCOL, max_protocol=PROTOCOL, role=pb.CLIENT_ROLE_TRAINER, run=self.run
            )
            await self._ask(stub.Register, hello, metadata)
            await self._ask(stub.AwaitRound, pb.AwaitRoundRequest(run=self.run), metadata)
            accepted = pb.AnswerOfferRequest(run=self.run, answer=pb.ANSWER_ACCEPTED)
            await self._ask(stub.AnswerOffer, accepted, metadata)
        hold_s = 0
        while True:
            question = pb.AwaitRoundRequest(run=self.run, hold_s=hold_s)
            answer = await self._ask(stub.AwaitRound, question, metadata)
            hold_s = answer.idle.hold_s
            if answer.HasField("training"):
                await self.go.wait()
                await pull(stub, metadata, self.run, answer.training.version)
                await push_on(stub, metadata, answer.training.ticket, self.update)
                self.pushed += 1
            elif answer.idle.finished:
                return

    async def _ask(self, method: Any, request: Any, metadata: grpc.aio.Metadata) -> Any:
        """Makes a call, again where the connection failed, as a real client does; that is counted."""
        while True:
            try:
                return await method(request, metadata=metadata)
            except grpc.aio.AioRpcError as error:
                if error.code() not in AWAY:
                    raise
                self.repeated[error.code().name] += 1
            await asyncio.sleep(PAUSE_S)

    def listen(self) -> None:
        """Lets sampled clients push once a line comes."""
        asyncio.get_running_loop().remove_reader(sys.stdin)
        self.go.set()


async def join(server: str, count: int, run: str, update: Update) -> dict[str, Any]:
    """All clients until the run is finished; returns the updates pushed, and the calls that were repeated, by code."""
    crowd = Crowd(run, update)
    channels = [open_channel(server) for _ in range(0, count, SHARED_BY)]
    stubs = [stub_of(channel) for channel in channels]
    asyncio.get_running_loop().add_reader(sys.stdin, crowd.listen)  # no thread: it would outlive a failure
    async with asyncio.TaskGroup() as group:
        for number in range(count):
            group.create_task(crowd.client(stubs[number % len(stubs)], number))
    for channel in channels:
        await channel.close()
    return {"pushed": crowd.pushed, "repeated": dict(crowd.repeated)}


async def wait_bare(server: str, count: int) -> None:
    """All calls at once; none of them is answered before the server ends."""
    channels = [open_channel(server) for _ in range(0, count, SHARED_BY)]
    stubs = [stub_of(channel) for channel in channels]
    calls = [
        stubs[number % len(stubs)].AwaitRound(pb.AwaitRoundRequest(run="run"), metadata=name_of(number)[1])
        for number in range(count)
    ]
    await asyncio.gather(*calls, return_exceptions=True)


def main() -> None:
    match sys.argv[1:]:
        case ["bare", server, count]:
            asyncio.run(wait_bare(server, int(count)))
        case ["join", server, count, run, spec]:
            adapter = wire.spec_from_proto(tensor_pb2.AdapterSpec.FromString(Path(spec).read_bytes()))
            print(json.dumps(asyncio.run(join(server, int(count), run, random_update(adapter, 0)))))
        case _:
            raise SystemExit(str(__doc__))


if __name__ == "__main__":
    main()
