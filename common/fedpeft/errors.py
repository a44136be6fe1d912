"""Every error that FedPEFT raises on purpose, in one tree.

    FedpeftError
    ├── InvalidArgument       the caller sent something wrong; the same call will fail again
    │   ├── ConfigInvalid         a run file or flag
    │   ├── SpecInvalid           an adapter spec
    │   ├── ManifestInvalid       the description of a payload
    │   ├── ExamplesInvalid       the number of examples of an update
    │   ├── ChunkInvalid          a piece of a payload
    │   ├── UploadIncomplete      the stream of an upload ended before its payload
    │   ├── DigestInvalid         a digest that has not 32 bytes
    │   ├── PayloadInvalid        the bytes of a payload
    │   ├── MetricsInvalid        evaluation or training figures
    │   ├── AnswerInvalid         an answer to the offer of a run
    │   ├── CapabilitiesInvalid   what a client says of itself
    │   ├── PageInvalid           the page of a list
    │   ├── RunsInvalid           the runs that a client asks about
    │   ├── MessageInvalid        bytes that are no message of the call
    │   ├── SubjectInvalid        whom a token enrols, or who is revoked
    │   └── SigningRequestInvalid what a device sends for a certificate
    ├── OutOfRange
    │   └── OffsetOutOfRange      an upload or download continued at the wrong byte
    ├── NotFound
    │   ├── RunNotFound
    │   ├── VersionNotFound
    │   ├── TicketNotFound
    │   ├── ClientNotFound
    │   ├── TokenNotFound
    │   └── IdentityNotFound
    ├── AlreadyExists
    │   ├── ClientIdInUse         a second live client of the same id
    │   ├── UpdateDiffers         another update was received for the ticket
    │   ├── RequestIdReused       CreateRun was repeated with another run
    │   └── NameInUse             a name is enrolled in another role of the same ids
    ├── FailedPrecondition    the state does not allow it now
    │   ├── ProtocolMismatch
    │   ├── NotRegistered
    │   ├── ClientMoved           a copy of the client's state has gone on elsewhere
    │   ├── RoundClosed           the update came too late; it goes into the residual
    │   ├── TicketClosed          the ticket was withdrawn or refused
    │   ├── UpdateExcluded        the update was received and not folded; it goes into the residual
    │   ├── RunFinished
    │   ├── RunNotFinished
    │   ├── NoAuthority           the server cannot issue certificates
    │   └── SelfRevocation        an operator would revoke itself
    ├── PermissionDenied
    │   ├── TicketOfAnother
    │   ├── NotAnEvaluator        a client that trains sends figures of a version
    │   └── RoleMayNot            the certificate's role has no right to the call
    ├── Unauthenticated
    │   ├── ClientIdInvalid
    │   ├── CertificateMissing
    │   ├── CertificateInvalid    it names no role and name
    │   ├── CertificateExpired
    │   ├── CertificateRevoked
    │   ├── TokenUnknown          an enrolment token that was never made, or was deleted
    │   ├── TokenExpired
    │   └── TokenUsed             by another key
    ├── ResourceExhausted
    │   ├── UpdateTooLarge
    │   ├── MessageTooLarge       a message has more bytes or fields than its call takes
    │   ├── TransfersBusy
    │   ├── TooManyClients
    │   ├── TooManyCalls          one caller makes too many, at once or in time
    │   ├── TooManyCertificates   one name was given too many in too short a time
    │   ├── AnswerTooLarge        what was asked for does not fit into one message
    │   └── DiskFull
    ├── Aborted               nothing is wrong; ask where it stands and go on
    │   ├── TurnOver              others wait for a transfer's turn
    │   └── BeingChecked          an upload is whole, and being checked and made durable
    ├── DataLoss
    │   ├── ChecksumMismatch
    │   └── BlobCorrupt
    ├── Unavailable           the only family worth retrying as it is
    │   ├── Draining
    │   ├── DatabaseLocked        another program holds a lock on the server's database
    │   ├── TransferStalled       nothing arrived for too long
    │   └── ServerUnreachable
    ├── Internal              a fault of the server
    └── LocalError            never crosses the network
        ├── SettingsInvalid       a flag, an environment variable, a settings file
        ├── DataInvalid           a data set
        ├── ModelInvalid          a model or its weights
        ├── BackboneMismatch      the frozen tensors differ from the run's
        ├── StateInvalid          a state or data directory
        ├── IdentityInvalid       a key, a certificate, an enrolment token
        ├── AuditBroken           an audit log was changed
        ├── TrainingFailed        local training ended without an update
        └── RefusedByPolicy       a server asks for more than the policy of this site allows

A class knows its gRPC status and its `ErrorInfo.reason`; `fedpeft.status` carries both across the network and back.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import ClassVar, Self


class FedpeftError(Exception):
    """An error with one sentence that says what is wrong, where, and what would be right.

    Attributes:
        message: The sentence.
        fields: Field-level faults as (path, description), for example ("rounds.count", "must be at least 1").
    """

    status: ClassVar[str] = "UNKNOWN"
    """Name of the gRPC status code."""

    reason: ClassVar[str] = "UNKNOWN"
    """`ErrorInfo.reason`: the class name in upper case with underscores."""

    retry_s: float | None = None
    """`RetryInfo.retry_delay` in seconds: nothing failed, the caller goes on after this pause; None: no such hint."""

    def __init__(self, message: str, fields: tuple[tuple[str, str], ...] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.fields = fields

    def within(self, path: str) -> Self:
        """Returns this error with its fields moved below `path`: a part of a request need not know where it lies."""
        self.fields = tuple((f"{path}.{field}", text) for field, text in self.fields)
        return self

    @property
    def in_short(self) -> str:
        """The fault alone, without the cure that stands behind a semicolon; for a line with little room."""
        return self.message.partition(";")[0]

    def __init_subclass__(cls) -> None:
        cls.reason = re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).upper()


def tree(root: type[FedpeftError] = FedpeftError) -> Iterator[type[FedpeftError]]:
    """Yields `root` and every class below it, depth first."""
    yield root
    for child in root.__subclasses__():
        yield from tree(child)


def of_reason(reason: str, otherwise: type[FedpeftError]) -> type[FedpeftError]:
    """Returns the class of a reason, or another one if no class has it."""
    return next((cls for cls in tree() if cls.reason == reason), otherwise)


class InvalidArgument(FedpeftError):
    """The caller sent something wrong."""

    status = "INVALID_ARGUMENT"


class ConfigInvalid(InvalidArgument):
    """A run file, or the configuration sent with CreateRun, breaks a rule."""


class SpecInvalid(InvalidArgument):
    """An adapter spec is empty, unsorted, over a limit, or names a dtype or role there is not."""


class ManifestInvalid(InvalidArgument):
    """A manifest does not fit the adapter spec."""


class ExamplesInvalid(InvalidArgument):
    """An update claims no example, or more than one may claim."""


class ChunkInvalid(InvalidArgument):
    """A chunk is empty, over 1 MiB, beyond the payload's end, or where the header belongs."""


