"""The server's answers for a reader: JSON objects and figures, from the protocol's messages alone.

Notable: an identifier, a state or a phase is in lower case without its enum's prefix; times are ISO 8601 in UTC; sizes
are bytes; a version's figures stand with the round that made it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from google.protobuf import json_format
from google.protobuf.timestamp_pb2 import Timestamp

from fedpeft.formatting import counted as counted_noun
from fedpeft.privacy.statement import EPSILON, statement
from fedpeft.v1 import access_service_pb2, federation_service_pb2, operator_service_pb2, run_pb2, tensor_pb2

BYTES_PER_PARAMETER = 4
"""Float32: what a parameter costs one way where nothing is encoded."""

Json = dict[str, Any]


def state(run: run_pb2.Run) -> str:
    """Returns running, paused, completed or stopped."""
    return run_pb2.RunState.Name(run.state).removeprefix("RUN_STATE_").lower()


def quorum(rounds: run_pb2.RoundsConfig) -> int:
    """Returns the fewest updates that a round commits with at its deadline."""
    from fedpeft.config import default_quorum  # a command's --help needs no pydantic

    return rounds.quorum if rounds.HasField("quorum") else default_quorum(rounds.clients)


def phase(round_: run_pb2.Round) -> str:
    """Returns waiting, open, aggregating or committed."""
    return run_pb2.RoundPhase.Name(round_.phase).removeprefix("ROUND_PHASE_").lower()


def role(client: operator_service_pb2.Client) -> str:
    """Returns trainer or evaluator."""
    return federation_service_pb2.ClientRole.Name(client.role).removeprefix("CLIENT_ROLE_").lower()


def identity_role(role: access_service_pb2.IdentityRole.ValueType) -> str:
    """Returns operator, viewer, client or evaluator."""
    return access_service_pb2.IdentityRole.Name(role).removeprefix("IDENTITY_ROLE_").lower()


def counted(round_: run_pb2.Round) -> list[str]:
    """Returns the clients whose updates are counted, by id."""
    return [t.client for t in round_.tickets if t.state == run_pb2.TICKET_STATE_RECEIVED]


def awaited(round_: run_pb2.Round) -> list[str]:
    """Returns the clients that hold an open ticket, by id."""
    return [t.client for t in round_.tickets if t.state == run_pb2.TICKET_STATE_ISSUED]


def awaited_from(round_: run_pb2.Round) -> list[str]:
    """Returns the same, each with the version that it works from if that is not the newest."""
    return [
        f"{t.client} (from version {t.base_version})" if staleness(t, round_) else t.client
        for t in round_.tickets
        if t.state == run_pb2.TICKET_STATE_ISSUED
    ]


def withdrawn(round_: run_pb2.Round) -> list[run_pb2.Ticket]:
    """Returns the tickets that were given back, or taken from their clients."""
    return [t for t in round_.tickets if t.state == run_pb2.TICKET_STATE_WITHDRAWN]


def is_buffered(run: run_pb2.Run) -> bool:
    """Returns True if the run's tickets outlive their rounds, as far as this version knows its policy."""
    return run.config.rounds.policy == "buffered"


def goal(round_: run_pb2.Round, run: run_pb2.Run) -> int:
    """Returns the updates that a round in progress waits for: those of all its tickets, or of the next that come."""
    return run.config.rounds.clients if is_buffered(run) else len(round_.tickets)


def committed(rounds: Iterable[run_pb2.Round]) -> list[run_pb2.Round]:
    """Returns the rounds whose record is final, by number."""
    final = [r for r in rounds if r.phase == run_pb2.ROUND_PHASE_COMMITTED]
    return sorted(final, key=lambda r: r.number)


def in_progress(run: run_pb2.Run, rounds: Iterable[run_pb2.Round]) -> run_pb2.Round | None:
    """Returns the round being held, if the run is not finished."""
    if run.state not in (run_pb2.RUN_STATE_RUNNING, run_pb2.RUN_STATE_PAUSED):
        return None
    later = [r for r in rounds if r.number > run.version and r.phase != run_pb2.ROUND_PHASE_COMMITTED]
    return max(later, key=lambda r: r.number, default=None)


