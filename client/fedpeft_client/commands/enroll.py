"""`fedpeft-client enroll TOKEN`: makes this site's key, gets its certificate, and says what comes next."""

from __future__ import annotations

import argparse
import asyncio
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from fedpeft.errors import CertificateExpired, IdentityInvalid
from fedpeft.identity import folder, token_argument
from fedpeft.identity.folder import Identity
from fedpeft.identity.subject import Role
from fedpeft.rpc import enrolment
from fedpeft.v1 import access_service_pb2
from fedpeft_client.commands import left_state
from fedpeft_client.egress import message_entries
from fedpeft_client.egress.log import EgressLog
from fedpeft_client.enrolment.renewal import check_valid
from fedpeft_client.error_policy import Exit
from fedpeft_client.state import state_flag
from fedpeft_client.state.contact import Contact
from fedpeft_client.state.state_dir import StateDirectory, identity_folder

_UNUSED = (
    "; the token was not used. To replace this identity, after a revocation for example, use --replace "
    "in place of --keep"
)
_A = {Role.OPERATOR: "an operator", Role.VIEWER: "a viewer"}


def main(arguments: list[str]) -> int:
    """Enrols this site.

    Raises:
        FedpeftError: What kept it from it.
    """
    given = _parser().parse_args(arguments)
    try:
        _enroll(given.token, given.state_dir, keep=given.keep, replace=given.replace)
    except KeyboardInterrupt:
        print(f"fedpeft-client: {token_argument.LEFT}", file=sys.stderr)
        return Exit.INTERRUPTED
    return Exit.DONE


def _enroll(argument: str, state_dir: Path | None, *, keep: bool, replace: bool) -> None:
    if keep and state_dir and folder.exists(identity_folder(state_dir)):
        if (kept := _usable(identity_folder(state_dir))) is not None:
            unused = _UNUSED if _checked_same(kept, argument) else ""
            print(f"enrolled already, {enrolment.described(kept.folder)}{unused}")
            return
        replace = True
    token = token_argument.take(argument)
    state_dir = state_flag.named(state_dir)
    with StateDirectory(state_dir) as directory:  # a client that runs there must not lose its certificate
        into = identity_folder(directory.path)
        with EgressLog(directory.path, token.enrollment) as egress_log:
            around = partial(_booked, egress_log)
            identity = asyncio.run(enrolment.enroll(token, into, replace=replace, around=around))
        left_state.back(directory.path)
        Contact(directory.path, identity.server).note()
        _say(identity, state_dir)


def _usable(where: Path) -> Identity | None:
    """Returns who is enrolled in a folder; None, and says why, if only another enrolment helps."""
    try:
        identity = Identity.load(where)
        begin = identity.certificate.not_valid_before_utc  # a clock that is behind is for the client to find out
        check_valid(identity, max(datetime.now(UTC), begin))
    except (CertificateExpired, IdentityInvalid) as error:
        print(f"fedpeft-client: the existing identity cannot be kept: {error.message}", file=sys.stderr)
        return None
    return identity


def _checked_same(kept: Identity, argument: str) -> bool:
    """Checks that a token is for the server that somebody is enrolled at, which may have another address by now.

    Returns:
        True if there is one: its file may have been removed once it was used.

    Raises:
        IdentityInvalid: If it is for another.
    """
    if argument.startswith("@") and not Path(argument[1:]).exists():
        return False
    token = token_argument.take(argument)
    if token.authority not in kept.authority:
        raise IdentityInvalid(
            f"{kept.folder} is enrolled already, {enrolment.described(kept.folder)} at {kept.server}, and the token is "
            f"of another authority, for {token.server}; to enroll it there, use --replace in place of --keep"
        )
    return True


@contextmanager
def _booked(egress_log: EgressLog, request: access_service_pb2.EnrollRequest) -> Iterator[None]:
    with egress_log.record(message_entries.enrolment(request)):
        egress_log.sending(request.ByteSize())
        yield


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fedpeft-client enroll",
        description="Enrolls this site with its server: makes a key that never leaves, and gets a certificate for it. "
        "If it is interrupted, run it again: the same token still works here.",
        epilog="Example: fedpeft-client enroll @token.txt --state-dir /var/lib/fedpeft",
    )
    parser.add_argument("token", metavar="TOKEN", help=token_argument.HELP)
    state_flag.add(parser, "; its identity is in DIR/identity")
    where_enrolled = parser.add_mutually_exclusive_group()
    where_enrolled.add_argument(
        "--keep",
        action="store_true",
        help="do nothing if this site is enrolled at the token's server and its certificate is valid; the token may "
        "be gone by then",
    )
    where_enrolled.add_argument("--replace", action="store_true", help="replace an existing identity, with a new key")
    return parser


def _say(identity: Identity, state_dir: Path) -> None:
    subject, end = identity.subject, identity.certificate.not_valid_after_utc
    print(f"enrolled as {subject} at {identity.server} until {end:%Y-%m-%d %H:%M} UTC")
    if subject.role in (Role.CLIENT, Role.EVALUATOR):
        print("the client renews it by itself while it runs; next:")
        evaluate = " --evaluate" if subject.role is Role.EVALUATOR else ""
        print(f"  fedpeft-client --state-dir {shlex.quote(str(state_dir))} --data PATH{evaluate}")
        if subject.role is Role.CLIENT:
            print("or, if it is the agent of an edge, with --relay HOST:PORT in place of --data")
    else:
        print(f"this identity does not take part in runs; it is for the commands of {_A[subject.role]}; next:")
        print(f"  fedpeft --identity {shlex.quote(str(identity.folder))} run list")
