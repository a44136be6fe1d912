"""Checks on a server's answers before anything is done with them: ids of a plain form, numbers within bounds.

A server is not trusted: an id becomes the name of a folder, a deadline a date, an offset a place in a file, a sentence
a line in a log. Whatever an answer holds that the protocol does not allow is `Internal`, a fault of the server, named
with its field; nothing is made, kept or sent because of it.
"""

from __future__ import annotations

import hashlib
from datetime import UTC
from re import Pattern

from fedpeft import ids
from fedpeft.errors import FedpeftError, Internal
from fedpeft.untrusted_text import plain
from fedpeft.v1 import federation_service_pb2 as pb
from fedpeft.v1 import run_pb2

MAX_SAID = 500
"""Most characters of a server's sentence that are logged."""
DIGEST_BYTES = 32
MAX_ROUND = 1_000_000
"""The last round that a run file can have."""


def check_answer(answer: pb.AwaitRoundResponse, wanted: str) -> None:
    """Checks what a server answers to a client that waits for work.

    Args:
        answer: The answer.
        wanted: The run that was asked for; empty for any.

    Raises:
        Internal: If it is none that the protocol allows.
    """
    match answer.WhichOneof("outcome"):
        case "offer":
            found = answer.offer.run.id
            check_run(answer.offer.run)
        case "training":
            found = answer.training.run
            _id("training.run", found, ids.RUN)
            _task(answer.training)
        case "evaluation":
            found = answer.evaluation.run
            _id("evaluation.run", found, ids.RUN)
        case "idle":
            return
        case _:
            raise _fault("outcome", "none that this client knows")
    if wanted and found != wanted:
        raise _fault("run", f"{found!r}; {wanted!r} was asked for")


def check_run(run: run_pb2.Run) -> None:
    """Checks the id of a run that a server describes.

    Raises:
        Internal: If it is none that a run may have.
    """
    _id("run.id", run.id, ids.RUN)


def check_standing(answer: pb.GetUploadResponse, payload_bytes: int, ticket: str) -> None:
    """Checks what a server says about an upload of so many bytes.

    Raises:
        Internal: If it claims to hold more, or gives a receipt for another ticket.
    """
    if answer.committed_bytes > payload_bytes:
        raise _fault("committed_bytes", f"{answer.committed_bytes}; the update has {payload_bytes} bytes")
    if answer.state == run_pb2.TICKET_STATE_RECEIVED:
        _receipt("receipt", answer.receipt, ticket)


def check_receipt(answer: pb.PushUpdateResponse, ticket: str, sha256: bytes) -> None:
    """Checks the receipt of an update.

    Raises:
        Internal: If it is for another ticket or other bytes.
    """
    _receipt("", answer, ticket)
    if answer.sha256 != sha256:
        raise _fault("sha256", f"{answer.sha256[:DIGEST_BYTES].hex()}; {sha256.hex()} was sent")


def deadline(task: pb.TrainingTask) -> str:
    """Returns the deadline of a ticket as ISO 8601 in UTC; `none` if it has none. One that is past says nothing."""
    if not task.HasField("deadline"):
        return "none"
    return task.deadline.ToDatetime(tzinfo=UTC).isoformat(timespec="seconds")


def said(text: str) -> str:
    """Returns what is logged of a server's sentence: one line, of bounded length."""
    return plain(text[:MAX_SAID])


def terms_of(run: run_pb2.Run) -> str:
    """Returns a digest of what of a run never changes, so that the same id with other terms is found out."""
    kept = run_pb2.Run(id=run.id, config=run.config, spec=run.spec, backbone_fingerprint=run.backbone_fingerprint)
    return hashlib.sha256(kept.SerializeToString(deterministic=True)).hexdigest()


def _task(task: pb.TrainingTask) -> None:
    _id("training.ticket", task.ticket, ids.TICKET)
    if not 1 <= task.round <= MAX_ROUND:
        raise _fault("training.round", f"{task.round}; 1 to {MAX_ROUND} is possible")
    if task.version >= task.round:
        raise _fault("training.version", f"{task.version}, which round {task.round} cannot begin with")
    try:
        deadline(task)
    except (ValueError, OverflowError):
        raise _fault("training.deadline", f"{task.deadline.seconds} s, which is no date") from None


def _receipt(field: str, receipt: pb.PushUpdateResponse, ticket: str) -> None:
    path = f"{field}." if field else ""
    if receipt.ticket != ticket:
        raise _fault(f"{path}ticket", f"{receipt.ticket!r}; {ticket!r} was sent for")
    if len(receipt.sha256) != DIGEST_BYTES:
        raise _fault(f"{path}sha256", f"of {len(receipt.sha256)} bytes, not {DIGEST_BYTES}")


def _id(field: str, text: str, form: Pattern[str]) -> None:
    if not form.fullmatch(text):
        raise _fault(field, f"{text[:80]!r}, which is not 1 to 64 letters, digits, underscores or hyphens")


def _fault(field: str, found: str) -> FedpeftError:
    return Internal(f"the server's answer does not follow the protocol: {field} is {plain(found[:MAX_SAID])}")