class UploadIncomplete(InvalidArgument):
    """The caller ended the stream of an upload before the whole payload was sent."""


class DigestInvalid(InvalidArgument):
    """A SHA-256 digest in a request is neither absent nor 32 bytes long."""


class PayloadInvalid(InvalidArgument):
    """The bytes of a payload do not decode to finite values."""


class MetricsInvalid(InvalidArgument):
    """Figures are missing, not finite, out of range, too many, or badly named."""


class AnswerInvalid(InvalidArgument):
    """An answer to the offer of a run neither accepts nor declines, or declines without a reason."""


class CapabilitiesInvalid(InvalidArgument):
    """A client says more of itself than is kept, or not which role it has."""


class PageInvalid(InvalidArgument):
    """The size of a page is negative, or its token is not one of this list."""


class MessageInvalid(InvalidArgument):
    """The bytes of a request are not the message that the call takes, or there is none."""


class RunsInvalid(InvalidArgument):
    """A client asks about more runs than one call may name."""


class SubjectInvalid(InvalidArgument):
    """The name, the role or the life in a request for an enrolment token or a revocation."""


class SigningRequestInvalid(InvalidArgument):
    """A signing request is malformed, wrongly signed, or its key is not on P-256."""


class OutOfRange(FedpeftError):
    """A position beyond what exists."""

    status = "OUT_OF_RANGE"


