"""`fedpeft-client leave`: takes this site out for good, and says what is gone and what stays."""

from __future__ import annotations

import argparse
import asyncio
from datetime import UTC, datetime
from pathlib import Path

from fedpeft.errors import (
    CertificateExpired,
    CertificateRevoked,
    IdentityInvalid,
    Unavailable,
)
from fedpeft.formatting import counted, size
from fedpeft.identity.folder import Identity
from fedpeft.identity.subject import Role, Subject
from fedpeft.process import logs
from fedpeft.process.output import note, say
from fedpeft.untrusted_text import MAX_REASON
from fedpeft.v1 import access_service_pb2 as pb
from fedpeft_client.commands import left_state
from fedpeft_client.egress import message_entries
from fedpeft_client.egress.log import EgressLog
from fedpeft_client.enrolment import site_identity
from fedpeft_client.enrolment.renewal import check_valid
from fedpeft_client.error_policy import Exit
from fedpeft_client.owner.metrics import Metrics
from fedpeft_client.state import state_flag
from fedpeft_client.state.contact import Contact
from fedpeft_client.state.state_dir import StateDirectory
from fedpeft_client.timing import TIMING
from fedpeft_client.uplink.channel import Channel
from fedpeft_client.uplink.retry import Retry
from fedpeft_client.uplink.traffic import Traffic


def main(arguments: list[str]) -> int:
    """Takes this site out.

    Raises:
        FedpeftError: What kept it from it; then nothing was removed.
    """
    given = _parser().parse_args(arguments)
    state_dir = state_flag.existing(given.state_dir)
    where = site_identity.find(given.identity, state_dir)
    with StateDirectory(state_dir) as directory:  # a client that runs there must be stopped first
        if where is None:
            note("this client has no identity, so there is nothing for a server to revoke")
        elif given.offline:
            note(f"the server was not told: ask its operator for fedpeft client revoke {_name(where)}")
        else:
            _tell(Identity.load(where), directory, given.reason)
        gone = left_state.remove(directory, given.identity) if given.remove else left_state.drop_unsent(directory)
        for path, what, size_bytes in gone:
            say(f"removed  {path}: {what}" + (f", {size(size_bytes)}" if size_bytes else ""))
        for path, what in left_state.kept(directory.path, given.identity):
            say(f"kept     {path}: {what}")
    _say_rest(state_dir, removed=given.remove)
    return Exit.DONE


def _tell(identity: Identity, directory: StateDirectory, reason: str) -> None:
    """Tells the server, which gives open tickets back and revokes the identity.

    Raises:
        FedpeftError: If it does not hear it.
    """
    subject = identity.subject
    if subject.role not in (Role.CLIENT, Role.EVALUATOR):
        raise IdentityInvalid(
            f"{identity.folder} is the identity of {subject}, which cannot take part in runs; another "
            "operator revokes it"
        )
    try:
        check_valid(identity, datetime.now(UTC))
        tickets = asyncio.run(_left(identity, directory, reason))
    except CertificateRevoked:
        say(_refused(identity.server, subject, left_state.left_at(directory.path)))
    except Unavailable as error:
        raise type(error)(
            f"{error.message}. Nothing was changed: repeat this when the server is back, or leave without telling it "
            "(--offline) and ask its operator to revoke this client"
        ) from None
    except CertificateExpired:
        end = identity.certificate.not_valid_after_utc
        raise CertificateExpired(
            f"the certificate of {subject} ended at {end:%Y-%m-%d %H:%M} UTC, so the server accepts no call from this "
            "client: leave without telling it (--offline) and ask its operator to revoke this client"
        ) from None
    else:
        say(f"left {identity.server} as {subject}: the server refuses this identity from now on")
        if tickets:
            say(f"{counted(tickets, 'open ticket')} given back, so no round waits for this client")
    if left_state.left_at(directory.path) is None:
        left_state.note_left(directory.path)


def _refused(server: str, subject: Subject, left_at: datetime | None) -> str:
    if left_at is None:
        return f"{server} had revoked {subject} already: its operator did, or an earlier leave whose answer was lost"
    return f"{subject} left {server} already, at {left_at:%Y-%m-%d %H:%M} UTC: the server refuses this identity"


async def _left(identity: Identity, directory: StateDirectory, reason: str) -> int:
    request = pb.LeaveRequest(reason=reason[:MAX_REASON])
    log = logs.logger(client=identity.subject.name)
    with EgressLog(directory.path, identity.server) as egress_log:
        async with Channel(identity.server, identity.subject.name, directory.instance, identity, TIMING) as channel:
            Traffic(channel, egress_log, Metrics(), Contact(directory.path, identity.server))
            with egress_log.record(message_entries.leave(request)):
                retry = Retry(log, channel.timing.call_s, channel.timing)
                return (await retry.call(lambda: channel.leave(request))).tickets


def _name(where: Path) -> str:
    try:
        return Identity.load(where).subject.name
    except IdentityInvalid:
        return "NAME"


def _say_rest(state_dir: Path, *, removed: bool) -> None:
    note("updates already counted stay in the server's versions, records and audit log; your data was not touched")
    if not removed:
        note("to remove keys and everything made from the data too, run the command again with --remove")
    else:
        note(f"to remove the rest: rm -r {state_dir}; to remove the software: pip uninstall fedpeft")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fedpeft-client leave",
        description="Leaves the federation for good: the server closes this site's open tickets and refuses its "
        "identity from then on. An update that was trained but not received is dropped. Stop the client first. "
        "Returning takes a new token.",
        epilog="Example: fedpeft-client leave --state-dir /var/lib/fedpeft --remove",
    )
    state_flag.add(parser)
    state_flag.add_identity(parser)
    parser.add_argument(
        "--reason", metavar="TEXT", default="", help="the reason, shown to the operator; at most 1,024 characters"
    )
    parser.add_argument(
        "--remove",
        action="store_true",
        help="then remove keys, adapters, residuals, local tensors, updates set aside; ledger and policy stay",
    )
    parser.add_argument(
        "--offline", action="store_true", help="do not tell the server; its operator must then revoke this client"
    )
    return parser
