"""Checks that the server is reached, and serves."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from datetime import UTC, datetime

import grpc

from fedpeft import PROTOCOL
from fedpeft.errors import IdentityInvalid
from fedpeft.identity.folder import Identity
from fedpeft.process.addresses import Address
from fedpeft.rpc import grpc_core
from fedpeft.rpc.channel import open_channel
from fedpeft.rpc.diagnosis import Trust, diagnose
from fedpeft.rpc.server_info import ServerInfo, parse
from fedpeft_operator.doctor.findings import Finding, Setup, fault, ok, warning

ANSWER_S = 5.0
SKEW_S = 120.0
"""Clocks that are farther apart are said to be."""
_HEALTH = "/grpc.health.v1.Health/Check"
_SERVING = b"\x08\x01"
"""HealthCheckResponse{status: SERVING}, whose module only the server needs to have installed."""


def called(setup: Setup) -> tuple[str, Identity | None] | None:
    """Returns the server that is called, and with which identity; None if there is none that can be called.

    Raises:
        ValueError: If the server's address is not HOST:PORT.
    """
    try:
        folder = setup.identity_folder
        identity = None if folder is None else Identity.load(folder)
    except IdentityInvalid:
        return None  # said where the identity is looked at
    server = setup.server or (identity.server if identity else None)
    if server is None or (identity and identity.certificate.not_valid_after_utc < datetime.now(UTC)):  # likewise
        return None
    Address.parse(server)
    return server, identity


def check_network(setup: Setup) -> Iterator[Finding]:
    """Makes a connection as a command or a client would, and asks whether the server is well, and what time it has."""
    if (called_so := called(setup)) is None:
        return
    server, identity = called_so
    found = diagnose(server, Trust.of(identity) if identity else None)
    if found is not None:
        sentence, _, cure = str(found).partition(": ")
        yield fault("server", sentence, cure)
        return
    kind = "TLS 1.3, and it takes this certificate" if identity else "plain text"
    yield ok("server", f"{server} is reached over {kind}")
    if identity is None and not Address.parse(server).is_loopback:
        yield warning("server", "plain text: anyone on the path can read and change what is sent", "enroll")
    grpc_core.configure()
    yield from asyncio.run(_health(server, identity))


async def _health(server: str, identity: Identity | None) -> list[Finding]:
    async with open_channel(server, identity) as channel:
        ask = channel.unary_unary(_HEALTH, request_serializer=bytes, response_deserializer=bytes)
        call = ask(b"", timeout=ANSWER_S)
        try:
            answer = await call
        except grpc.aio.AioRpcError as error:
            return [fault("server", f"refuses the call: {error.details()}", "ask its operator, who has the audit log")]
        server_info, here = parse(await call.trailing_metadata()), time.time()
    if answer != _SERVING:
        return [warning("server", "it says that it is not serving", "it is starting or stopping: look again soon")]
    return [ok("server", "it is serving"), *_compared(server_info, here)]


def _compared(server_info: ServerInfo | None, here: float) -> Iterator[Finding]:
    """Holds what a server says of itself against this side."""
    same = "install the same version of fedpeft on both sides"
    if server_info is None:
        yield warning("protocol", "the server does not say which protocol it speaks: it is older", same)
        return
    agrees = True
    if server_info.protocol != PROTOCOL:
        agrees = False
        yield fault("protocol", f"the server speaks protocol {server_info.protocol}, fedpeft here {PROTOCOL}", same)
    ahead = server_info.clock - here
    if abs(ahead) > SKEW_S:
        agrees = False
        how = "ahead of" if ahead > 0 else "behind"
        yield warning(
            "clock",
            f"the server's clock is {abs(ahead) / 60:.0f} minutes {how} the one here",
            "set the one that is wrong (timedatectl): certificates begin and end by the clock",
        )
    if agrees:
        yield ok("server", f"it speaks protocol {PROTOCOL}, and its clock agrees with the one here")
