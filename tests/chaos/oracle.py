"""The promises, held against what the processes of a world left: databases, files and logs."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.numpy
from simulated_time.replay import differences

from fedpeft_client.egress import entries

from .machines import Machine, read_only
from .schedule import LINKS, Full, Line, Schedule, Unforced

REFUSALS = ("Input/output error", "No space left on device", "ENOSPC", "no room", "disk I/O error")
"""Words of errors that a disk without room, or one that cannot be written, explains."""

AWAY = (
    "cannot be reached",
    "is not reached",
    "the server stood still",
    "DATABASE_UNAVAILABLE",
    "STORE_UNAVAILABLE",
    "Generic S3 error",
)
"""Words of errors that a database or a bucket out of reach explains, or a stop that outlasts a transaction's time."""


@dataclass
class Found:
    """Findings: broken promises, the digest of the last version, and what is worth a line."""

    faults: list[str] = field(default_factory=list)
    adapter: str = ""
    notes: list[str] = field(default_factory=list)


def look(
    logs: Path,
    machines: dict[str, Machine],
    schedule: Schedule,
    data: Path,
    opened: Callable[[], Any] | None = None,
) -> Found:
    """Returns what is to be said of a world that is over.

    Args:
        logs: The folder of all logs.
        machines: The machines by name.
        schedule: The faults.
        data: The data folder of the daemon, or what several share as one has it.
        opened: Opens the database that several share.
    """
    found = Found()
    lines = [(log.name, line) for log in sorted(logs.glob("*.log")) for line in _lines(log)]
    found.faults += _unexpected(lines, schedule)
    for machine in machines.values():
        excused = any(isinstance(fault, Full | Unforced) for fault in schedule.faults)
        for life, end in machine.ends:
            log = logs / f"{machine.name}.{life}.log"
            (found.notes if excused or _never_served(log, schedule) else found.faults).append(end)
    database = data / "fedpeft.db"
    if not opened and not database.exists():
        return Found([*found.faults, "there is no database"])
    with closing(opened() if opened else read_only(database)) as read:
        last = read.execute("select version, draw from versions order by version desc limit 1").fetchone()
        newest, draw = last or (0, "")
        found.faults += _uncounted(read, _receipts(lines))
        found.faults += _unbooked(read, data / "spool")
        if not any(isinstance(fault, Line) and fault.what == "repeat" for fault in schedule.faults):
            found.faults += _untold(read, machines)  # else the server gets more than was sent
    if schedule.is_buffered:
        found.faults += differences(data, logs.with_name("replay"), opened)
    try:
        found.adapter = _digest(data / "blobs", newest, draw)
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        found.faults.append(f"version {newest} cannot be read: {error}")
    for name in LINKS:
        if schedule.is_exact and (left := _left_over(machines[name].disk.path / "state")):
            found.faults.append(f"{name} still has {left}, and the run is over")
    return found


def last_lines(logs: Path, most: int = 400) -> list[str]:
    """Returns the last lines of all logs, by time."""
    lines = [
        (str(line.get("timestamp", "")), f"{log.name} {line}") for log in logs.glob("*.log") for line in _lines(log)
    ]
    return [line for _, line in sorted(lines)][-most:]


def _lines(log: Path) -> Iterator[dict[str, Any]]:
    """Yields the lines of a process; one that death cut off is left out, and one that is no JSON has only a text."""
    whole, _, _ = log.read_bytes().rpartition(b"\n")
    for line in whole.decode(errors="replace").splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            yield {"text": line}


def _receipts(lines: list[tuple[str, dict[str, Any]]]) -> dict[tuple[str, int], str]:
    """Returns the digests that clients have receipts for."""
    return {
        (line["client"], int(line["round"])): line["sha256"]
        for _, line in lines
        if line.get("event") == "update received" and "sha256" in line and "client" in line
    }


