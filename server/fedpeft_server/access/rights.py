"""Rights of the roles, a line a call: `AdmissionInterceptor` asks it before any handler; docs/security.md shows it."""

from __future__ import annotations

from collections.abc import Mapping

from fedpeft.identity.subject import Role

CallerRole = Role | None
"""A role, or None for a connection without a certificate, which only the port for enrolment takes."""

_WRITES: frozenset[CallerRole] = frozenset({Role.OPERATOR})
_READS: frozenset[CallerRole] = frozenset({Role.OPERATOR, Role.VIEWER})
_TRAINS: frozenset[CallerRole] = frozenset({Role.CLIENT})
_SCORES: frozenset[CallerRole] = frozenset({Role.EVALUATOR})
_TAKES_PART = _TRAINS | _SCORES
_ENROLLED: frozenset[CallerRole] = frozenset(Role)
_EVERYBODY: frozenset[CallerRole] = _ENROLLED | {None}

RIGHTS: Mapping[str, frozenset[CallerRole]] = {
    "/fedpeft.v1.AccessService/Enroll": _EVERYBODY,
    "/fedpeft.v1.AccessService/Renew": _ENROLLED,
    "/fedpeft.v1.AccessService/Leave": _TAKES_PART,
    "/fedpeft.v1.AccessService/CreateToken": _WRITES,
    "/fedpeft.v1.AccessService/ListTokens": _WRITES,
    "/fedpeft.v1.AccessService/DeleteToken": _WRITES,
    "/fedpeft.v1.AccessService/RevokeIdentity": _WRITES,
    "/fedpeft.v1.AccessService/RestoreIdentity": _WRITES,
    "/fedpeft.v1.AccessService/ListIdentities": _READS,
    "/fedpeft.v1.AccessService/ListAuditEntries": _READS,
    "/fedpeft.v1.OperatorService/CreateRun": _WRITES,
    "/fedpeft.v1.OperatorService/GetRun": _READS,
    "/fedpeft.v1.OperatorService/ListRuns": _READS,
    "/fedpeft.v1.OperatorService/ListRounds": _READS,
    "/fedpeft.v1.OperatorService/WatchRun": _READS,
    "/fedpeft.v1.OperatorService/PauseRun": _WRITES,
    "/fedpeft.v1.OperatorService/ResumeRun": _WRITES,
    "/fedpeft.v1.OperatorService/StopRun": _WRITES,
    "/fedpeft.v1.OperatorService/RollbackRun": _WRITES,
    "/fedpeft.v1.OperatorService/DeleteRun": _WRITES,
    "/fedpeft.v1.OperatorService/DownloadAdapter": _READS,
    "/fedpeft.v1.OperatorService/SupplyVersion": _WRITES,
    "/fedpeft.v1.OperatorService/DownloadSum": _READS,
    "/fedpeft.v1.OperatorService/ListClients": _READS,
    "/fedpeft.v1.OperatorService/ReadmitClient": _WRITES,
    "/fedpeft.v1.OperatorService/GetStorage": _READS,
    "/fedpeft.v1.FederationService/Register": _TAKES_PART,
    "/fedpeft.v1.FederationService/AwaitRound": _TAKES_PART,
    "/fedpeft.v1.FederationService/AnswerOffer": _TAKES_PART,
    "/fedpeft.v1.FederationService/PullAdapter": _TAKES_PART,
    "/fedpeft.v1.FederationService/PushUpdate": _TRAINS,
    "/fedpeft.v1.FederationService/GetUpload": _TRAINS,
    "/fedpeft.v1.FederationService/Withdraw": _TRAINS,
    "/fedpeft.v1.FederationService/CheckRuns": _TAKES_PART,
    "/fedpeft.v1.FederationService/PushEvaluation": _SCORES,
    "/grpc.health.v1.Health/Check": _EVERYBODY,
    "/grpc.health.v1.Health/List": _ENROLLED,
    "/grpc.health.v1.Health/Watch": _ENROLLED,  # without end, so not for those whom nobody knows
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": _READS,
}
"""The roles that may make a call; a call that is not here may be made by nobody."""
