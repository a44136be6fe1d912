"""The `fedpeft` command: what it is made of, its global flags, and how it ends.

Notable: nothing heavy is imported here, so that `fedpeft --help` starts at once; torch is imported inside the few
commands that build a model, gRPC inside those that talk to a server.
"""

from __future__ import annotations

import signal
import sys
import traceback
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import typer

from fedpeft import __version__
from fedpeft.api.caller import DEFAULT_SERVER
from fedpeft.errors import FedpeftError, SettingsInvalid
from fedpeft.process import durable, output
from fedpeft.process.home import NO_HOME, home_folder
from fedpeft.process.start import naming_arguments, to_the_end
from fedpeft.untrusted_text import print_anything
from fedpeft_operator.cli.access import audit, clients, enroll, identities, tokens
from fedpeft_operator.cli.exit_codes import Exit, code_of, in_help
from fedpeft_operator.cli.local import console, doctor, export, params, partition, top
from fedpeft_operator.cli.local import version as versions
from fedpeft_operator.cli.run import commands
from fedpeft_operator.cli.session import Session, session_of
from fedpeft_operator.cli.simulation import command as simulation
from fedpeft_operator.cli.study import commands as studies
from fedpeft_operator.cli.study import compare
from fedpeft_operator.demo import command

EXAMPLES = (
    "Begin with: fedpeft demo --out demo-out, a whole federation on this machine in ten minutes. "
    "Every command has its own --help, with an example."
)


MAY_BE_EMPTY = ("--identity", "--reason")
"""Options for which nothing is something."""


def _version(asked: bool) -> None:
    if asked:
        output.say(f"fedpeft {__version__}")
        raise typer.Exit


app = typer.Typer(
    name="fedpeft",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    epilog=f"{EXAMPLES}\n\n{in_help(Exit)}",
)


@app.callback()
def globals_(
    context: typer.Context,
    server: Annotated[
        str | None,
        typer.Option(
            "--server",
            envvar="FEDPEFT_SERVER",
            metavar="HOST:PORT",
            help=f"The server to talk to; that of the identity if there is one, else {DEFAULT_SERVER}.",
        ),
    ] = None,
    identity: Annotated[
        str | None,
        typer.Option(
            "--identity",
            envvar="FEDPEFT_IDENTITY",
            metavar="DIR",
            help="Folder with key and certificate; none or empty: ~/.config/fedpeft/identity, for its own server only.",
        ),
    ] = None,
    insecure: Annotated[
        bool,
        typer.Option("--insecure", help="Plain text and no identity, to a server that is not on this machine too."),
    ] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Show the version and exit.")
    ] = False,
) -> None:
    """Federated parameter-efficient fine-tuning: create, watch and export runs."""
    session = session_of(context)
    session.asked, session.insecure, session.verbose = server, insecure, verbose
    session.identity = Path(identity) if identity else None
    source = context.get_parameter_source("identity")
    session.identity_named = source is not None and source.name == "COMMANDLINE"


app.add_typer(commands.app, name="run")
app.add_typer(clients.app, name="client")
app.add_typer(tokens.app, name="token")
app.add_typer(identities.app, name="identity")
app.add_typer(audit.app, name="audit")
app.command("enroll", epilog=enroll.EPILOG)(enroll.enroll)
app.command("console", epilog=console.EPILOG)(console.console)
app.command("top", epilog=top.EPILOG)(top.top)
app.command("params", epilog=params.EPILOG)(params.params)
app.command("partition", epilog=partition.EPILOG)(partition.partition)
app.command("simulate", epilog=simulation.EPILOG)(simulation.simulate)
app.add_typer(studies.app, name="study")
app.command("compare", epilog=compare.EPILOG)(compare.compare)
app.command("export", epilog=export.EPILOG)(export.export)
app.command("demo", epilog=command.EPILOG)(command.demo)
app.command("doctor", epilog=doctor.EPILOG)(doctor.doctor)
app.command("version", epilog=versions.EPILOG)(versions.version)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command and ends the process with its exit code."""
    session, given = Session(), list(sys.argv[1:] if arguments is None else arguments)
    print_anything()
    for ending in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(ending) is not signal.SIG_IGN:  # as under nohup
            signal.signal(ending, _end)
    try:
        with durable.naming_files(), to_the_end("fedpeft"), naming_arguments(given):
            _check_empty(given)
            app(args=given, obj=session, prog_name="fedpeft")
    except FedpeftError as error:
        if session.verbose:
            traceback.print_exc()
        output.note(f"fedpeft: {error.message}")
        sys.exit(code_of(error))
    except RuntimeError as error:
        if home_folder() is not None or session.verbose:  # a library's search for a home is the one that can fail so
            raise
        output.note(f"fedpeft: {NO_HOME}: {error} Set HOME")
        sys.exit(Exit.USAGE)
    except Exception as error:  # a fault of ours: said in a sentence like any other, traceback on request
        if session.verbose:
            raise
        output.note(f"fedpeft: unexpected {type(error).__name__}: {error}; run it again with -v for the traceback")
        sys.exit(1)


def _check_empty(arguments: Sequence[str]) -> None:
    """Refuses an empty argument, as of a shell's variable that is not set: as a path it would be the folder here."""
    for flag, value in pairwise(("", *arguments)):
        if not value and flag not in MAY_BE_EMPTY:
            which = f"{flag} is empty" if flag.startswith("-") else f"an argument is empty, after {flag or 'fedpeft'!r}"
            raise SettingsInvalid(f"{which}: a variable that is not set, perhaps")


def _end(number: int, _: object) -> None:
    """Ends the process as a signal does, but by way of every clean-up: no scratch folder stays behind."""
    sys.exit(128 + number)


if __name__ == "__main__":
    main()