def _uncounted(read: Any, receipts: dict[tuple[str, int], str]) -> Iterator[str]:
    counted = read.execute(
        "select client, number, payload_sha256 from tickets join updates on ticket = id where state = 'received'"
    ).fetchall()
    for (client, number), times in Counter((client, number) for client, number, _ in counted).items():
        if times != 1:
            yield f"{client} counts {times} times in round {number}"
    there = {(client, number): sha256 for client, number, sha256 in counted}
    for (client, number), sha256 in receipts.items():
        if there.get((client, number)) != sha256:
            yield f"{client} has a receipt for round {number} that does not count: {there.get((client, number))}"
    for number, record in read.execute("select number, record from rounds where record != ''"):
        folded = [each["client"] for each in json.loads(record)["contributions"]]
        if len(folded) != len(set(folded)):
            yield f"round {number} folds a client twice: {folded}"


def _unbooked(read: Any, spool: Path) -> Iterator[str]:
    """Yields where the server counted fewer bytes than arrived."""
    rows = read.execute("select number, client, wire_up, wire_down, payload_up, payload_down from traffic").fetchall()
    for number, client, up, down, payload_up, payload_down in rows:
        if up < payload_up or down < payload_down:
            yield f"{client} in round {number}: {up}, {down} bytes, with {payload_up}, {payload_down} of payload"
    booked = {(number, client): payload_up for number, client, _, _, payload_up, _ in rows}
    counted = (
        "select number, client, id, payload_sha256 from tickets join updates on ticket = id where state = 'received'"
    )
    for number, client, ticket, sha256 in read.execute(counted):
        update = spool / f"{ticket}.{sha256}.update"
        size = update.stat().st_size if update.exists() else 0  # gone with a round that a stop ended
        if booked.get((number, client), 0) < size:
            yield f"{client} in round {number}: {booked.get((number, client))} bytes of an update of {size} are booked"


def _untold(read: Any, machines: dict[str, Machine]) -> Iterator[str]:
    """Yields clients whose own log tells less than what the server got from them."""
    for client, got in read.execute("select client, sum(wire_up) from traffic group by client"):
        booked = entries.read(machines[client].disk.path / "state" / entries.FILE).booked.values()
        told = sum(each.entry.wire_bytes for each in booked)
        if told < got:
            yield f"{client} told of {told} bytes in its own log, and the server got {got}"


def _left_over(state: Path) -> list[str]:
    """Returns what a client should not have any more."""
    return [path.name for path in state.glob("*") if path.name.startswith(("pending", "settled-", "set-aside"))]


def _digest(blobs: Path, version: int, draw: str) -> str:
    """Returns the digest of a version's tensors; `draw` is in the name of its file."""
    (file,) = blobs.glob(f"runs/*/versions/{version:06}{f'-draw-{draw}' if draw else ''}.safetensors")
    digest = hashlib.sha256()
    for name, values in sorted(safetensors.numpy.load_file(file).items()):
        digest.update(name.encode() + values.tobytes())
    return digest.hexdigest()


def _unexpected(lines: list[tuple[str, dict[str, Any]]], schedule: Schedule) -> Iterator[str]:
    """Yields what no process should have logged."""
    ill = {fault.machine for fault in schedule.faults if isinstance(fault, Full | Unforced)}
    for log, line in lines:
        if "text" in line or line.get("level") in ("error", "critical") or "exception" in line:
            is_ill = bool(ill & {log.split(".")[0], "server"})
            words = (*(REFUSALS if is_ill else ()), *(AWAY if schedule.are_several else ()))
            if not any(each in str(line) for each in words):
                yield f"{log}: {line}"


def _never_served(log: Path, schedule: Schedule) -> bool:
    """Returns True for a life of one of several daemons that began while what they share was away, or stood still."""
    lines = log.read_text(errors="replace") if schedule.are_several else ""
    return any(words in lines for words in AWAY) and '"event": "serving"' not in lines
