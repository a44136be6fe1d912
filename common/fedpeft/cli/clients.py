"""`fedpeft client list`."""

from __future__ import annotations

from typing import Annotated

import typer

from fedpeft import views
from fedpeft.cli import output
from fedpeft.cli.epilogs import OF_SERVER, epilog
from fedpeft.cli.session import Session, run_async, session_of

app = typer.Typer(no_args_is_help=True, help="The devices of the federation.")


@app.callback()
def clients_() -> None:
    """The devices of the federation."""


@app.command("list", epilog=epilog("fedpeft client list", "fedpeft client list --json", ends=OF_SERVER))
def list_(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List every client that ever registered."""
    rows = run_async(_clients(session_of(context)))
    if as_json:
        output.say_json(rows)
        return
    output.say_table(
        ("CLIENT", "ROLE", "ACTIVITY", "UPDATES", "EXAMPLES", "LAST SEEN", "DEVICE"),
        [
            (
                row["client"],
                row["role"],
                row["activity"],
                row["updates"],
                row["examples"] or "-",
                row["last_seen"] or "-",
                row["device"] or "-",
            )
            for row in rows
        ],
        right=("UPDATES", "EXAMPLES"),
    )
    for row in rows:
        for answer in row["answers"]:
            if answer["answer"] == "declined":
                output.say(f"{row['client']} declined {answer['run']}: {'; '.join(answer['reasons'])}")


async def _clients(session: Session) -> list[views.Json]:
    async with session.client() as server:
        return [views.client_json(client) for client in await server.clients()]
