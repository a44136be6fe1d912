"""A daemon over TLS in this process, and callers with any certificate."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
from cryptography import x509
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from fedpeft.identity import certificates, keys, requests
from fedpeft.identity.authority import Authority
from fedpeft.identity.folder import Identity
from fedpeft.identity.keys import PrivateKey
from fedpeft.identity.roles import TO_PROTO
from fedpeft.identity.subject import Role, Subject
from fedpeft.identity.token import EnrollmentToken
from fedpeft.rpc.status import from_rpc_error
from fedpeft.v1 import access_service_pb2 as access
from fedpeft.v1 import access_service_pb2_grpc as access_grpc
from fedpeft.v1 import federation_service_pb2 as fed
from fedpeft.v1 import operator_service_pb2 as op
from fedpeft_server.access.certificates import read_authority
from fedpeft_server.access.files import Files
from fedpeft_server.commands import init
from fedpeft_server.parts import Parts
from fedpeft_server.settings import Settings
from fedpeft_server.timing import TIMING, Timing

from .conftest import Daemon, RawClient, begin_life, config

HOUR = timedelta(hours=1)


SERVED = (access.DESCRIPTOR, fed.DESCRIPTOR, op.DESCRIPTOR, health_pb2.DESCRIPTOR, reflection_pb2.DESCRIPTOR)
METHODS = {
    f"/{service.full_name}/{method.name}": method
    for file in SERVED
    for service in file.services_by_name.values()
    for method in service.methods
}


class Federation:
    """A daemon with certificates, and its authority, which the tests have the key of."""

    def __init__(self, server: Parts, authority: Authority, operator: Identity, stack: AsyncExitStack) -> None:
        self.server = server
        self.authority = authority
        self.operator = operator
        self.address = f"127.0.0.1:{server.ports.port}"
        self.enrollment = server.ports.enroll_address
        self._stack = stack

    def certificate(
        self,
        role: Role,
        name: str,
        life: timedelta = HOUR,
        at: datetime | None = None,
        after: datetime | None = None,
    ) -> grpc.aio.Channel:
        """Returns a channel of somebody who was given a certificate without a token, as by an authority elsewhere."""
        key = keys.make()
        certificate = self.authority.issue(Subject(role, name), key.public_key(), life, at, after=after)
        return self.with_certificate(key, certificate)

    async def next_certificate(self, role: Role, name: str) -> grpc.aio.Channel:
        """Returns a channel with a certificate that begins after this moment, once it has begun."""
        channel = self.certificate(role, name, after=datetime.now(UTC))
        await asyncio.sleep(1.01 - time.time() % 1)
        return channel

    def with_certificate(self, key: PrivateKey, certificate: x509.Certificate) -> grpc.aio.Channel:
        root = certificates.to_pem(self.authority.certificate)
        return self._open(self.address, (root, keys.to_pem(key), certificates.to_pem(certificate)))

    def operators(self) -> grpc.aio.Channel:
        """Returns a channel of the operator that init made."""
        return self.with_certificate(self.operator.key, self.operator.certificate)

    def nobody(self) -> grpc.aio.Channel:
        """Returns a channel without a certificate, to the port for enrolment."""
        return self._open(self.enrollment, (certificates.to_pem(self.authority.certificate),))

    def access(self, channel: grpc.aio.Channel | None = None) -> access_grpc.AccessServiceAsyncStub:
        """Returns AccessService as a channel's owner sees it, the operator's by default."""
        return access_grpc.AccessServiceStub(
            channel or self.with_certificate(self.operator.key, self.operator.certificate)
        )

    async def token(self, name: str, role: Role = Role.CLIENT, life_s: int = 0) -> EnrollmentToken:
        request = access.CreateTokenRequest(name=name, role=TO_PROTO[role], life_s=life_s)
        return EnrollmentToken.decode((await self.access().CreateToken(request)).line)

    async def enroll(self, token: EnrollmentToken, key: PrivateKey | None = None) -> grpc.aio.Channel:
        """Enrolls with a token and returns the channel that the certificate opens."""
        key = key or keys.make()
        request = access.EnrollRequest(secret=token.secret, signing_request=requests.make(key))
        answer = await self.access(self.nobody()).Enroll(request)
        certificate = certificates.parse(answer.certificate)[0]
        # That of one who left a moment ago begins with the next second.
        await asyncio.sleep(max(0.0, certificate.not_valid_before_utc.timestamp() - time.time()))
        return self.with_certificate(key, certificate)

    async def revoke(self, role: Role, name: str, reason: str = "lost", *, unseen: bool = False) -> access.Identity:
        request = access.RevokeIdentityRequest(role=TO_PROTO[role], name=name, reason=reason, unseen=unseen)
        return (await self.access().RevokeIdentity(request)).identity

    async def restore(self, role: Role, name: str) -> access.Identity:
        request = access.RestoreIdentityRequest(role=TO_PROTO[role], name=name)
        return (await self.access().RestoreIdentity(request)).identity

    async def audit(self) -> list[access.AuditEntry]:
        return list((await self.access().ListAuditEntries(access.ListAuditEntriesRequest())).entries)

    def daemon(self, channel: grpc.aio.Channel) -> Daemon:
        """Returns what the other tests call a daemon, as a channel's owner sees it."""

        async def end() -> None:
            raise AssertionError("the federation ends with its test")

        return Daemon(self.server, channel, end)

    def _open(self, address: str, files: tuple[bytes, ...]) -> grpc.aio.Channel:
        channel = grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(*files))
        self._stack.push_async_callback(channel.close)
        return channel


