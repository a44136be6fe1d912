"""Egress-log entries of the messages that leave this device."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from fedpeft.v1 import access_service_pb2 as access_pb
from fedpeft.v1 import federation_service_pb2 as pb
from fedpeft_client.egress.entries import EgressEntry, Kind

if TYPE_CHECKING:  # it needs NumPy, of which a command that enrols or leaves asks nothing
    from fedpeft_client.state.outbox import Pending
    from fedpeft_client.state.runs import KnownRun

CHUNK_OVERHEAD_BYTES = 32
"""Most bytes that a message adds to a chunk."""


def enrolment(request: access_pb.EnrollRequest) -> EgressEntry:
    """Returns the entry of the request for the first certificate; its secret is in no log."""
    return EgressEntry(Kind.ENROLMENT, request.ByteSize(), {"software": request.software})


def registration(request: pb.RegisterRequest) -> EgressEntry:
    """Returns the entry of a registration."""
    own = request.capabilities
    said = {
        "role": pb.ClientRole.Name(request.role).removeprefix("CLIENT_ROLE_").lower(),
        "software": own.software,
        "device": own.device,
        "examples": own.examples,
        "methods": list(own.methods),
        "encodings": list(own.encodings),
        "dry_run": request.dry_run,
    }
    return EgressEntry(Kind.REGISTRATION, request.ByteSize(), said, request.run)


def answer(request: pb.AnswerOfferRequest, name: str) -> EgressEntry:
    """Returns the entry of an answer to the offer of a run with that name."""
    said = {
        "answer": pb.Answer.Name(request.answer).removeprefix("ANSWER_").lower(),
        "examples": request.examples,
        "reasons": list(request.reasons),
    }
    return EgressEntry(Kind.ANSWER, request.ByteSize(), said, request.run, name)


def update(pending: Pending, offset: int) -> EgressEntry:
    """Returns the entry of an upload of an update that goes on at byte `offset`."""
    manifest = pending.header.manifest
    said = {
        "tensors": len(manifest.tensors),
        "parameters": sum(math.prod(tensor.shape) for tensor in manifest.tensors),
        "encoding": ", ".join(sorted({tensor.encoding for tensor in manifest.tensors})),
        "sha256": manifest.sha256.hex(),
        "examples": pending.header.examples,
        "metrics": dict(sorted(pending.header.metrics.items())),
        "offset": offset,
    }
    return EgressEntry(
        Kind.UPDATE,
        _upload_bytes(pending.header, offset),
        said,
        pending.run,
        round=pending.round,
        ticket=pending.ticket,
        payload_bytes=manifest.payload_bytes,
    )


def largest_update(run: KnownRun, number: int) -> int:
    """Returns the most bytes that the upload of an update of round `number` sends: its header and all of its chunks."""
    from fedpeft.rounds.metric_values import MAX_NAME_BYTES, MAX_TRAINING  # only now, for the same reason
    from fedpeft.rpc import wire

    header = pb.UpdateHeader(
        ticket="t" * 64,  # as long as an id may be
        manifest=wire.manifest_to_proto(run.largest_manifest(number)),
        examples=2**64 - 1,
        metrics={str(k).rjust(MAX_NAME_BYTES): 1.0 for k in range(MAX_TRAINING)},
    )
    return _upload_bytes(header, 0)


def _upload_bytes(header: pb.UpdateHeader, offset: int) -> int:
    """Returns the most bytes of the messages of an upload that goes on at byte `offset` of the payload.

    That is where all of its chunks are small, as on a slow line.
    """
    from fedpeft.adapters.payload import LEAST_CHUNK_BYTES  # only now, for the same reason

    left = header.manifest.payload_bytes - offset
    overhead_bytes = math.ceil(left / LEAST_CHUNK_BYTES) * CHUNK_OVERHEAD_BYTES
    return pb.PushUpdateRequest(header=header).ByteSize() + left + overhead_bytes


def leave(request: access_pb.LeaveRequest) -> EgressEntry:
    """Returns the entry of the message that this client leaves for good."""
    return EgressEntry(Kind.LEAVE, request.ByteSize(), {"reason": request.reason})


def withdrawal(request: pb.WithdrawRequest, run: str, number: int) -> EgressEntry:
    """Returns the entry of a ticket of round `number` of a run that is given back."""
    said = {"reason": request.reason}
    return EgressEntry(Kind.WITHDRAWAL, request.ByteSize(), said, run, round=number, ticket=request.ticket)


def evaluation(request: pb.PushEvaluationRequest) -> EgressEntry:
    """Returns the entry of the figures of a version."""
    said: dict[str, Any] = {"version": request.version, "metrics": dict(sorted(request.metrics.items()))}
    if request.failure:
        said["failure"] = request.failure
    return EgressEntry(Kind.EVALUATION, request.ByteSize(), said, request.run)