class OffsetOutOfRange(OutOfRange):
    """A transfer was continued at a byte where it does not stand."""


class NotFound(FedpeftError):
    """Something named does not exist."""

    status = "NOT_FOUND"


class RunNotFound(NotFound):
    """No run of that id."""


class VersionNotFound(NotFound):
    """The run has no such adapter version."""


class TicketNotFound(NotFound):
    """No ticket of that id."""


class ClientNotFound(NotFound):
    """No client of this id ever registered."""


class TokenNotFound(NotFound):
    """No enrolment token of that id."""


class IdentityNotFound(NotFound):
    """Nobody of that role and name was enrolled or has called."""


class AlreadyExists(FedpeftError):
    """Something exists already and differs."""

    status = "ALREADY_EXISTS"


class ClientIdInUse(AlreadyExists):
    """Another live instance holds this client id."""


class UpdateDiffers(AlreadyExists):
    """Another update was already received for the ticket."""


class RequestIdReused(AlreadyExists):
    """CreateRun was repeated under one request id with another run."""


class NameInUse(AlreadyExists):
    """A client and an evaluator cannot share a name, for it is their id."""


class FailedPrecondition(FedpeftError):
    """The state does not allow the call."""

    status = "FAILED_PRECONDITION"


class ProtocolMismatch(FailedPrecondition):
    """Client and server speak no common protocol version."""


class NotRegistered(FailedPrecondition):
    """The client did not call Register."""


class ClientMoved(FailedPrecondition):
    """A copy of the client's state has gone on elsewhere, and this one was left behind."""


class RoundClosed(FailedPrecondition):
    """The update came after its round had closed."""


class TicketClosed(FailedPrecondition):
    """The ticket was withdrawn, or its update was refused."""


class UpdateExcluded(FailedPrecondition):
    """The update was received, and was not folded when its round closed."""


class RunFinished(FailedPrecondition):
    """The run is completed or stopped."""


class RunNotFinished(FailedPrecondition):
    """The run is neither completed nor stopped."""


class NoAuthority(FailedPrecondition):
    """The server has no key to sign certificates with."""


class SelfRevocation(FailedPrecondition):
    """An operator asks to revoke the identity that it asks with."""


class PermissionDenied(FedpeftError):
    """The caller may not do this."""

    status = "PERMISSION_DENIED"


class TicketOfAnother(PermissionDenied):
    """The ticket was given to another client."""


class NotAnEvaluator(PermissionDenied):
    """A client that did not register as an evaluator sends figures of a version."""


class RoleMayNot(PermissionDenied):
    """The role of the caller's certificate has no right to the call."""


class Unauthenticated(FedpeftError):
    """The caller is not known."""

    status = "UNAUTHENTICATED"


class ClientIdInvalid(Unauthenticated):
    """The metadata that names the client is missing or malformed."""


class CertificateMissing(Unauthenticated):
    """The call needs a certificate, and the connection has none."""


class CertificateInvalid(Unauthenticated):
    """The caller's certificate names no role and name."""


class CertificateExpired(Unauthenticated):
    """The caller's certificate has ended since the connection was made."""


class CertificateRevoked(Unauthenticated):
    """The caller's certificates were revoked."""


