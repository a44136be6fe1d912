"""Bounds on callers: the one table of how much anybody may ask of this server.

Every bound on calls, messages, connections and log lines is in this module; docs/security.md is made from it, and
`tests/server/access/test_bounds.py` tries each at its limit and beyond it. `access.pacing`, `rpc.incoming`,
`rpc.interceptors`, `rpc.connections`, `fedpeft.process.metrics_port` and `enrolment.connection_proxy` enforce it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from fedpeft.identity.subject import Role
from fedpeft.process.metrics_port import Limits
from fedpeft.rpc.wire import MESSAGE_LIMIT_BYTES
from fedpeft_server.access.rights import CallerRole

KIB = 1024


@dataclass(frozen=True, slots=True)
class Rate:
    """A token bucket.

    Attributes:
        per_s: Events a second, in the long run.
        burst: Events at once, after a pause.
    """

    per_s: float
    burst: int


@dataclass(frozen=True, slots=True)
class CallBound:
    """Bounds on one method.

    Attributes:
        message_bytes: Largest message that its caller sends.
        elements: Most fields in one such message, counted wherever a message can hold arbitrarily many; a field of two
            bytes can take a thousand times as much memory once it is parsed.
        rate: Calls of one caller, beside the rate of its role; None for no other than that.
    """

    message_bytes: int = 64 * KIB
    elements: int = 1024
    rate: Rate | None = None


@dataclass(frozen=True, slots=True)
class CallerBound:
    """Bounds on all calls of one caller.

    Attributes:
        rate: Calls begun.
        under_way: Calls at once.
    """

    rate: Rate
    under_way: int


@dataclass(frozen=True, slots=True)
class ReceivingBound:
    """Bounds on messages that are being received.

    Attributes:
        at_once: Messages of all callers at once.
        of_one: Messages of one caller at once.
        hold_s: Longest time for one while others wait to be received, seconds.
    """

    at_once: int
    of_one: int
    hold_s: float


@dataclass(frozen=True, slots=True)
class PortBound:
    """Bounds on the connections of one port; None where there is none.

    Attributes:
        connections: Connections at once.
        per_address: Connections at once from one address; of IPv6 the first 64 bits are the address.
        opened: Connections opened from one address.
        life_s: Longest life of a connection, seconds.
        silence_s: Longest time before a connection has said what it wants (TLS included), seconds; of a connection for
            enrolment, the longest pause in what it sends.
        idle_s: Longest time that a connection is kept without a call, seconds.
        received_bytes: Most bytes that a connection sends to the server, TLS included.
        streams: Calls at once on one connection.
    """

    connections: int | None
    per_address: int | None = None
    opened: Rate | None = None
    life_s: float | None = None
    silence_s: float | None = None
    idle_s: float | None = None
    received_bytes: int | None = None
    streams: int | None = None


class Refusal(StrEnum):
    """Reason for which a connection to the port for enrolment is not served to its end."""

    OPENED_TOO_FAST = "opened too fast"
    OF_ONE_ADDRESS = "too many of one address"
    TOO_MANY = "too many connections"
    NO_DATA = "no data"
    TOO_MUCH_DATA = "too much data"
    OPEN_TOO_LONG = "open too long"
    NOT_SERVED = "not served"


_SMALL = CallBound(message_bytes=4 * KIB, elements=64)
_TEXT = CallBound()

CALLS: Mapping[str, CallBound] = {
    "/fedpeft.v1.AccessService/Enroll": CallBound(message_bytes=16 * KIB, elements=64),
    "/fedpeft.v1.AccessService/Renew": CallBound(message_bytes=16 * KIB, elements=64, rate=Rate(0.2, 10)),
    "/fedpeft.v1.AccessService/Leave": CallBound(rate=Rate(0.2, 10)),
    "/fedpeft.v1.AccessService/CreateToken": _SMALL,
    "/fedpeft.v1.AccessService/ListTokens": _SMALL,
    "/fedpeft.v1.AccessService/DeleteToken": _SMALL,
    "/fedpeft.v1.AccessService/RevokeIdentity": _TEXT,
    "/fedpeft.v1.AccessService/RestoreIdentity": _SMALL,
    "/fedpeft.v1.AccessService/ListIdentities": _SMALL,
    "/fedpeft.v1.AccessService/ListAuditEntries": _SMALL,
    # The header has a spec and a manifest of 4,096 tensors each, and the names of all classes.
    "/fedpeft.v1.OperatorService/CreateRun": CallBound(MESSAGE_LIMIT_BYTES, elements=65_536),
    "/fedpeft.v1.OperatorService/GetRun": _SMALL,
    "/fedpeft.v1.OperatorService/ListRuns": _SMALL,
    "/fedpeft.v1.OperatorService/ListRounds": _SMALL,
    "/fedpeft.v1.OperatorService/WatchRun": _SMALL,
    "/fedpeft.v1.OperatorService/PauseRun": _TEXT,
    "/fedpeft.v1.OperatorService/ResumeRun": _TEXT,
    "/fedpeft.v1.OperatorService/StopRun": _TEXT,
    "/fedpeft.v1.OperatorService/RollbackRun": _TEXT,
    "/fedpeft.v1.OperatorService/DeleteRun": _SMALL,
    "/fedpeft.v1.OperatorService/DownloadAdapter": _SMALL,
    "/fedpeft.v1.OperatorService/SupplyVersion": CallBound(2048 * KIB, elements=8192),
    "/fedpeft.v1.OperatorService/DownloadSum": _SMALL,
    "/fedpeft.v1.OperatorService/ListClients": _SMALL,
    "/fedpeft.v1.OperatorService/ReadmitClient": _SMALL,
    "/fedpeft.v1.OperatorService/GetStorage": _SMALL,
    "/fedpeft.v1.FederationService/Register": CallBound(rate=Rate(1, 30)),
    "/fedpeft.v1.FederationService/AwaitRound": _SMALL,
    "/fedpeft.v1.FederationService/AnswerOffer": CallBound(rate=Rate(2, 100)),
    "/fedpeft.v1.FederationService/PullAdapter": _SMALL,
    # A chunk is 1 MiB; the header's manifest names at most 4,096 tensors.
    "/fedpeft.v1.FederationService/PushUpdate": CallBound(2048 * KIB, elements=8192),
    "/fedpeft.v1.FederationService/GetUpload": _SMALL,
    "/fedpeft.v1.FederationService/Withdraw": CallBound(rate=Rate(2, 100)),
    "/fedpeft.v1.FederationService/CheckRuns": CallBound(4 * KIB, elements=64, rate=Rate(2, 100)),
    # 2,048 figures with names of 128 bytes.
    "/fedpeft.v1.FederationService/PushEvaluation": CallBound(512 * KIB, elements=4096, rate=Rate(10, 200)),
    "/grpc.health.v1.Health/Check": _SMALL,
    "/grpc.health.v1.Health/List": _SMALL,
    "/grpc.health.v1.Health/Watch": _SMALL,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": _SMALL,
}
"""By method; each that is served is here."""

_PEOPLE = CallerBound(Rate(200, 2000), under_way=512)
_DEVICES = CallerBound(Rate(50, 1000), under_way=32)

CALLERS: Mapping[CallerRole, CallerBound] = {
    Role.OPERATOR: _PEOPLE,
    Role.VIEWER: _PEOPLE,
    Role.CLIENT: _DEVICES,
    Role.EVALUATOR: _DEVICES,
    None: CallerBound(Rate(5, 50), under_way=16),
}
"""By role, for each name; None is one address without a certificate. In plain text a client is who it says it is, and
everybody else is the operator."""

RECEIVING = ReceivingBound(at_once=16, of_one=2, hold_s=2.0)
"""gRPC receives up to `MESSAGE_LIMIT_BYTES` before the size of a message is known, whatever its method takes; of the
others no more than a flow-control window of 64 KiB arrives. Chunks of updates are bounded by `--max-transfers`."""

MOST_REFUSALS_HELD = 1000
"""Refusals that are held back at once; more are answered at once, since each takes some memory."""
MOST_CALLERS = 10_000
"""Callers whose rates are remembered; the one that called the longest ago is forgotten first."""

STREAM_MESSAGES = 4096
"""Messages of one call that may be as small as they like; the others must have `CHUNK_BYTES` on average."""
CHUNK_BYTES = 4 * KIB
"""Least size, on average, of a long stream's messages: each costs the server the same, however small it is."""
MOST_DEPTH = 64
"""Messages within messages."""

MAIN = PortBound(None, silence_s=30, idle_s=600, streams=128)
"""`--listen`; half of the server's open files is the limit of connections, since the other half is for its work."""
ENROLMENT = PortBound(
    128, per_address=16, opened=Rate(5, 50), life_s=60, silence_s=10, received_bytes=64 * KIB, streams=4
)
"""`--enroll`, in a process of its own; an enrolment takes two seconds and 4 KiB."""
FORWARDED = PortBound(8, silence_s=10, streams=1024)
"""The daemon's own socket, on which that process hands calls on."""
METRICS = Limits(connections=16, silence_s=5, life_s=30, request_bytes=8 * KIB)
"""`--metrics`; beyond the limit the connection that has waited longest gives way to the new one."""
ENROLMENT_MEMORY = 128 * KIB * KIB
"""Bytes that the process for enrolment may take beyond what it has once it has started."""

LOG_LINES = Rate(2, 100)
"""Log lines about the calls of one caller; more are counted, and the number is said."""
MOST_REMEMBERED = 1000
"""Kinds of refusals that are remembered for that."""
