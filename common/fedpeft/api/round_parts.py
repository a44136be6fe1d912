"""Folding what ListRounds and WatchRun send of rounds, a part at a time, into whole rounds (`operator_service`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from fedpeft.v1 import run_pb2


def folded(known: Mapping[int, run_pb2.Round], parts: Iterable[run_pb2.Round]) -> dict[int, run_pb2.Round]:
    """Returns rounds by number as they are known after parts of some of them came; no message is changed.

    Args:
        known: Rounds known before.
        parts: Received parts, the oldest first.
    """
    pieces: dict[int, list[run_pb2.Round]] = {}
    for part in parts:
        before = [known[part.number]] if part.number in known else []
        pieces.setdefault(part.number, before).append(part)
    return {**known, **{number: _whole(of_one) for number, of_one in pieces.items()}}


def _whole(pieces: Sequence[run_pb2.Round]) -> run_pb2.Round:
    if len(pieces) == 1 and not pieces[0].record_offset:
        return pieces[0]
    tickets = {ticket.id: ticket for piece in pieces for ticket in piece.tickets}
    if pieces[-1].phase == run_pb2.ROUND_PHASE_COMMITTED:  # tickets that are still out went on to the next round
        tickets = {key: each for key, each in tickets.items() if each.state != run_pb2.TICKET_STATE_ISSUED}
    new = run_pb2.Round()
    new.CopyFrom(pieces[-1])
    new.record, new.record_offset = _record(pieces), 0
    del new.tickets[:]
    new.tickets.extend(sorted(tickets.values(), key=lambda ticket: ticket.client))
    return new


def _record(pieces: Sequence[run_pb2.Round]) -> str:
    """Returns the record that some pieces of it make; one that begins anew takes the place of what was known."""
    record = ""
    for piece in pieces:
        if piece.record:
            record = record[: piece.record_offset] + piece.record
    return record
