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
    │   ├── ProgressInvalid       how far a training is
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
    │   │   └── VersionRemoved    its files were removed by the server's retention
    │   ├── SumNotFound
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
    │   ├── RunNotRelayed         the run makes its versions itself
    │   ├── RunRelayed            a parent's server makes its versions
    │   ├── RelayDiffers          a second agent works for an edge
    │   ├── VersionSuperseded     a parent's version came after a later one
    │   ├── VersionDiffers        a parent made a version again, of other content
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
    │   ├── DatabaseUnavailable   the server's database is out of reach, read-only or corrupt
    │   ├── StoreUnavailable      a folder or object store of the server refuses
    │   ├── VersionBeingMade      an update counts in the next version, once the one before is there
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
        ├── BudgetExhausted       a client has no privacy budget left for a run
        └── RefusedByPolicy       a server asks for more than the policy of this site allows

A class knows its gRPC status and its `ErrorInfo.reason`; `fedpeft.rpc.status` carries both across the network and back.
"""

from __future__ import annotations

from fedpeft.errors.access import (
    CertificateExpired,
    CertificateInvalid,
    CertificateMissing,
    CertificateRevoked,
    ClientIdInvalid,
    NotAnEvaluator,
    PermissionDenied,
    RoleMayNot,
    TicketOfAnother,
    TokenExpired,
    TokenUnknown,
    TokenUsed,
    Unauthenticated,
)
from fedpeft.errors.arguments import (
    AnswerInvalid,
    CapabilitiesInvalid,
    ChunkInvalid,
    ConfigInvalid,
    DigestInvalid,
    ExamplesInvalid,
    InvalidArgument,
    ManifestInvalid,
    MessageInvalid,
    MetricsInvalid,
    OffsetOutOfRange,
    OutOfRange,
    PageInvalid,
    PayloadInvalid,
    ProgressInvalid,
    RunsInvalid,
    SigningRequestInvalid,
    SpecInvalid,
    SubjectInvalid,
    UploadIncomplete,
)
from fedpeft.errors.existence import (
    AlreadyExists,
    ClientIdInUse,
    ClientNotFound,
    IdentityNotFound,
    NameInUse,
    NotFound,
    RequestIdReused,
    RunNotFound,
    SumNotFound,
    TicketNotFound,
    TokenNotFound,
    UpdateDiffers,
    VersionNotFound,
    VersionRemoved,
)
from fedpeft.errors.faults import (
    BlobCorrupt,
    ChecksumMismatch,
    DatabaseLocked,
    DatabaseUnavailable,
    DataLoss,
    Draining,
    Internal,
    ServerUnreachable,
    StoreUnavailable,
    TransferStalled,
    Unavailable,
    VersionBeingMade,
)
from fedpeft.errors.limits import (
    Aborted,
    AnswerTooLarge,
    BeingChecked,
    DiskFull,
    MessageTooLarge,
    ResourceExhausted,
    TooManyCalls,
    TooManyCertificates,
    TooManyClients,
    TransfersBusy,
    TurnOver,
    UpdateTooLarge,
)
from fedpeft.errors.local import (
    AuditBroken,
    BackboneMismatch,
    BudgetExhausted,
    DataInvalid,
    IdentityInvalid,
    LocalError,
    ModelInvalid,
    RefusedByPolicy,
    SettingsInvalid,
    StateInvalid,
    TrainingFailed,
)
from fedpeft.errors.preconditions import (
    ClientMoved,
    FailedPrecondition,
    NoAuthority,
    NotRegistered,
    ProtocolMismatch,
    RelayDiffers,
    RoundClosed,
    RunFinished,
    RunNotFinished,
    RunNotRelayed,
    RunRelayed,
    SelfRevocation,
    TicketClosed,
    UpdateExcluded,
    VersionDiffers,
    VersionSuperseded,
)
from fedpeft.errors.root import (
    FedpeftError,
    of_reason,
    of_status,
    tree,
)

__all__ = [
    "Aborted",
    "AlreadyExists",
    "AnswerInvalid",
    "AnswerTooLarge",
    "AuditBroken",
    "BackboneMismatch",
    "BeingChecked",
    "BlobCorrupt",
    "BudgetExhausted",
    "CapabilitiesInvalid",
    "CertificateExpired",
    "CertificateInvalid",
    "CertificateMissing",
    "CertificateRevoked",
    "ChecksumMismatch",
    "ChunkInvalid",
    "ClientIdInUse",
    "ClientIdInvalid",
    "ClientMoved",
    "ClientNotFound",
    "ConfigInvalid",
    "DataInvalid",
    "DataLoss",
    "DatabaseLocked",
    "DatabaseUnavailable",
    "DigestInvalid",
    "DiskFull",
    "Draining",
    "ExamplesInvalid",
    "FailedPrecondition",
    "FedpeftError",
    "IdentityInvalid",
    "IdentityNotFound",
    "Internal",
    "InvalidArgument",
    "LocalError",
    "ManifestInvalid",
    "MessageInvalid",
    "MessageTooLarge",
    "MetricsInvalid",
    "ModelInvalid",
    "NameInUse",
    "NoAuthority",
    "NotAnEvaluator",
    "NotFound",
    "NotRegistered",
    "OffsetOutOfRange",
    "OutOfRange",
    "PageInvalid",
    "PayloadInvalid",
    "PermissionDenied",
    "ProgressInvalid",
    "ProtocolMismatch",
    "RefusedByPolicy",
    "RelayDiffers",
    "RequestIdReused",
    "ResourceExhausted",
    "RoleMayNot",
    "RoundClosed",
    "RunFinished",
    "RunNotFinished",
    "RunNotFound",
    "RunNotRelayed",
    "RunRelayed",
    "RunsInvalid",
    "SelfRevocation",
    "ServerUnreachable",
    "SettingsInvalid",
    "SigningRequestInvalid",
    "SpecInvalid",
    "StateInvalid",
    "StoreUnavailable",
    "SubjectInvalid",
    "SumNotFound",
    "TicketClosed",
    "TicketNotFound",
    "TicketOfAnother",
    "TokenExpired",
    "TokenNotFound",
    "TokenUnknown",
    "TokenUsed",
    "TooManyCalls",
    "TooManyCertificates",
    "TooManyClients",
    "TrainingFailed",
    "TransferStalled",
    "TransfersBusy",
    "TurnOver",
    "Unauthenticated",
    "Unavailable",
    "UpdateDiffers",
    "UpdateExcluded",
    "UpdateTooLarge",
    "UploadIncomplete",
    "VersionBeingMade",
    "VersionDiffers",
    "VersionNotFound",
    "VersionRemoved",
    "VersionSuperseded",
    "of_reason",
    "of_status",
    "tree",
]
