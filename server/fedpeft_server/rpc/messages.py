"""From the database's rows to the protocol's messages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict

from google.protobuf import timestamp_pb2

from fedpeft.adapters.spec import AdapterSpec
from fedpeft.config import RunConfig
from fedpeft.identity import roles
from fedpeft.identity.audit import AuditEntry
from fedpeft.rounds.state_machine import Phase
from fedpeft.rounds.tickets import TicketState
from fedpeft.rpc.wire import MESSAGE_LIMIT_BYTES, config_to_proto, spec_to_proto
from fedpeft.v1 import access_service_pb2, federation_service_pb2, operator_service_pb2, run_pb2
from fedpeft_server.rpc.pages import fitting
from fedpeft_server.runs.progress import Progress, State, Verdict
from fedpeft_server.runs.scoring import EvaluatorProgress
from fedpeft_server.store.blobs.room import Disk
from fedpeft_server.store.rows import (
    AnswerRow,
    ClientRow,
    IdentityRow,
    RoundFigures,
    RunRow,
    RunState,
    TicketFigures,
    TokenRow,
    UpdateRow,
)

DECLINES_BYTES = 256 * 1024
"""A run goes beside a page of rounds in one message, so it names no more declines than this."""

ANSWERS_BYTES = 256 * 1024
"""A client shows no more of its answers than this: there is one for each run that is not finished."""
EVALUATORS = 32
"""Most evaluators that a run shows."""
AWAITED = 32
"""Most awaited clients of which a run shows how far they are."""
RUN_BYTES = MESSAGE_LIMIT_BYTES - 1024 * 1024
"""Configuration and spec of a run take no more than this, so that a message has room for what goes beside them."""

MOST_ASIDE = 1000
"""Likewise, no more clients that are set aside."""

RUN_STATES = {
    RunState.RUNNING: run_pb2.RUN_STATE_RUNNING,
    RunState.PAUSED: run_pb2.RUN_STATE_PAUSED,
    RunState.COMPLETED: run_pb2.RUN_STATE_COMPLETED,
    RunState.STOPPED: run_pb2.RUN_STATE_STOPPED,
}
PHASES = {
    Phase.WAITING: run_pb2.ROUND_PHASE_WAITING,
    Phase.OPEN: run_pb2.ROUND_PHASE_OPEN,
    Phase.AGGREGATING: run_pb2.ROUND_PHASE_AGGREGATING,
    Phase.COMMITTED: run_pb2.ROUND_PHASE_COMMITTED,
}
TICKET_STATES = {
    TicketState.ISSUED: run_pb2.TICKET_STATE_ISSUED,
    TicketState.RECEIVED: run_pb2.TICKET_STATE_RECEIVED,
    TicketState.WITHDRAWN: run_pb2.TICKET_STATE_WITHDRAWN,
    TicketState.REFUSED: run_pb2.TICKET_STATE_REFUSED,
    TicketState.LATE: run_pb2.TICKET_STATE_LATE,
}
PROGRESS_STATES = {
    State.TRAINING: run_pb2.PROGRESS_STATE_TRAINING,
    State.UPLOADING: run_pb2.PROGRESS_STATE_UPLOADING,
    State.SLOW: run_pb2.PROGRESS_STATE_SLOW,
    State.STALLED: run_pb2.PROGRESS_STATE_STALLED,
    State.SILENT: run_pb2.PROGRESS_STATE_SILENT,
}
ROLES = {
    "trainer": federation_service_pb2.CLIENT_ROLE_TRAINER,
    "evaluator": federation_service_pb2.CLIENT_ROLE_EVALUATOR,
}


_MOST_FIXED = 64
"""Runs whose config and spec are kept as messages; a spec has tens of kilobytes."""
_FIXED: dict[str, tuple[RunConfig, AdapterSpec, run_pb2.Run]] = {}  # the one used the longest ago first


def timestamp(seconds: float | None) -> timestamp_pb2.Timestamp | None:
    """Returns a point in time, to the microsecond; None stays None."""
    if seconds is None:
        return None
    micros = round(seconds * 1e6)
    return timestamp_pb2.Timestamp(seconds=micros // 1_000_000, nanos=micros % 1_000_000 * 1000)


def run_message(
    run: RunRow,
    reason: str,
    initial_metrics: Mapping[str, float],
    declines: Iterable[AnswerRow] = (),
    set_aside: Sequence[str] = (),
) -> run_pb2.Run:
    """Returns a run; `reason` says what it waits for, where the row has nothing to say; operators see the last two."""
    fixed = _fixed(run)
    return run_pb2.Run(
        id=run.id,
        config=fixed.config,
        spec=fixed.spec,
        backbone_fingerprint=run.backbone_fingerprint,
        state=RUN_STATES[run.state],
        reason=run.reason or reason,
        version=run.version,
        created_at=timestamp(run.created_at),
        model_parameters=run.model_parameters,
        initial_metrics=initial_metrics,
        declines=fitting((_decline(answer) for answer in declines), DECLINES_BYTES),
        set_aside=set_aside[:MOST_ASIDE],
    )


def _fixed(run: RunRow) -> run_pb2.Run:
    """Returns config and spec of a run, made once: they never change, and every client that registers gets them."""
    known = _FIXED.pop(run.id, None)
    if known is None or known[0] is not run.config or known[1] is not run.spec:
        known = run.config, run.spec, run_pb2.Run(config=config_to_proto(run.config), spec=spec_to_proto(run.spec))
    _FIXED[run.id] = known
    if len(_FIXED) > _MOST_FIXED:
        del _FIXED[next(iter(_FIXED))]
    return known[2]


def _decline(answer: AnswerRow) -> run_pb2.Decline:
    return run_pb2.Decline(client=answer.client, reasons=answer.reasons, at=timestamp(answer.at))


def round_message(row: RoundFigures) -> run_pb2.Round:
    """Returns a round without its tickets."""
    current, traffic = row.round, row.traffic
    return run_pb2.Round(
        number=current.number,
        phase=PHASES[current.phase],
        base_version=current.base_version,
        opened_at=timestamp(current.opened_at),
        deadline=timestamp(current.deadline),
        committed_at=timestamp(row.committed_at),
        extensions=current.extensions,
        wire_bytes_up=traffic.wire_up,
        wire_bytes_down=traffic.wire_down,
        payload_bytes_up=traffic.payload_up,
        payload_bytes_down=traffic.payload_down,
        metrics=row.metrics,
        record=row.record,
        record_offset=row.record_offset,
        record_sha256=row.record_sha256,
    )


def ticket_message(row: TicketFigures) -> run_pb2.Ticket:
    """Returns a ticket with the figures of its update."""
    return run_pb2.Ticket(
        id=row.ticket.id,
        client=row.ticket.client,
        state=TICKET_STATES[row.ticket.state],
        reason=row.ticket.reason,
        examples=row.examples,
        weight=row.weight,
        update_norm=row.norm,
        metrics=row.metrics,
        payload_sha256=row.payload_sha256,
        wire_bytes_up=row.traffic.wire_up,
        wire_bytes_down=row.traffic.wire_down,
        payload_bytes_up=row.traffic.payload_up,
        payload_bytes_down=row.traffic.payload_down,
        base_version=row.ticket.base_version,
    )


def receipt_message(update: UpdateRow) -> federation_service_pb2.PushUpdateResponse:
    """Returns the receipt of an update."""
    return federation_service_pb2.PushUpdateResponse(
        ticket=update.ticket, sha256=update.manifest.sha256, received_at=timestamp(update.received_at)
    )


def scoring_message(progress: EvaluatorProgress, given: int | None) -> run_pb2.Scoring:
    """Returns how far an evaluator is; `given` is the version that it was given last and has not answered for."""
    return run_pb2.Scoring(
        evaluator=progress.evaluator,
        scored=progress.scored,
        backlog=progress.missing,
        next_version=progress.newest,
        scoring_version=given,
        failed=[run_pb2.FailedVersion(version=number, reason=reason) for number, reason in progress.failed],
    )


def progress_message(client: str, run: str, progress: Progress, verdict: Verdict) -> run_pb2.ClientProgress:
    """Returns how far a client is with its open ticket."""
    return run_pb2.ClientProgress(
        client=client,
        run=run,
        state=PROGRESS_STATES[verdict.state],
        step=progress.report.step,
        steps=progress.report.steps,
        seconds=verdict.seconds,
        heard_s=verdict.heard_s,
        moved_s=verdict.moved_s,
        usual_s=verdict.usual_s,
        description=verdict.words,
        refused=verdict.refused,
        updates=progress.report.updates,
        updates_wanted=progress.report.wanted,
    )


def client_message(
    row: ClientRow,
    activity: str,
    answers: Iterable[AnswerRow],
    scoring: tuple[str, int] | None = None,
    progress: run_pb2.ClientProgress | None = None,
) -> operator_service_pb2.Client:
    """Returns a client with what it answered to the offers of runs, and what it has to train or to score."""
    return operator_service_pb2.Client(
        progress=progress,
        scoring=None if scoring is None else federation_service_pb2.EvaluationTask(run=scoring[0], version=scoring[1]),
        id=row.id,
        role=ROLES.get(row.role, federation_service_pb2.CLIENT_ROLE_UNSPECIFIED),
        capabilities=federation_service_pb2.Capabilities.FromString(row.capabilities),
        first_seen=timestamp(row.first_seen),
        last_seen=timestamp(row.last_seen),
        activity=activity,
        updates=row.updates,
        answers=fitting((_answer(answer) for answer in answers), ANSWERS_BYTES),
    )


def _answer(row: AnswerRow) -> operator_service_pb2.RunAnswer:
    accepted, declined = federation_service_pb2.ANSWER_ACCEPTED, federation_service_pb2.ANSWER_DECLINED
    return operator_service_pb2.RunAnswer(
        run=row.run,
        answer=accepted if row.accepted else declined,
        reasons=row.reasons,
        examples=row.examples,
        at=timestamp(row.at),
        missed=row.conduct.missed,
        set_aside=row.conduct.is_aside,
    )


def token_message(row: TokenRow) -> access_service_pb2.Token:
    """Returns an enrolment token as it is listed."""
    return access_service_pb2.Token(
        id=row.id,
        name=row.subject.name,
        role=roles.TO_PROTO[row.subject.role],
        created_at=timestamp(row.created_at),
        created_by=row.created_by,
        expires_at=timestamp(row.expires_at),
        used_at=timestamp(row.used_at),
    )


def identity_message(row: IdentityRow, trusted: bool) -> access_service_pb2.Identity:
    """Returns an identity; one that was admitted again after a revocation is not revoked.

    Args:
        row: The identity.
        trusted: True if the authority that issued its certificate is trusted.
    """
    return access_service_pb2.Identity(
        role=roles.TO_PROTO[row.subject.role],
        name=row.subject.name,
        issued_at=timestamp(row.issued_at),
        expires_at=timestamp(row.expires_at),
        fingerprint=row.fingerprint,
        revoked_at=timestamp(row.revoked_at if row.is_revoked else None),
        reason=row.reason if row.is_revoked else "",
        restored_at=timestamp(row.restored_at),
        issuer=row.issuer,
        authority_replaced=not trusted,
    )


def disk_message(disk: Disk) -> operator_service_pb2.Disk:
    """Returns the room on a disk."""
    facts = asdict(disk) | {"folder": str(disk.folder)}
    return operator_service_pb2.Disk(**facts)


def audit_message(entry: AuditEntry) -> access_service_pb2.AuditEntry:
    """Returns an entry of the audit log."""
    return access_service_pb2.AuditEntry(**asdict(entry))
