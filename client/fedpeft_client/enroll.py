"""`fedpeft-client enroll TOKEN`: makes this site's key, gets its certificate, and says what comes next."""

from __future__ import annotations

import argparse
import asyncio
import os
import shlex
from pathlib import Path

from fedpeft import enrolment, token_argument
from fedpeft.errors import SettingsInvalid
from fedpeft.identity.folder import Identity
from fedpeft.identity.subject import Role
from fedpeft_client.exits import Exit
from fedpeft_client.state import StateDirectory, identity_folder

_STATE_DIR = "FEDPEFT_CLIENT_STATE_DIR"
_A = {Role.OPERATOR: "an operator", Role.VIEWER: "a viewer"}


def main(arguments: list[str]) -> int:
    """Enrols this site.

    Raises:
        FedpeftError: What kept it from it.
    """
    given = _parser().parse_args(arguments)
    token = token_argument.take(given.token)
    if given.state_dir is None:
        raise SettingsInvalid(f"--state-dir is missing (or {_STATE_DIR})")
    with StateDirectory(given.state_dir) as directory:  # a client that runs there must not lose its certificate
        into = identity_folder(directory.path)
        _say(asyncio.run(enrolment.enroll(token, into, replace=given.replace)), given.state_dir)
    return Exit.DONE


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
        default=os.environ.get(_STATE_DIR) or None,
        help=f"the client's state directory ({_STATE_DIR}); its identity is in DIR/identity",
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
