"""Clients that do not train: they register, pull whatever version they are given, and push a seeded random update.

All run in one process, each with a connection of its own. They never say that they hold a version already, so each pull
is a whole one. What they pull is counted, not hashed: hashing is a real client's work on its own machine, and would
take the two cores away from the server that is measured.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
from collections.abc import Sequence
from pathlib import Path

import grpc
import numpy as np
from workload import CHUNK_BYTES

from fedpeft import PROTOCOL
from fedpeft.adapters import payload
from fedpeft.adapters.spec import AdapterSpec
from fedpeft.identity.folder import Identity
from fedpeft.rpc import chunk_messages, wire
from fedpeft.rpc.channel import open_channel
from fedpeft.v1 import federation_service_pb2 as pb
from fedpeft.v1 import federation_service_pb2_grpc as pb_grpc
from fedpeft.v1 import tensor_pb2

Update = tuple[tensor_pb2.Manifest, bytes]
PAUSE_S = 1.0
BUSY = (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.ABORTED, grpc.StatusCode.INTERNAL)
"""The server's own, and what gRPC makes of them when the call ends while a chunk is being written."""
DISTINCT = 2
"""Different updates; more clients share them, so that this process stays small."""


def random_update(spec: AdapterSpec, seed: int) -> Update:
    """A dense float32 update of small normal values, with its manifest."""
    rng = np.random.default_rng(seed)
    tensors = {t.name: rng.standard_normal(t.shape, np.float32) * np.float32(1e-3) for t in spec.sent(1)}
    manifest, data = payload.encode(tensors, spec.sent(1), "float32")
    return wire.manifest_to_proto(manifest), data


def stub_of(channel: grpc.aio.Channel) -> pb_grpc.FederationServiceStub:
    """Returns the calls of a channel; an upload takes chunks as the agent sends them, as bytes of whole messages."""
    stub = pb_grpc.FederationServiceStub(channel)

    def serialize(message: pb.PushUpdateRequest | bytes) -> bytes:
        return message if isinstance(message, bytes) else message.SerializeToString()

    answer = pb.PushUpdateResponse.FromString
    stub.PushUpdate = channel.stream_unary("/fedpeft.v1.FederationService/PushUpdate", serialize, answer)
    return stub


async def push_on(
    stub: pb_grpc.FederationServiceStub, metadata: grpc.aio.Metadata, ticket: str, update: Update
) -> None:
    """Pushes until there is a receipt; a server that is busy is asked again, as a real client does."""
    offset = 0
    while True:
        try:
            await upload(stub, metadata, ticket, update, offset)
            return
        except grpc.aio.AioRpcError as error:
            if error.code() not in BUSY:
                raise
        await asyncio.sleep(PAUSE_S)
        question = pb.GetUploadRequest(ticket=ticket, sha256=update[0].sha256)
        offset = (await stub.GetUpload(question, metadata=metadata)).committed_bytes


async def push(
    server: str, identity: Identity | None, metadata: grpc.aio.Metadata, ticket: str, update: Update
) -> None:
    """Pushes an update, on a connection of its own as the agent does."""
    async with open_channel(server, identity) as channel:
        await push_on(stub_of(channel), metadata, ticket, update)


async def upload(
    stub: pb_grpc.FederationServiceStub, metadata: grpc.aio.Metadata, ticket: str, update: Update, start: int
) -> None:
    manifest, data = update
    call = stub.PushUpdate(metadata=metadata)
    header = pb.UpdateHeader(ticket=ticket, manifest=manifest, examples=100, metrics={"loss": 1.0})
    await call.write(pb.PushUpdateRequest(header=header))
    await call.initial_metadata()
    try:
        for offset in range(start, len(data), CHUNK_BYTES):
            await call.write(chunk_messages.write(offset, data[offset : offset + CHUNK_BYTES]))
        await call.done_writing()
    except asyncio.InvalidStateError:
        pass  # the server answered before the last chunk; what it said comes from the call itself
    await call


async def pull(stub: pb_grpc.FederationServiceStub, metadata: grpc.aio.Metadata, run: str, version: int) -> None:
    """Pulls a version; a server that is busy is asked again, for what is missing."""
    expected = got = 0
    while True:
        request = pb.PullAdapterRequest(run=run, version=version, offset=got)
        try:
            async for message in stub.PullAdapter(request, metadata=metadata):
                if message.HasField("header"):
                    expected = message.header.manifest.payload_bytes
                else:
                    got += len(message.chunk.data)
            break
        except grpc.aio.AioRpcError as error:
            if error.code() not in BUSY:
                raise
        await asyncio.sleep(PAUSE_S)
    if got != expected:
        raise RuntimeError(f"version {version} has {expected} bytes; {got} came")


async def client(server: str, run: str, name: str, update: Update, identities: Path | None) -> int:
    """One client until the run is finished, over TLS if it has an identity; returns the updates it pushed."""
    identity = Identity.load(identities / name) if identities else None
    instance = hashlib.sha256(name.encode()).hexdigest()[:32]
    metadata = grpc.aio.Metadata((wire.CLIENT_KEY, name), (wire.INSTANCE_KEY, instance))
    pushed = 0
    async with open_channel(server, identity) as channel:
        stub = pb_grpc.FederationServiceStub(channel)
        hello = pb.RegisterRequest(min_protocol=PROTOCOL, max_protocol=PROTOCOL, role=pb.CLIENT_ROLE_TRAINER, run=run)
        await stub.Register(hello, metadata=metadata)
        while True:
            answer = await stub.AwaitRound(pb.AwaitRoundRequest(run=run), metadata=metadata)
            if answer.HasField("offer"):
                accepted = pb.AnswerOfferRequest(run=answer.offer.run.id, answer=pb.ANSWER_ACCEPTED)
                await stub.AnswerOffer(accepted, metadata=metadata)
            elif answer.HasField("training"):
                await pull(stub, metadata, run, answer.training.version)
                await push(server, identity, metadata, answer.training.ticket, update)
                pushed += 1
            elif answer.idle.finished:
                return pushed


async def federation(
    server: str, run: str, count: int, updates: Sequence[Update], identities: Path | None = None
) -> int:
    """All clients until the run is finished; returns the updates pushed."""
    names = [f"client-{i:03}" for i in range(count)]
    pushed = await asyncio.gather(
        *(client(server, run, n, updates[i % len(updates)], identities) for i, n in enumerate(names))
    )
    return sum(pushed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--server", required=True)
    parser.add_argument("--run", required=True)
    parser.add_argument("--clients", type=int, required=True)
    parser.add_argument(
        "--spec", type=Path, required=True, help="the adapter spec, a serialized fedpeft.v1.AdapterSpec"
    )
    parser.add_argument("--identities", type=Path, help="folder with an identity folder for each client: speak TLS")
    chosen = parser.parse_args()
    spec = wire.spec_from_proto(tensor_pb2.AdapterSpec.FromString(chosen.spec.read_bytes()))
    updates = [random_update(spec, seed) for seed in range(min(DISTINCT, chosen.clients))]
    print(asyncio.run(federation(chosen.server, chosen.run, chosen.clients, updates, chosen.identities)))


if __name__ == "__main__":
    main()
