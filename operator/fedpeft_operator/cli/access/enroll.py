"""`fedpeft enroll`: an operator or a viewer on another machine than the server's."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedpeft.process import output
from fedpeft_operator.cli.epilogs import OF_SERVER, epilog
from fedpeft_operator.cli.exit_codes import Exit
from fedpeft_operator.cli.session import run_async, session_of

EPILOG = epilog(
    "fedpeft enroll @token.txt",
    hint="The token comes from `fedpeft token create --role operator` or viewer; a client enrolls by fedpeft-client.",
    ends=OF_SERVER,
)


def enroll(
    context: typer.Context,
    token: Annotated[
        str,
        typer.Argument(
            metavar="TOKEN",
            help="The line that `fedpeft token create` printed; - reads standard input, FILE or @FILE a file.",
        ),
    ],
    replace: Annotated[bool, typer.Option("--replace", help="Replace an existing identity, with a new key.")] = False,
) -> None:
    """Make a key on this machine and get a certificate for it, into the identity folder."""
    from fedpeft.rpc import grpc_core

    grpc_core.configure()  # before anything imports gRPC, which reads the environment as it is imported
    from fedpeft.identity import folder, token_argument
    from fedpeft.identity.subject import Role
    from fedpeft.rpc import enrolment

    into = session_of(context).identity or folder.personal_needed("--identity")
    try:
        identity = run_async(enrolment.enroll(token_argument.take(token), into, replace=replace))
    except KeyboardInterrupt:
        output.note(f"fedpeft: {token_argument.LEFT}")
        raise typer.Exit(Exit.INTERRUPTED) from None
    subject, end = identity.subject, identity.certificate.not_valid_after_utc
    output.say(f"enrolled as {subject} at {identity.server} until {end:%Y-%m-%d %H:%M} UTC, in {into}")
    if subject.role in (Role.CLIENT, Role.EVALUATOR):
        output.note(f"this is a client's identity; use it with fedpeft-client --identity {into}")
    else:
        output.note(f"it is used for {identity.server} from now on, and renewed by itself; next: {_next(into)}")


def _next(into: Path) -> str:
    from fedpeft.identity import folder

    return "fedpeft run list" if into == folder.personal() else f"fedpeft --identity {into} run list"
