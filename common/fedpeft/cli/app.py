"""The `fedpeft` command: what it is made of, its global flags, and how it ends.

Exit codes (one table, kept in `fedpeft.cli.exits`):

| code | meaning |
|---:|---|
| 0 | done |
| 1 | failed: the sentence on standard error says what, where, and what to do |
| 2 | wrong usage: a flag, an argument, a run file or a setting |
| 3 | the server cannot be reached, or is shutting down |
| 4 | no such run, version or ticket |
| 5 | the run ended, or is held up, before it was completed |
| 130 | interrupted with Ctrl-C |

Notable: nothing heavy is imported here, so that `fedpeft --help` starts at once; torch is imported inside the few
commands that build a model, gRPC inside those that talk to a server.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

from fedpeft.cli import clients, demo, output, params, partition, runs, simulate, versions
from fedpeft.cli.exits import IN_HELP, code_of
from fedpeft.cli.session import DEFAULT_SERVER, Session, session_of
from fedpeft.errors import FedpeftError

app = typer.Typer(
    name="fedpeft",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    epilog=IN_HELP,
)


@app.callback()
def globals_(
    context: typer.Context,
    server: Annotated[
        str, typer.Option("--server", envvar="FEDPEFT_SERVER", metavar="HOST:PORT", help="The server to talk to.")
    ] = DEFAULT_SERVER,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Show the traceback of an error.")] = False,
) -> None:
    """Federated parameter-efficient fine-tuning: create runs, watch them, take the result away."""
    session = session_of(context)
    session.server, session.verbose = server, verbose


app.add_typer(runs.app, name="run")
app.add_typer(clients.app, name="client")
app.command("params")(params.params)
app.command("partition")(partition.partition)
app.command("simulate")(simulate.simulate)
app.command("demo")(demo.demo)
app.command("version")(versions.version)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command and ends the process with its exit code."""
    session = Session()
    try:
        app(args=None if arguments is None else list(arguments), obj=session, prog_name="fedpeft")
    except FedpeftError as error:
        if session.verbose:
            traceback.print_exc()
        output.note(f"fedpeft: {error.message}")
        sys.exit(code_of(error))
    except Exception as error:  # a fault of ours: said in a sentence like any other, traceback on request
        if session.verbose:
            raise
        output.note(f"fedpeft: unexpected {type(error).__name__}: {error}; run it again with -v for the traceback")
        sys.exit(1)


if __name__ == "__main__":
    main()