def moment(stamp: Timestamp) -> str | None:
    """Returns a time as ISO 8601 in UTC, or None where none is set."""
    if not stamp.seconds and not stamp.nanos:
        return None
    return stamp.ToDatetime(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def seconds(round_: run_pb2.Round) -> float | None:
    """Returns how long a committed round took, from its first ticket."""
    if not round_.committed_at.seconds or not round_.opened_at.seconds:
        return None
    taken = round_.committed_at.ToDatetime(UTC) - round_.opened_at.ToDatetime(UTC)
    return round(taken.total_seconds(), 3)


def is_scored(metrics: Mapping[str, float]) -> bool:
    """Returns True if an evaluator's figures are among those of a version; without classes it is a loss alone."""
    return "accuracy" in metrics or "loss" in metrics


def remaining_s(round_: run_pb2.Round, now: datetime) -> float | None:
    """Returns seconds until the deadline, or None where there is none yet."""
    if not round_.deadline.seconds:
        return None
    return (round_.deadline.ToDatetime(UTC) - now).total_seconds()


def adapter_parameters(spec: tensor_pb2.AdapterSpec) -> int:
    """Returns the number of tuned values; see `AdapterSpec.parameters`."""
    trains = {tensor_pb2.ROLE_SENT, tensor_pb2.ROLE_LOCAL}
    tuned = (t for t in spec.tensors if not t.section and trains.intersection(t.roles))
    return sum(math.prod(tensor.shape) for tensor in tuned)


def full_bytes(run: run_pb2.Run, clients: int) -> int:
    """Returns what full fine-tuning would send each way for so many clients in one round; 0 if it is not known."""
    return run.model_parameters * BYTES_PER_PARAMETER * clients


def run_row(run: run_pb2.Run) -> Json:
    """Returns what a list of runs shows of one."""
    return {
        "run": run.id,
        "name": run.config.name,
        "state": state(run),
        "reason": run.reason,
        "version": run.version,
        "rounds": run.config.rounds.count,
        "model": run.config.model.name,
        "method": run.spec.method,
        "created_at": moment(run.created_at),
    }


def run_json(run: run_pb2.Run, rounds: Iterable[run_pb2.Round], current: run_pb2.Round | None) -> Json:
    """Returns the whole of a run: its state, every committed round, and the one in progress."""
    final = committed(rounds)
    last = final[-1].number if final else run.version
    return {
        "run": run.id,
        "name": run.config.name,
        "state": state(run),
        "reason": run.reason,
        "round": current.number if current else last,
        "version": run.version,
        "created_at": moment(run.created_at),
        "method": run.spec.method,
        "adapter_parameters": adapter_parameters(run.spec),
        "model_parameters": run.model_parameters,
        "backbone_fingerprint": run.backbone_fingerprint,
        "initial_metrics": dict(sorted(run.initial_metrics.items())),
        **({"privacy": stated} if (stated := privacy(run, (r.metrics for r in final))) else {}),
        "set_aside": list(run.set_aside),
        "declines": [{"client": d.client, "reasons": list(d.reasons), "at": moment(d.at)} for d in run.declines],
        "evaluators": evaluators(run),
        "progress": [client_progress_json(each) for each in run.awaited],
        "config": json_format.MessageToDict(run.config, preserving_proto_field_name=True),
        "rounds": [round_json(r, run) for r in final],
        "in_progress": progress_json(current) if current else None,
    }


def privacy(run: run_pb2.Run, figures: Iterable[Mapping[str, float]]) -> Json | None:
    """Returns the guarantee of a run whose committed rounds have these metrics; None if it adds no noise."""
    config = run.config.privacy
    if not config.mechanism:
        return None
    spent = max((metrics.get(EPSILON, 0.0) for metrics in figures), default=0.0)
    target = config.target_epsilon if config.HasField("target_epsilon") else None
    noise = config.noise_multiplier if config.HasField("noise_multiplier") else None
    return statement(config.mechanism, config.delta, spent, noise, target)


def change_json(run: run_pb2.Run, rounds: Iterable[run_pb2.Round], current: run_pb2.Round | None) -> Json:
    """Returns one line of a watch: as `run_json` without what never changes, `rounds` being those that did."""
    whole = run_json(run, rounds, current)
    constant = {"created_at", "method", "adapter_parameters", "model_parameters", "backbone_fingerprint", "config"}
    constant.add("privacy")  # it is of all rounds; those that changed have what is spent among their metrics
    return {key: value for key, value in whole.items() if key not in constant}


def round_json(round_: run_pb2.Round, run: run_pb2.Run) -> Json:
    """Returns a committed round."""
    clients = counted(round_)
    return {
        "version": round_.number,
        "clients": clients,
        **_bytes(round_),
        "full_bytes_each_way": full_bytes(run, len(clients)),
        "metrics": dict(sorted(round_.metrics.items())),
        "tickets": [_ticket(t, round_) for t in round_.tickets],
        "extensions": round_.extensions,
        "opened_at": moment(round_.opened_at),
        "committed_at": moment(round_.committed_at),
        "seconds": seconds(round_),
        "record_sha256": round_.record_sha256,
        **_events(round_),
    }


def _events(round_: run_pb2.Round) -> Json:
    """Returns the events of a round under "events", if it came with its record and that holds some."""
    events = json.loads(round_.record).get("events") if round_.record else None
    return {"events": events} if events else {}


def progress_json(round_: run_pb2.Round) -> Json:
    """Returns the round in progress."""
    return {
        "round": round_.number,
        "phase": phase(round_),
        "base_version": round_.base_version,
        "awaited": awaited(round_),
        "received": counted(round_),
        "opened_at": moment(round_.opened_at),
        "deadline": moment(round_.deadline),
        "extensions": round_.extensions,
        **_bytes(round_),
        "tickets": [_ticket(t, round_) for t in round_.tickets],
    }


def client_json(client: operator_service_pb2.Client) -> Json:
    """Returns a client."""
    return {
        "client": client.id,
        "role": role(client),
        "activity": client.activity,
        "doing": doing(client),
        "scoring": _task(client.scoring) if client.HasField("scoring") else None,
        "progress": client_progress_json(client.progress) if client.HasField("progress") else None,
        "updates": client.updates,
        "examples": client.capabilities.examples,
        "device": client.capabilities.device,
        "software": client.capabilities.software,
        "answers": [_answer(answer) for answer in client.answers],
        "first_seen": moment(client.first_seen),
        "last_seen": moment(client.last_seen),
    }


def token_json(token: access_service_pb2.Token) -> Json:
    """Returns an enrolment token, which has no secret."""
    return {
        "id": token.id,
        "name": token.name,
        "role": identity_role(token.role),
        "created_at": moment(token.created_at),
        "created_by": token.created_by,
        "expires_at": moment(token.expires_at),
        "used_at": moment(token.used_at),
    }


def identity_json(identity: access_service_pb2.Identity) -> Json:
    """Returns somebody who was enrolled or revoked."""
    return {
        "role": identity_role(identity.role),
        "name": identity.name,
        "issued_at": moment(identity.issued_at),
        "expires_at": moment(identity.expires_at),
        "fingerprint": identity.fingerprint,
        "revoked_at": moment(identity.revoked_at),
        "reason": identity.reason,
        "issuer": identity.issuer,
        "authority_replaced": identity.authority_replaced,
        "restored_at": moment(identity.restored_at),
    }


def progress_state(progress: run_pb2.ClientProgress) -> str:
    """Returns training, uploading, slow, stalled, silent, or refused where the server takes no transfer for now."""
    if progress.refused and _moves(progress):
        return "refused"
    return run_pb2.ProgressState.Name(progress.state).removeprefix("PROGRESS_STATE_").lower()


def is_well(progress: run_pb2.ClientProgress) -> bool:
    """Returns True if a client neither hangs nor is slower than usual, and the server takes its transfers."""
    return _moves(progress) and not progress.refused


def _moves(progress: run_pb2.ClientProgress) -> bool:
    return progress.state in (run_pb2.PROGRESS_STATE_TRAINING, run_pb2.PROGRESS_STATE_UPLOADING)


def awaited_words(run: run_pb2.Run, round_: run_pb2.Round) -> list[str]:
    """Returns the clients that a round awaits, by id; those first that hang or are slow, with what is known of them."""
    ill = {each.client: each.description for each in run.awaited if not is_well(each)}
    names = awaited(round_)
    well = zip(names, awaited_from(round_), strict=True)
    return [f"{name} ({ill[name]})" for name in ill if name in names] + [
        words for name, words in well if name not in ill
    ]


def client_progress_json(progress: run_pb2.ClientProgress) -> Json:
    """Returns how far a client is with an open ticket; times are in seconds."""
    return {
        "client": progress.client,
        "run": progress.run,
        "state": progress_state(progress),
        "step": progress.step,
        "steps": progress.steps,
        "updates": progress.updates,
        "updates_wanted": progress.updates_wanted,
        "seconds": round(progress.seconds, 1),
        "heard_s": round(progress.heard_s, 1),
        "moved_s": round(progress.moved_s, 1),
        "usual_s": round(progress.usual_s, 1) if progress.HasField("usual_s") else None,
        "description": progress.description,
        "refused": progress.refused,
    }


def doing(client: operator_service_pb2.Client) -> str:
    """Returns what a client is doing, in a few words."""
    if client.HasField("scoring"):
        return f"{client.activity} version {client.scoring.version}"
    if not client.HasField("progress"):
        return client.activity
    words = client.progress.description
    return words if words.startswith(client.activity) else f"{client.activity}: {words}"


def evaluators(run: run_pb2.Run) -> list[Json]:
    """Returns how far each evaluator is with a run."""
    return [
        {
            "evaluator": each.evaluator,
            "scored": each.scored,
            "backlog": each.backlog,
            "next_version": each.next_version if each.HasField("next_version") else None,
            "scoring_version": each.scoring_version if each.HasField("scoring_version") else None,
            "failed": [{"version": bad.version, "reason": bad.reason} for bad in each.failed],
        }
        for each in run.evaluators
    ]


def evaluator_line(row: Json) -> str:
    """Returns how far an evaluator is, of a row of `evaluators`."""
    now, backlog = row["scoring_version"], row["backlog"]
    parts = [] if now is None else [f"scores version {now}"]
    if backlog:
        newest = f", the newest is {row['next_version']}" if now is None else ""
        parts.append(f"{counted_noun(backlog, 'version')} to score{newest}")
    elif now is None:
        parts.append("nothing left to score")
    if row["failed"]:
        parts.append(f"{counted_noun(len(row['failed']), 'version')} could not be scored")
    return f"{row['evaluator']}: " + ", ".join(parts)


def failed_lines(row: Json) -> list[str]:
    """Returns a line for each version that an evaluator could not score, of a row of `evaluators`."""
    return [f"{row['evaluator']} could not score version {bad['version']}: {bad['reason']}" for bad in row["failed"]]


def _task(task: federation_service_pb2.EvaluationTask) -> Json:
    return {"run": task.run, "version": task.version}


def _answer(answer: operator_service_pb2.RunAnswer) -> Json:
    return {
        "run": answer.run,
        "answer": federation_service_pb2.Answer.Name(answer.answer).removeprefix("ANSWER_").lower(),
        "reasons": list(answer.reasons),
        "examples": answer.examples,
        "missed": answer.missed,
        "set_aside": answer.set_aside,
        "at": moment(answer.at),
    }


def _bytes(holder: run_pb2.Round | run_pb2.Ticket) -> Json:
    return {
        "wire_bytes_up": holder.wire_bytes_up,
        "wire_bytes_down": holder.wire_bytes_down,
        "payload_bytes_up": holder.payload_bytes_up,
        "payload_bytes_down": holder.payload_bytes_down,
    }


def staleness(ticket: run_pb2.Ticket, round_: run_pb2.Round) -> int:
    """Returns how many versions were made between the one that a ticket's update starts from and the round's."""
    return round_.base_version - ticket.base_version if ticket.HasField("base_version") else 0


def _ticket(ticket: run_pb2.Ticket, round_: run_pb2.Round) -> Json:
    return {
        "ticket": ticket.id,
        "client": ticket.client,
        "state": run_pb2.TicketState.Name(ticket.state).removeprefix("TICKET_STATE_").lower(),
        "reason": ticket.reason,
        "staleness": staleness(ticket, round_),
        "examples": ticket.examples,
        "weight": ticket.weight,
        "update_norm": ticket.update_norm,
        "payload_sha256": ticket.payload_sha256,
        **_bytes(ticket),
        "metrics": dict(sorted(ticket.metrics.items())),
    }
