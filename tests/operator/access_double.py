"""A small AccessService that issues certificates, over real TLS sockets: one port for everybody, one to enroll."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import grpc

from fedpeft.errors import FedpeftError, TokenUnknown, TokenUsed
from fedpeft.identity import certificates, folder, keys, requests
from fedpeft.identity.authority import Authority
from fedpeft.identity.folder import Identity
from fedpeft.identity.subject import Role, Subject
from fedpeft.identity.token import EnrollmentToken, digest
from fedpeft.rpc.status import abort
from fedpeft.v1 import access_service_pb2 as pb
from fedpeft.v1 import access_service_pb2_grpc as pb_grpc

Context = grpc.aio.ServicerContext


@dataclass
class Double(pb_grpc.AccessServiceServicer):
    """Its state in memory; `failures` are raised first, in order."""

    authority: Authority = field(default_factory=lambda: Authority.make("a federation"))
    life: timedelta = timedelta(hours=1)
    server: str = ""
    enrollment: str = ""
    promised: dict[bytes, Subject] = field(default_factory=dict)
    used: dict[bytes, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    failures: list[FedpeftError] = field(default_factory=list)
    lose_answers: int = 0
    arrived_bytes: int = 0
    """Of requests to enroll."""

    def token(self, name: str = "noto", role: Role = Role.CLIENT) -> EnrollmentToken:
        made = EnrollmentToken.make(self.server, self.enrollment, self.authority.certificate)
        self.promised[made.digest] = Subject(role, name)
        return made

    def enrolled(self, where: Path, name: str = "noto", role: Role = Role.CLIENT) -> Identity:
        """Writes an identity folder without a call."""
        key = folder.take_key(where)
        chain = [self.authority.issue(Subject(role, name), key.public_key(), self.life)]
        folder.write(where, self.server, [self.authority.certificate], chain)
        return Identity.load(where)

    async def Enroll(self, request: pb.EnrollRequest, context: Context) -> pb.EnrollResponse:
        self.asked.append("Enroll")
        self.arrived_bytes += request.ByteSize()
        if self.failures:
            await abort(context, self.failures.pop(0))
        secret, key = digest(request.secret), requests.read(request.signing_request)
        if secret not in self.promised:
            await abort(context, TokenUnknown("no token has this secret; ask the operator for a new one"))
        if self.used.setdefault(secret, request.signing_request) and not same_key(self.used[secret], key):
            await abort(context, TokenUsed("another key was enrolled with this token"))
        certificate = self.authority.issue(self.promised[secret], key, self.life)
        if self.lose_answers:
            self.lose_answers -= 1
            await context.abort(grpc.StatusCode.CANCELLED, "the answer is lost")
        return pb.EnrollResponse(certificate=certificates.to_pem(certificate), server=self.server)

    async def Renew(self, request: pb.RenewRequest, context: Context) -> pb.RenewResponse:
        self.asked.append("Renew")
        if self.failures:
            await abort(context, self.failures.pop(0))
        subject = caller(context)
        certificate = self.authority.issue(subject, requests.read(request.signing_request), self.life)
        return pb.RenewResponse(certificate=certificates.to_pem(certificate))


def same_key(signing_request: bytes, key: requests.PublicKey) -> bool:
    return requests.read(signing_request) == key


def caller(context: Context) -> Subject:
    """The role and name that the certificate of a connection speaks for."""
    (pem,) = context.auth_context()["x509_pem_cert"]
    return certificates.subject(certificates.parse(pem)[0])


@asynccontextmanager
async def serving(double: Double, *more: Callable[[grpc.aio.Server], None]) -> AsyncIterator[Double]:
    """Serves on both ports, in the running loop; `more` adds other services to the one that demands certificates."""
    enrolling, server = grpc.aio.server(), grpc.aio.server()
    for add in more:
        add(server)
    for each, demands in ((enrolling, False), (server, True)):
        pb_grpc.add_AccessServiceServicer_to_server(double, each)
        port = each.add_secure_port("127.0.0.1:0", credentials(double.authority, demands=demands))
        address = f"127.0.0.1:{port}"
        double.enrollment, double.server = (double.enrollment, address) if demands else (address, double.server)
        await each.start()
    try:
        yield double
    finally:
        for each in (enrolling, server):
            await each.stop(None)


def credentials(authority: Authority, *, demands: bool) -> grpc.ServerCredentials:
    key = keys.make()
    own = certificates.to_pem(authority.issue_server(["127.0.0.1", "localhost"], key.public_key(), timedelta(days=1)))
    return grpc.ssl_server_credentials(
        [(keys.to_pem(key), own)],
        root_certificates=certificates.to_pem(authority.certificate) if demands else None,
        require_client_auth=demands,
    )
