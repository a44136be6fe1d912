"""From the database's rows to the protocol's messages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from google.protobuf import timestamp_pb2

from fedpeft.rounds import Phase, Ticket, TicketState
from fedpeft.v1 import federation_service_pb2, operator_service_pb2, run_pb2
from fedpeft.wire import config_to_proto, spec_to_proto
from fedpeft_server.store.rows import AnswerRow, ClientRow, RoundRow, RunRow, RunState, Traffic

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
ROLES = {
    "trainer": federation_service_pb2.CLIENT_ROLE_TRAINER,
    "evaluator": federation_service_pb2.CLIENT_ROLE_EVALUATOR,
}


def timestamp(seconds: float | None) -> timestamp_pb2.Timestamp | None:
    """Returns a point in time, to the microsecond; None stays None."""
    if seconds is None:
        return None
    micros = round(seconds * 1e6)
    return timestamp_pb2.Timestamp(seconds=micros // 1_000_000, nanos=micros % 1_000_000 * 1000)


def run_message(
    run: RunRow, reason: str, initial_metrics: Mapping[str, float], declines: Iterable[AnswerRow] = ()
) -> run_pb2.Run:
    """Returns a run; `reason` says what it waits for, where the row has nothing to say; operators see `declines`."""
    return run_pb2.Run(
        id=run.id,
        config=config_to_proto(run.config),
        spec=spec_to_proto(run.spec),
        backbone_fingerprint=run.backbone_fingerprint,
        state=RUN_STATES[run.state],
        reason=run.reason or reason,
        version=run.version,
        created_at=timestamp(run.created_at),
        model_parameters=run.model_parameters,
        initial_metrics=initial_metrics,
        declines=[run_pb2.Decline(client=d.client, reasons=d.reasons, at=timestamp(d.at)) for d in declines],
    )


def round_message(
    row: RoundRow, evaluation: Mapping[str, float], pending: Mapping[tuple[int, str], Traffic]
) -> run_pb2.Round:
    """Returns a round with the figures of its result; `pending` is traffic that is not in the database yet."""
    current = row.round
    traffic = {
        t.client: row.traffic.get(t.client, Traffic()) + pending.get((current.number, t.client), Traffic())
        for t in current.tickets
    }
    total = sum(traffic.values(), Traffic())
    return run_pb2.Round(
        number=current.number,
        phase=PHASES[current.phase],
        base_version=current.base_version,
        opened_at=timestamp(current.opened_at),
        deadline=timestamp(current.deadline),
        committed_at=timestamp(row.committed_at),
        extensions=current.extensions,
        tickets=[_ticket(ticket, row, traffic[ticket.client]) for ticket in current.tickets],
        wire_bytes_up=total.wire_up,
        wire_bytes_down=total.wire_down,
        payload_bytes_up=total.payload_up,
        payload_bytes_down=total.payload_down,
        metrics={**row.metrics, **evaluation},
        record=row.record,
        record_sha256=row.record_sha256,
    )


def _ticket(ticket: Ticket, row: RoundRow, traffic: Traffic) -> run_pb2.Ticket:
    update = row.updates.get(ticket.id)
    return run_pb2.Ticket(
        id=ticket.id,
        client=ticket.client,
        state=TICKET_STATES[ticket.state],
        reason=ticket.reason,
        examples=update.examples if update else 0,
        weight=row.weights.get(ticket.id, 0.0),
        update_norm=update.norm if update else 0.0,
        metrics=update.metrics if update else {},
        payload_sha256=update.manifest.sha256.hex() if update else "",
        wire_bytes_up=traffic.wire_up,
        wire_bytes_down=traffic.wire_down,
        payload_bytes_up=traffic.payload_up,
        payload_bytes_down=traffic.payload_down,
    )


def client_message(row: ClientRow, activity: str, answers: Iterable[AnswerRow]) -> operator_service_pb2.Client:
    """Returns a client with what it answered to the offers of runs."""
    return operator_service_pb2.Client(
        id=row.id,
        role=ROLES.get(row.role, federation_service_pb2.CLIENT_ROLE_UNSPECIFIED),
        capabilities=federation_service_pb2.Capabilities.FromString(row.capabilities),
        first_seen=timestamp(row.first_seen),
        last_seen=timestamp(row.last_seen),
        activity=activity,
        updates=row.updates,
        answers=[_answer(answer) for answer in answers],
    )


def _answer(row: AnswerRow) -> operator_service_pb2.RunAnswer:
    accepted, declined = federation_service_pb2.ANSWER_ACCEPTED, federation_service_pb2.ANSWER_DECLINED
    return operator_service_pb2.RunAnswer(
        run=row.run,
        answer=accepted if row.accepted else declined,
        reasons=row.reasons,
        examples=row.examples,
        at=timestamp(row.at),
    )
