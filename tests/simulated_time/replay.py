"""A buffered run replayed from what a server kept: its records, the order of receipt, and the updates."""

from __future__ import annotations

import json
import math
import shutil
import sqlite3
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from fedpeft.api.verification import Replay
from fedpeft.config import RoundsConfig
from fedpeft.errors import FedpeftError
from fedpeft.rounds.commit import RunHeader
from fedpeft.rounds.events import Aggregated, Received, Waiting
from fedpeft.rounds.record import Record, parse, verify_chain
from fedpeft.rounds.state_machine import Phase, Round, advance
from fedpeft.rounds.tickets import TicketState
from fedpeft_server.store import stored
from fedpeft_server.store.store import version_key


def differences(data: Path, scratch: Path, opened: Callable[[], Any] | None = None) -> Iterator[str]:
    """Yields what of the only run of a server's data folder another history, or other bits, would follow from.

    Args:
        data: The folder; the server kept the updates.
        scratch: An empty folder.
        opened: Opens the database, if that is none of the folder's.
    """
    with closing(opened() if opened else sqlite3.connect(data / "fedpeft.db")) as read:
        ((run, config, spec, fingerprint),) = read.execute("select id, config, spec, backbone_fingerprint from runs")
        header = RunHeader(run, stored.load_config(config), stored.load_spec(spec), fingerprint)
        texts = [text for (text,) in read.execute("select record from rounds where record != '' order by number")]
        issued = read.execute("select number, client, id from tickets").fetchall()
        order = list[str]()
        told = "select action, details from audit where action in ('update.received', 'update.lost') order by number"
        for action, details in read.execute(told):
            ticket = json.loads(details)["ticket"]
            if action == "update.lost":  # what follows is as if it had not come
                order.remove(ticket)
            else:
                order.append(ticket)
        named = read.execute("select version, sha256, source, draw from versions")
        files = {version: (sha256, version_key(run, version, *rest)) for version, sha256, *rest in named}
    try:
        verify_chain(texts)
    except FedpeftError as error:
        yield str(error)
        return
    records = [parse(text) for text in texts]
    yield from _by_the_order_of_receipt(run, header.config.rounds, records, issued, order)
    yield from _to_the_bit(data, scratch, header, records, files)


def _by_the_order_of_receipt(
    run: str, config: RoundsConfig, records: list[Record], issued: list[tuple[int, str, str]], order: list[str]
) -> Iterator[str]:
    """Yields differences between the records and what the pure core makes of the receipts in their order."""
    # Who was given a ticket in a round has a place from its beginning on: places are no part of a record.
    config = config.model_copy(update={"concurrency": 1000, "quorum": 1, "min_available": 1})
    given: dict[int, set[str]] = defaultdict(set)
    for number, client, ticket in issued:
        given[number] |= {client} if ticket in order else set()
    state, left = Round(run, 1), list(order)
    for record in records:
        # Fewer than `clients` were enough where a deadline passed.
        goal = config.model_copy(update={"clients": len(record.contributions)})
        state, _ = advance(state, Waiting(frozenset(given[record.round]), waited_s=math.inf), config, 0.0)
        while left and state.phase is Phase.OPEN:
            state, _ = advance(state, Received(left.pop(0)), goal, 0.0)
        found = {(t.client, t.id, state.staleness(t)) for t in state.in_state(TicketState.RECEIVED)}
        recorded = {(c.client, c.ticket, c.staleness) for c in record.contributions}
        if found != recorded:
            yield f"version {record.round} has {sorted(recorded)}; the receipts in their order make {sorted(found)}"
            return
        state = advance(state, Aggregated(), config, 0.0)[0].following(config, 0.0)
    if left:
        yield f"receipts that count in no version: {left}"


def _to_the_bit(
    data: Path, scratch: Path, header: RunHeader, records: list[Record], files: dict[int, tuple[str, str]]
) -> Iterator[str]:
    """Yields differences between the versions and what the kept updates are folded to again."""
    scratch.mkdir(exist_ok=True)
    replay = Replay(header, data / "spool", scratch, records)
    for record in records:
        if files[record.round][0] != record.adapter_sha256:
            yield f"version {record.round} is not what its record says"
        try:
            replay.fold(record, data / "blobs" / files[record.round - 1][1])
        except FedpeftError as error:
            yield str(error)
            return
    shutil.rmtree(scratch)
