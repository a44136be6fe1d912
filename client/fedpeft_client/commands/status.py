"""`fedpeft-client status`: who this client is, whether it runs, and what it did, from its state directory alone."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from fedpeft.errors import FedpeftError
from fedpeft.formatting import counted, size
from fedpeft.identity.folder import Identity
from fedpeft.process import flags
from fedpeft.process.output import say, say_json
from fedpeft.rpc import diagnosis
from fedpeft.rpc.diagnosis import Trust
from fedpeft.untrusted_text import plain
from fedpeft_client.commands.site_status import RunStatus, SiteStatus, read_status
from fedpeft_client.enrolment import site_identity
from fedpeft_client.error_policy import Exit
from fedpeft_client.state import state_flag

_MOMENT = "%Y-%m-%d %H:%M UTC"
MOST_RUNS = 20
"""Runs that are listed; --json has all."""


def main(arguments: list[str]) -> int:
    """Shows the state of a client, which may be running.

    Raises:
        SettingsInvalid: If no state directory was named.
        StateInvalid: If it is not there.
    """
    given = _parser().parse_args(arguments)
    found = read_status(state_flag.existing(given.state_dir), given.policy, given.identity)
    reached = _reached(found, given.identity) if given.ask else None
    if given.json:
        say_json({**found.as_json(), **({"reached": not reached, "cause": reached} if given.ask else {})})
        return Exit.UNREACHABLE if reached else Exit.DONE
    for key, text in _lines(found):
        say(f"{key:<13} {plain(text)}".rstrip())
    if given.ask:
        say(f"{'asked now':<13} {reached or 'it answers, and takes the certificate'}")
    return Exit.UNREACHABLE if reached else Exit.DONE


def _reached(found: SiteStatus, identity: Path | None) -> str:
    """Returns why the server is not reached; empty if a connection comes about, now at least."""
    where = site_identity.find(identity, found.state_dir)
    if where is None:
        return "there is no identity, so the server is not known here"
    try:
        own = Identity.load(where)
    except FedpeftError as error:
        return error.message
    return str(diagnosis.diagnose(own.server, Trust.of(own)) or "")


def _lines(found: SiteStatus) -> Iterator[tuple[str, str]]:
    now = datetime.now(UTC)
    yield from _who(found)
    if found.left_at:
        yield "left", f"at {found.left_at:{_MOMENT}}: the server refuses this identity"
    if found.refused_at:
        yield "refused", f"by the server at {found.refused_at:{_MOMENT}}: {found.refusal}"
    yield "agent", f"running as process {found.process}" if found.process else "not running"
    last = found.last_contact
    if last or not found.left_at:
        yield "last contact", f"{last:{_MOMENT}}, {_span((now - last).total_seconds())} ago" if last else "never"
    if found.pending:
        payload, run = size(found.pending["payload_bytes"]), found.pending["run"]
        yield (
            "pending",
            f"an update of {run}, round {found.pending['round']}, {payload}, is trained and not received yet",
        )
    else:
        yield "pending", "no update waits to be sent"
    limit = f"; the policy allows {size(found.bytes_a_day)} a day" if found.bytes_a_day else ", without a limit"
    yield "last 24 h", f"{size(found.bytes_today)} sent{limit}"
    yield "policy", str(found.policy) if found.policy else "none; nothing is limited"
    for run in found.runs[:MOST_RUNS]:
        yield "run", _run(run)
    if len(found.runs) > MOST_RUNS:
        yield "", f"and {len(found.runs) - MOST_RUNS} earlier ones"
    if not found.runs:
        yield "runs", "none offered yet"
    for problem in found.problems:
        yield "problem", problem


def _who(found: SiteStatus) -> Iterator[tuple[str, str]]:
    identity = found.identity
    if identity is None and found.server and not found.left_at:
        yield "identity", "none: this client calls over plain text, without a certificate"
        yield "server", found.server
        return
    if identity is None:
        yield "identity", "none: enroll first (fedpeft-client enroll)"
        return
    if identity.name:
        yield "identity", f"{identity.role} {identity.name}"
        yield "server", identity.server
    if identity.expires_at and identity.renews_at and not identity.problem:
        yield "certificate", f"until {identity.expires_at:{_MOMENT}}, renewed from {identity.renews_at:{_MOMENT}} on"
    if identity.problem:
        yield "problem", identity.problem


def _run(run: RunStatus) -> str:
    what = f"{run.name or run.run} ({run.run}): " if run.name else f"{run.run}: "
    if run.reasons:
        return f"{what}{run.answer}: {'; '.join(run.reasons)}"
    return f"{what}{run.answer}, {counted(run.updates, 'update')} received"


def _span(seconds: float) -> str:
    """Returns a time that has passed, in its largest unit."""
    for unit, length in (("day", 86_400), ("hour", 3600), ("minute", 60)):
        if seconds >= length:
            return counted(int(seconds // length), unit)
    return counted(max(0, int(seconds)), "second")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fedpeft-client status",
        description="Shows who this client is, whether it runs, when the server answered last, what waits to be sent, "
        "which runs it accepted or declined and why, and what left in the last 24 hours. It asks no server unless told "
        "to, and a client may be running.",
        epilog="Example: fedpeft-client status --state-dir /var/lib/fedpeft",
    )
    state_flag.add(parser)
    state_flag.add_identity(parser)
    said = "its policy, if that is another than the client began with last ({})"
    flags.add_path(parser, "--policy", "FEDPEFT_CLIENT_POLICY", said, metavar="FILE")
    parser.add_argument(
        "--ask", action="store_true", help="also look whether the server is reached now; 3 if it is not"
    )
    parser.add_argument("--json", action="store_true", help="JSON in place of text")
    return parser
