"""Folding what ListRounds and WatchRun send of rounds, a part at a time, into whole rounds (`operator_service`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from fedpeft.v1 import run_pb2


def folded(known: Mapping[int, run_pb2.Round], parts: Iterable[run_pb2.Round]) -> dict[int, run_pb2.Round]:
    """Returns rounds by number as they are known after parts of some of them came; no message is changed.

    Args:
        known: What was known before.
        parts: What came, the oldest first.
    """
    pieces: dict[int, list[run_pb2.Round]] = {}
    for part in parts:
        before = [known[part.number]] if part.number in known else []
        pieces.setdefault(part.number, before).append(part)
    return {**known, **{number: _whole(of_one) for number, of_one in pieces.items()}}


def _whole(pieces: Sequence[run_pb2.Round]) -> run_pb2.Round:
    if len(pieces) == 1:
        return pieces[0]
    tickets = {ticket.id: ticket for piece in pieces for ticket in piece.tickets}
    new = run_pb2.Round()
    new.CopyFrom(pieces[-1])
    new.record = next((piece.record for piece in reversed(pieces) if piece.record), "")
    del new.tickets[:]
    new.tickets.extend(sorted(tickets.values(), key=lambda ticket: ticket.client))
    return new
