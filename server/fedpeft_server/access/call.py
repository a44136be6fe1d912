"""One call in progress: who makes it, as its connection proves it, and what else is known of it by now."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from typing import Literal, Protocol

from fedpeft.errors import CertificateExpired, CertificateInvalid, FedpeftError, IdentityInvalid
from fedpeft.identity import certificates
from fedpeft.identity.subject import Role, Subject

Direction = Literal["up", "down"]
DIRECTIONS: tuple[Direction, ...] = ("up", "down")
Key = tuple[str, int, str]
"""(run, round number, client)."""
Properties = Mapping[str, Iterable[bytes]]
"""gRPC's description of a connection (`ServicerContext.auth_context`)."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Caller of a method.

    Attributes:
        subject: Subject of the certificate; None without one.
        plain: True if the connection is plain text, which a server takes if it needs no certificates.
        begins_at: Begin of the certificate's validity, seconds since the epoch.
        ends_at: End of it.
    """

    subject: Subject | None = None
    plain: bool = False
    begins_at: float = 0.0
    ends_at: float = 0.0

    def __str__(self) -> str:
        """Names it as the audit log does."""
        return str(self.subject) if self.subject else "local" if self.plain else "nobody"

    def check_time(self) -> None:
        """Checks that the certificate is still valid: a connection may outlive it.

        Raises:
            CertificateExpired: If it is not.
        """
        if self.subject and datetime.now(UTC).timestamp() > self.ends_at:
            end = datetime.fromtimestamp(self.ends_at, UTC)
            raise CertificateExpired(
                f"the certificate of {self.subject} ended at {end:%Y-%m-%d %H:%M} UTC; renew it, or enroll again with "
                "a new token"
            )


@dataclass(frozen=True, slots=True)
class Party:
    """The caller, or callers, whose calls a bound counts together.

    Attributes:
        role: Of the caller; None for a stranger.
        name: Its name within the role; the address of a stranger.
    """

    role: Role | None
    name: str

    @property
    def sees_places(self) -> bool:
        """True for who is told of folders, buckets and hosts of the server: who operates it, or looks on."""
        return self.role in (Role.OPERATOR, Role.VIEWER)

    def __str__(self) -> str:
        """Names it in a message to itself."""
        return f"{self.role} {self.name}" if self.role else f"a device at {self.name}"


NOBODY = Caller()
"""A connection without a certificate, to the port where devices enroll."""
LOCAL = Caller(plain=True)
STRANGER = Party(None, "")


def caller_of(connection: Properties) -> Caller:
    """Returns who a connection proves to be.

    Raises:
        CertificateInvalid: If its certificate, which the authority signed, names no role and name.
    """
    pem = next(iter(connection.get("x509_pem_cert", ())), b"")
    return _read(pem) if pem else NOBODY


@lru_cache(maxsize=8192)
def _read(pem: bytes) -> Caller:
    """Reads a certificate; kept, because a client brings the same one with every call."""
    try:
        certificate = certificates.parse(pem)[0]
        return Caller(
            certificates.subject(certificate),
            False,
            certificate.not_valid_before_utc.timestamp(),
            certificate.not_valid_after_utc.timestamp(),
        )
    except IdentityInvalid as error:
        raise CertificateInvalid(error.message) from None


class Bounding(Protocol):
    """Bounds a wait for the other side of a call."""

    def bounded(self, seconds: float) -> AbstractAsyncContextManager[None]:
        """Returns a block that ends with an error after so many seconds, or as soon as others come first."""


@dataclass
class Call:
    """One RPC in progress.

    Attributes:
        method: Its full name.
        caller: Identity of the caller, as the connection proves it.
        party: Party that the bounds on calls count it for.
        client: Its client id, once that is known.
        key: Run, round and client that its bytes belong to, once these are known.
        training: True if they are a trainer's.
        unbooked: Bytes before that was known.
        ended: Error with which the server ended it; None while it did not.
        slot: Bound of the wait for its client to read, if others may wait for its place.
        moved: Called when a message of it has passed.
    """

    method: str
    caller: Caller = NOBODY
    party: Party = STRANGER
    client: str = ""
    key: Key | None = None
    training: bool = True
    unbooked: dict[Direction, int] = field(default_factory=lambda: {"up": 0, "down": 0})
    ended: FedpeftError | None = None
    slot: Bounding | None = None
    moved: Callable[[], None] = lambda: None

    @property
    def short_name(self) -> str:
        """The method's name without its service."""
        return self.method.rpartition("/")[2]


CALL: ContextVar[Call] = ContextVar("call")


def actor() -> str:
    """Returns who makes the current call, as the audit log names it."""
    return str(CALL.get().caller)