class TokenUnknown(Unauthenticated):
    """No enrolment token has this secret."""


class TokenExpired(Unauthenticated):
    """The enrolment token is too old."""


class TokenUsed(Unauthenticated):
    """The enrolment token was used by another key."""


class ResourceExhausted(FedpeftError):
    """A limit is reached."""

    status = "RESOURCE_EXHAUSTED"


class UpdateTooLarge(ResourceExhausted):
    """A payload is larger than the server takes."""


class MessageTooLarge(ResourceExhausted):
    """A message has more bytes or more fields than its call takes, or a stream has too many small ones."""


class TransfersBusy(ResourceExhausted):
    """As many transfers as the server serves at once are under way; who asks again at once keeps its place."""

    retry_s = 0.0


class TooManyClients(ResourceExhausted):
    """As many clients as the server takes are registered."""


class TooManyCalls(ResourceExhausted):
    """A caller makes more calls, at once or in time, than one may."""

    retry_s = 5.0


class TooManyCertificates(ResourceExhausted):
    """One name was given as many certificates as it may have within half the life of one."""


class AnswerTooLarge(ResourceExhausted):
    """An answer does not fit into one message; ask for less at once."""


class DiskFull(ResourceExhausted):
    """There is no room to make the data durable."""


class Aborted(FedpeftError):
    """Nothing is wrong, but this call does not end it; ask where it stands and go on."""

    status = "ABORTED"
    retry_s = 0.0


class TurnOver(Aborted):
    """A transfer has had its turn and others wait; it goes on where it stands."""


class BeingChecked(Aborted):
    """An upload is whole and is being checked and made durable; ask again for the receipt."""


class DataLoss(FedpeftError):
    """Bytes are not what they should be."""

    status = "DATA_LOSS"


class ChecksumMismatch(DataLoss):
    """A payload does not have the digest of its manifest."""


class BlobCorrupt(DataLoss):
    """A stored blob does not have its recorded digest."""


class Unavailable(FedpeftError):
    """Not now; the same call may succeed later."""

    status = "UNAVAILABLE"


class Draining(Unavailable):
    """The server is shutting down."""


class DatabaseLocked(Unavailable):
    """Another program held a lock on the server's database for as long as a transaction waits for one."""


class DatabaseUnavailable(Unavailable):
    """The server's database cannot be used for now; whether a transaction that it broke off was made may be unknown.

    Attributes:
        lasting: Whether it stays so until somebody mends something: a file that is corrupt, or may not be written.
    """

    lasting: bool = False


class TransferStalled(Unavailable):
    """A transfer stopped making progress; it is continued by calling again."""


class ServerUnreachable(Unavailable):
    """No connection to the server.

    Attributes:
        lasting: Whether it stays so until somebody mends something: what answers is not this server, for example.
    """

    lasting: bool = False


class Internal(FedpeftError):
    """A fault of the server."""

    status = "INTERNAL"


class LocalError(FedpeftError):
    """An error of this process that never crosses the network."""


class SettingsInvalid(LocalError):
    """A flag, an environment variable or a settings file is wrong."""


class DataInvalid(LocalError):
    """A data set cannot be used."""


class ModelInvalid(LocalError):
    """A model or its weights cannot be used."""


class BackboneMismatch(LocalError):
    """The frozen tensors here differ from those of the run."""


class StateInvalid(LocalError):
    """A state or data directory cannot be used."""


class IdentityInvalid(LocalError):
    """A key, a certificate, a signing request or an enrolment token cannot be used."""


class AuditBroken(LocalError):
    """An audit log does not hold together: an entry was changed, removed, or put in."""


class TrainingFailed(LocalError):
    """Local training ended without an update."""


class RefusedByPolicy(LocalError):
    """A server asks for more than the policy of this site allows, or at a time when it allows nothing."""


__all__ = ["of_reason", "tree", *(cls.__name__ for cls in tree())]
