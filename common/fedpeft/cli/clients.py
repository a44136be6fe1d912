"""`fedpeft client`: list, revoke."""

from __future__ import annotations

from typing import Annotated

import typer

from fedpeft import views
from fedpeft.cli import output
from fedpeft.cli.epilogs import OF_SERVER, epilog
from fedpeft.cli.session import Session, run_async, session_of
from fedpeft.identity.subject import Role

app = typer.Typer(no_args_is_help=True, help="The devices of the federation.")


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
                row["activity"] + (f" version {row['scoring']['version']}" if row["scoring"] else ""),
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


@app.command(
    "revoke",
    epilog=epilog(
        "fedpeft client revoke hospital-a --reason 'laptop lost'",
        hint="A new token lets the name in again, or fedpeft identity restore. Updates that were counted stay counted.",
        ends=OF_SERVER,
    ),
)
def revoke(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Whom to refuse.")],
    role: Annotated[
        Role, typer.Option("--role", help="In which role; an operator cannot revoke itself.")
    ] = Role.CLIENT,
    reason: Annotated[str, typer.Option("--reason", metavar="TEXT", help="Why, for the audit log.")] = "",
    unseen: Annotated[
        bool, typer.Option("--unseen", help="Also if nobody of that name and role has called or was enrolled so far.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Refuse a name, whatever certificate it brings, from its next message on and on open streams too."""
    row = run_async(_revoked(session_of(context), name, role, reason, unseen))
    if as_json:
        output.say_json(row)
    else:
        output.say(
            f"{row['role']} {row['name']} is refused since {row['revoked_at']}, whatever certificate it brings; a new "
            "token would let it in again"
        )


async def _revoked(session: Session, name: str, role: Role, reason: str, unseen: bool) -> views.Json:
    async with session.client() as server:
        return views.identity_json(await server.revoke(name, role, reason, unseen=unseen))


async def _clients(session: Session) -> list[views.Json]:
    async with session.client() as server:
        return [views.client_json(client) for client in await server.clients()]
