"""Entries of the egress log, for tests."""

from __future__ import annotations

from fedpeft_client.egress.entries import EgressEntry, Kind


def update(size: int, ticket: str = "ticket-1", offset: int = 0) -> EgressEntry:
    said = {"tensors": 2, "parameters": 25, "encoding": "float32", "sha256": "ab" * 32, "examples": 7, "offset": offset}
    return EgressEntry(Kind.UPDATE, size, said, "run-1", round=3, ticket=ticket, payload_bytes=100)


def answer(size: int = 20) -> EgressEntry:
    return EgressEntry(Kind.ANSWER, size, {"answer": "accepted", "examples": 7, "reasons": []}, "run-1", "emoji")
