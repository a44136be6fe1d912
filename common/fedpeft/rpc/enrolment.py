"""Enrolment and renewal, the calling side: a key made here, a certificate for it from the server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from shutil import rmtree

import grpc
from cryptography import x509

from fedpeft.errors import IdentityInvalid, Internal, ServerUnreachable, Unavailable
from fedpeft.identity import certificates, folder, keys, lock, requests
from fedpeft.identity.folder import Identity
from fedpeft.identity.keys import PrivateKey
from fedpeft.identity.token import EnrollmentToken
from fedpeft.process import durable
from fedpeft.process.addresses import Address
from fedpeft.rpc import diagnosis
from fedpeft.rpc.channel import NO_RETRIES, open_unnamed
from fedpeft.rpc.diagnosis import Trust
from fedpeft.rpc.status import from_rpc_error
from fedpeft.v1 import access_service_pb2 as pb
from fedpeft.v1 import access_service_pb2_grpc as pb_grpc

ANSWER_S = 15.0
"""Longest wait for an answer."""
ATTEMPTS = 3
MOST_AUTHORITIES = 8
"""Authorities that a server may want trusted."""
PAUSE_S = 0.5
"""Pause before the second attempt; doubled before the third."""

Around = Callable[[pb.EnrollRequest], AbstractContextManager[object]]


async def enroll(
    token: EnrollmentToken, into: Path, *, replace: bool = False, around: Around = nullcontext
) -> Identity:
    """Gets a certificate for a token and writes an identity folder.

    May be repeated after whatever broke it: the key that was made stays, so the token still works.

    Args:
        token: The operator's token.
        into: The folder.
        replace: True to replace an identity that is enrolled there, by one with a new key.
        around: Context around every sending of the request, for example an entry in a ledger.

    Raises:
        IdentityInvalid: If somebody is enrolled there already.
        Unauthenticated: If the server does not take the token.
        ServerUnreachable: With the reason.
        StateInvalid: If the folder cannot be written.
    """
    if folder.exists(into) and not replace:
        raise IdentityInvalid(f"{into} is enrolled already, {described(into)}; --replace enrolls it anew")
    aside = into.with_name(f"{into.name}.next") if folder.exists(into) else into
    if aside != into:
        _set_aside(aside, token)
    key = folder.take_key(aside)
    answer = await _ask(token, key, around)
    chain = _checked(answer.certificate, key)
    trusted = _trusted(answer.authority) or [token.authority]
    server = _address(answer.server or token.server)
    async with lock.held(into, ANSWER_S):
        if aside != into:
            with durable.refusals(f"writing {into}"):
                durable.write(folder.key_path(into), keys.to_pem(key))
        folder.write(into, server, trusted, chain)
    if aside != into:
        rmtree(aside)
    return Identity.load(into)


async def renewed(identity: Identity, renew: Callable[[pb.RenewRequest], Awaitable[pb.RenewResponse]]) -> Identity:
    """Returns an identity with the next certificate for its key, once it is written, by this process or another.

    Args:
        identity: Identity of the caller.
        renew: Makes the call, with that identity.

    Raises:
        FedpeftError: What the call raises; StateInvalid if another process holds the folder, or the certificate cannot
            be written; IdentityInvalid if the folder has another key by now.
    """
    async with lock.held(identity.folder, ANSWER_S):
        if (found := folder.successor(identity, datetime.now(UTC))) is not None:
            return found
        _check_key(identity)
        answer = await renew(pb.RenewRequest(signing_request=requests.make(identity.key)))
        chain = _checked(answer.certificate, identity.key)
        if certificates.subject(chain[0]) != identity.subject:
            raise Internal(f"the server renewed the certificate of {identity.subject} for another; nothing was written")
        folder.renew(identity.folder, _trusted(answer.authority), chain)
        return Identity.load(identity.folder)


def _trusted(pem: bytes) -> list[x509.Certificate]:
    """Returns the authorities that the server wants trusted from now on; none from one that does not say.

    Raises:
        Internal: If they cannot be used; the server is at fault.
    """
    if not pem:
        return []
    try:
        found = certificates.parse(pem)
    except IdentityInvalid as error:
        raise Internal(f"the server sent authorities that cannot be used: {error.message}") from None
    if len(found) > MOST_AUTHORITIES or not all(map(certificates.may_sign, found)):
        raise Internal(
            f"the server sent {len(found)} certificates to trust; 1 to {MOST_AUTHORITIES} authorities are taken, and "
            "each must be allowed to sign others"
        )
    return found


def _check_key(identity: Identity) -> None:
    """Checks that a certificate for the key of an identity belongs into its folder."""
    path = folder.key_path(identity.folder)
    if keys.load(path).public_key() != identity.key.public_key():
        raise IdentityInvalid(
            f"{path} is another key by now, and the certificate in use is not for it; put the old key back, or start "
            "anew with what is there"
        )


def described(where: Path) -> str:
    """Says who is enrolled in a folder and until when, or why that cannot be told."""
    try:
        certificate = certificates.load(folder.certificate_path(where))[0]
        end = certificate.not_valid_after_utc
        return f"as {certificates.subject(certificate)} until {end:%Y-%m-%d %H:%M} UTC"
    except IdentityInvalid as error:
        return f"though not in a way that can be used ({error.message})"


def _set_aside(aside: Path, token: EnrollmentToken) -> None:
    """Makes a folder for the next key, or leaves that of an attempt with the same token: the server may know its key.

    Raises:
        StateInvalid: If it cannot be written.
    """
    noted, wanted = aside / "token.sha256", f"{token.digest.hex()}\n".encode()
    with durable.refusals(f"writing {aside}"):
        if aside.exists() and not (noted.exists() and noted.read_bytes() == wanted):
            rmtree(aside)
        aside.mkdir(mode=0o700, exist_ok=True)
        durable.write(noted, wanted)


async def _ask(token: EnrollmentToken, key: PrivateKey, around: Around) -> pb.EnrollResponse:
    request = pb.EnrollRequest(
        secret=token.secret, signing_request=requests.make(key), software=f"fedpeft {version('fedpeft')}"
    )
    async with open_unnamed(_address(token.enrollment), [token.authority], [NO_RETRIES]) as channel:
        stub = pb_grpc.AccessServiceStub(channel)
        pause_s, begun = PAUSE_S, time.monotonic()
        for left in reversed(range(ATTEMPTS)):
            try:
                with around(request):
                    return await _attempt(stub, request, token.enrollment)
            except Unavailable as error:
                fault = error
            if not left or time.monotonic() - begun > ANSWER_S / 2:  # silence is not asked again
                break
            await asyncio.sleep(pause_s)
            pause_s *= 2
    if isinstance(fault, ServerUnreachable):
        found = await diagnosis.explain(token.enrollment, Trust((token.authority,)))
        raise ServerUnreachable(str(found or fault))
    raise fault


async def _attempt(stub: pb_grpc.AccessServiceStub, request: pb.EnrollRequest, where: str) -> pb.EnrollResponse:
    try:
        return await stub.Enroll(request, timeout=ANSWER_S)
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            raise ServerUnreachable(f"{where} did not answer in time") from None
        raise from_rpc_error(error) from None


def _address(text: str) -> str:
    try:
        return str(Address.parse(text))
    except ValueError as error:
        raise IdentityInvalid(f"the enrolment token or the server gives an invalid address: {error}") from None


def _checked(pem: bytes, key: PrivateKey) -> list[x509.Certificate]:
    """Returns the certificates that the server sent, the first of which is for the key and valid now.

    Raises:
        Internal: If they are not; the server is at fault.
        IdentityInvalid: If the clock here is wrong.
    """
    try:
        chain = certificates.parse(pem)
        certificates.subject(chain[0])
    except IdentityInvalid as error:
        raise Internal(f"the server sent a certificate that cannot be used: {error.message}") from None
    if chain[0].public_key() != key.public_key():
        raise Internal("the server sent a certificate for another key; nothing was written")
    certificates.check_time(chain[0], datetime.now(UTC))
    return chain
