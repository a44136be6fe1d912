"""The state of a client as its state directory tells it, without a server and while the client runs or not."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from fedpeft import ids
from fedpeft.errors import FedpeftError
from fedpeft.identity import certificates
from fedpeft.identity.folder import Identity
from fedpeft.process import locks
from fedpeft_client.commands import left_state
from fedpeft_client.egress.entries import FILE as LEDGER
from fedpeft_client.egress.entries import Kind, LoggedEntry, Outcome, read, unreadable_text
from fedpeft_client.enrolment import site_identity
from fedpeft_client.owner.policy import find, noted
from fedpeft_client.state import contact
from fedpeft_client.state.state_dir import BOX

DAY = timedelta(days=1)


@dataclass(frozen=True)
class IdentityStatus:
    """Identity of the client.

    Attributes:
        role: client or evaluator; empty if it cannot be told.
        name: Its name; likewise.
        server: HOST:PORT; likewise.
        expires_at: End of its certificate; None likewise.
        renews_at: Time of its renewal; None likewise.
        problem: Fault of it; empty if there is none.
    """

    role: str = ""
    name: str = ""
    server: str = ""
    expires_at: datetime | None = None
    renews_at: datetime | None = None
    problem: str = ""


@dataclass(frozen=True)
class RunStatus:
    """The client's answer to a run, and its updates for it.

    Attributes:
        run: Its id.
        name: Its name; may be empty.
        answer: accepted or declined, as it was said last.
        reasons: Reasons for which it was declined, as the server was told.
        at: Time of the answer.
        updates: Updates that the server confirmed.
    """

    run: str
    name: str
    answer: str
    reasons: tuple[str, ...]
    at: datetime
    updates: int


@dataclass(frozen=True)
class SiteStatus:
    """The state of a client.

    Attributes:
        state_dir: Its state directory.
        process: The process of its agent, or of another command that holds the directory; None if there is none.
        identity: The client's identity; None if it was never enrolled.
        server: HOST:PORT of the server that answered last; empty if none did.
        refused_at: Time since which the server refuses this client; None if it does not, or has answered since.
        refusal: Cause of that; empty likewise.
        last_contact: Time of the server's last answer; None if it never answered.
        left_at: Time at which it left for good; None if it did not.
        pending: The update that waits to be sent, as {"run", "round", "payload_bytes"}; None if there is none.
        runs: Its answers to the runs, newest first.
        bytes_today: Bytes sent in the last 24 hours.
        bytes_a_day: Most bytes a day; None if that is not limited.
        policy: The file of the policy; None if nothing is limited.
        problems: Parts that could not be read, a sentence each.
    """

    state_dir: Path
    process: str | None
    identity: IdentityStatus | None
    last_contact: datetime | None
    left_at: datetime | None
    server: str = ""
    refused_at: datetime | None = None
    refusal: str = ""
    pending: dict[str, Any] | None = None
    runs: tuple[RunStatus, ...] = ()
    bytes_today: int = 0
    bytes_a_day: int | None = None
    policy: Path | None = None
    problems: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Returns all of it for a program; times are in ISO 8601."""
        return json.loads(json.dumps(asdict(self), default=_plain))  # type: ignore[no-any-return]


def read_status(state_dir: Path, policy: Path | None = None, identity: Path | None = None) -> SiteStatus:
    """Reads the state of a client; nothing is written, and a running client is not held up.

    Args:
        state_dir: Its state directory.
        policy: Its policy file; the one that it began with last, or that in the state directory, if absent.
        identity: Its identity folder; that of the state directory if absent.
    """
    now, problems = datetime.now(UTC), list[str]()
    process = locks.holder_of(state_dir)
    booked: list[LoggedEntry] = []
    if (state_dir / LEDGER).exists():
        try:
            egress_log = read(state_dir / LEDGER)
            booked = list(egress_log.booked.values())
            if egress_log.unreadable:
                problems.append(f"{unreadable_text(egress_log.unreadable)}; more may have left than is counted")
        except FedpeftError as error:
            problems.append(error.message)
    rules, file = None, None
    try:
        rules, file = find(policy or noted(state_dir), state_dir)
    except FedpeftError as error:
        problems.append(error.message)
    refused_at, refusal = contact.refusal(state_dir) or (None, "")
    return SiteStatus(
        state_dir,
        process,
        _identity(site_identity.find(identity, state_dir), now),
        contact.last(state_dir),
        left_state.left_at(state_dir),
        contact.server(state_dir),
        refused_at,
        refusal,
        _pending(state_dir / BOX, problems),
        tuple(_runs(booked)),
        sum(each.entry.wire_bytes for each in booked if each.latest >= now - DAY),
        rules.transfer.max_bytes_a_day if rules else None,
        file,
        problems,
    )


def _identity(where: Path | None, now: datetime) -> IdentityStatus | None:
    if where is None:
        return None
    try:
        found = Identity.load(where)
        one = found.certificate
        problem = ""
        try:
            certificates.check_time(one, now)
        except FedpeftError as error:
            problem = error.message
        return IdentityStatus(
            str(found.subject.role),
            found.subject.name,
            found.server,
            one.not_valid_after_utc,
            certificates.renewal(one),
            problem,
        )
    except FedpeftError as error:
        return IdentityStatus(problem=error.message)


def _pending(outbox: Path, problems: list[str]) -> dict[str, Any] | None:
    try:
        record = json.loads((outbox / "ticket.json").read_bytes())
        return {
            "run": str(record["run"]),
            "round": int(record["round"]),
            "payload_bytes": int(record["header"]["manifest"].get("payloadBytes", 0)),
        }
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        problems.append(f"the pending update in {outbox} cannot be read: {error}")
        return None


def _runs(booked: Iterable[LoggedEntry]) -> list[RunStatus]:
    answers: dict[str, LoggedEntry] = {}
    names: dict[str, str] = {}
    updates: dict[str, set[str]] = {}
    for each in booked:
        gone = each.entry
        if gone.name:
            names[gone.run] = gone.name
        if gone.kind is Kind.ANSWER:
            answers[gone.run] = each
        elif gone.kind is Kind.UPDATE and each.outcome is Outcome.RECEIVED:
            updates.setdefault(gone.run, set()).add(gone.ticket)
    found = [
        RunStatus(
            run,
            names.get(run, ""),
            str(each.entry.said.get("answer", "")),
            tuple(map(str, each.entry.said.get("reasons", ()))),
            each.at,
            len(updates.get(run, ())),
        )
        for run, each in answers.items()
        if ids.RUN.fullmatch(run)
    ]
    return sorted(found, key=lambda status: status.at, reverse=True)


def _plain(value: object) -> str:
    return re.sub(r"\.\d+", "", value.isoformat()) if isinstance(value, datetime) else str(value)
