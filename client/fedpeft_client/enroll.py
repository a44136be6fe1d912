"""`fedpeft-client enroll TOKEN`: makes this site's key, gets its certificate, and says what comes next."""

from __future__ import annotations

import argparse
import asyncio
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from fedpeft import enrolment, token_argument
from fedpeft.errors import SettingsInvalid
from fedpeft.identity.folder import Identity
from fedpeft.identity.subject import Role
from fedpeft.v1 import access_service_pb2
from fedpeft_client import departures
from fedpeft_client.exits import Exit
from fedpeft_client.ledger import Ledger
from fedpeft_client.state import VARIABLE, StateDirectory, identity_folder

_A = {Role.OPERATOR: "an operator", Role.VIEWER: "a viewer"}


def main(arguments: list[str]) -> int:
    """Enrols this site.

    Raises:
        FedpeftError: What kept it from it.
    """
    given = _parser().parse_args(arguments)
    token = token_argument.take(given.token)
    if given.state_dir is None:
        raise SettingsInvalid(f"--state-dir is missing (or {VARIABLE})")
    with StateDirectory(given.state_dir) as directory:  # a client that runs there must not lose its certificate
        into = identity_folder(directory.path)
        with Ledger(directory.path, token.enrollment) as ledger:
            around = partial(_booked, ledger)
            identity = asyncio.run(enrolment.enroll(token, into, replace=given.replace, around=around))
        _say(identity, given.state_dir)
    return Exit.DONE


@contextmanager
def _booked(ledger: Ledger, request: access_service_pb2.EnrollRequest) -> Iterator[None]:
    with ledger.booked(departures.enrolment(request)):
        ledger.leaving(request.ByteSize())
        yield


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fedpeft-client enroll",
        description="Enrolls this site with its server: makes a key that never leaves, and gets a certificate for it. "
        "If it breaks, say it again: the same token still works from here.",
        epilog="Example: fedpeft-client enroll @token.txt --state-dir /var/lib/fedpeft",
    )
    parser.add_argument("token", metavar="TOKEN", help=token_argument.HELP)
    parser.add_argument(
        "--state-dir",
        metavar="DIR",
        type=Path,
        default=os.environ.get(VARIABLE) or None,
        help=f"the client's state directory ({VARIABLE}); its identity is in DIR/identity",
    )
    parser.add_argument("--replace", action="store_true", help="enroll anew where somebody is enrolled, with a new key")
    return parser


def _say(identity: Identity, state_dir: Path) -> None:
    subject, end = identity.subject, identity.certificate.not_valid_after_utc
    print(f"enrolled as {subject} at {identity.server} until {end:%Y-%m-%d %H:%M} UTC")
    if subject.role in (Role.CLIENT, Role.EVALUATOR):
        print("the client renews it by itself while it runs; next:")
        evaluate = " --evaluate" if subject.role is Role.EVALUATOR else ""
        print(f"  fedpeft-client --state-dir {shlex.quote(str(state_dir))} --data PATH{evaluate}")
    else:
        print(f"this is no client's identity, but for the commands of {_A[subject.role]}; next:")
        print(f"  fedpeft --identity {shlex.quote(str(identity.folder))} run list")
