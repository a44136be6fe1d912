"""Whether the server is reached, and serves."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import grpc

from fedpeft import grpc_core
from fedpeft.addresses import Address
from fedpeft.connection import open_channel
from fedpeft.doctor.findings import Finding, Setup, fault, ok, warning
from fedpeft.identity.diagnosis import Trust, diagnose
from fedpeft.identity.folder import Identity

ANSWER_S = 5.0
_HEALTH = "/grpc.health.v1.Health/Check"
_SERVING = b"\x08\x01"
"""HealthCheckResponse{status: SERVING}, whose module only the server needs to have installed."""


def check_network(setup: Setup) -> Iterator[Finding]:
    """Makes a connection as a command or a client would, and asks whether the server is well."""
    folder = setup.identity_folder
    identity = None if folder is None else Identity.load(folder)
    server = setup.server or (identity.server if identity else None)
    if server is None:
        return
    Address.parse(server)
    found = diagnose(server, Trust.of(identity) if identity else None)
    if found is not None:
        sentence, _, cure = str(found).partition(": ")
        yield fault("server", sentence, cure)
        return
    kind = "TLS 1.3, and it takes this certificate" if identity else "plain text"
    yield ok("server", f"{server} is reached over {kind}")
    if identity is None and not Address.parse(server).is_loopback:
        yield warning("server", "plain text: everybody on the way can read and change what is sent", "enroll")
    grpc_core.configure()
    yield asyncio.run(_health(server, identity))


async def _health(server: str, identity: Identity | None) -> Finding:
    async with open_channel(server, identity) as channel:
        try:
            ask = channel.unary_unary(_HEALTH, request_serializer=bytes, response_deserializer=bytes)
            answer = await ask(b"", timeout=ANSWER_S)
        except grpc.aio.AioRpcError as error:
            return fault("server", f"refuses the call: {error.details()}", "ask its operator, who has the audit log")
    if answer == _SERVING:
        return ok("server", "it is serving")
    return warning("server", "it says that it is not serving", "it is starting or stopping: look again in a moment")