@asynccontextmanager
async def federation(folder: Path, timing: Timing = TIMING, **settings: object) -> AsyncIterator[Federation]:
    """Starts a daemon over TLS on free ports; the same folder may be given again afterwards."""
    data, person = folder / "data", folder / "operator"
    init.main(["--data-dir", str(data), "--operator", "ada", "--operator-identity", str(person), "--port", "7070"])
    authority = read_authority(Files(data / "identity"))
    assert authority is not None
    async with AsyncExitStack() as stack:
        values = {"data_dir": data, "listen": "127.0.0.1:0", "metrics": "", "drain_s": 1.0}
        server, end = await begin_life(Settings.model_validate({**values, **settings}), timing)
        stack.push_async_callback(end)
        yield Federation(server, authority, Identity.load(person), stack)


async def outcome(channel: grpc.aio.Channel, name: str) -> str:
    """Makes a call with an empty message; returns the reason with which it is refused, or OK once an answer came."""
    method = METHODS[name]
    request: Message = method.input_type._concrete_class()
    coders = {"request_serializer": lambda m: m.SerializeToString(), "response_deserializer": bytes}

    async def one() -> AsyncIterator[Message]:
        yield request

    try:
        async with asyncio.timeout(5):
            if method.server_streaming and method.client_streaming:
                await channel.stream_stream(name, **coders)(one()).read()
            elif method.server_streaming:
                call = channel.unary_stream(name, **coders)(request)
                await call.read()
                call.cancel()
            elif method.client_streaming:
                await channel.stream_unary(name, **coders)(one())
            else:
                await channel.unary_unary(name, **coders)(request)
    except grpc.aio.AioRpcError as error:
        return from_rpc_error(error).reason
    return "OK"


async def held(secured: Federation, *names: str) -> tuple[str, dict[str, RawClient], dict[str, fed.TrainingTask]]:
    """Returns a run with a ticket for each of some clients."""
    operator = secured.daemon(secured.operators())
    run = await operator.create(config(rounds={"count": 1, "clients": len(names)}))
    clients = {name: RawClient(secured.certificate(Role.CLIENT, name), name) for name in names}
    for client in clients.values():
        await client.register()
    tasks = await asyncio.gather(*(client.task() for client in clients.values()))
    return run.id, clients, dict(zip(names, tasks, strict=True))
