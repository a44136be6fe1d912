"""`fedpeft client`: list, revoke, readmit."""

from __future__ import annotations

from typing import Annotated

import typer

from fedpeft.api import views
from fedpeft.errors import IdentityNotFound
from fedpeft.identity.subject import Role
from fedpeft.process import output
from fedpeft_operator.cli.epilogs import OF_NAMED, OF_SERVER, epilog
from fedpeft_operator.cli.session import Session, run_async, session_of

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
                row["doing"],
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
            if answer["set_aside"]:
                output.say(
                    f"{row['client']} is set aside in {answer['run']}: its last updates were refused or excluded; "
                    f"fedpeft client readmit {row['client']} clears this"
                )


@app.command(
    "revoke",
    epilog=epilog(
        "fedpeft client revoke hospital-a --reason 'laptop lost'",
        hint="A new token, or fedpeft identity restore, admits the name again. Updates already counted stay counted.",
        ends=OF_NAMED,
    ),
)
def revoke(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name to revoke; after -- if it begins with a hyphen.")],
    role: Annotated[Role, typer.Option("--role", help="Its role; an operator cannot revoke itself.")] = Role.CLIENT,
    reason: Annotated[str, typer.Option("--reason", metavar="TEXT", help="Reason, for the audit log.")] = "",
    unseen: Annotated[
        bool,
        typer.Option("--unseen", help="Revoke even if no identity of that name and role has enrolled or called yet."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Refuse a name with any certificate, from its next message on; its open streams end."""
    row = run_async(_revoked(session_of(context), name, role, reason, unseen))
    if as_json:
        output.say_json(row)
    else:
        output.say(
            f"{row['role']} {row['name']} is refused with any certificate since {row['revoked_at']}; a new "
            "token admits it again"
        )


@app.command(
    "readmit",
    epilog=epilog(
        "fedpeft client readmit hospital-a",
        "fedpeft client readmit hospital-a --run run-0a1b2c3d4e5f",
        hint="A client whose updates are refused three times in a row is set aside: it is sampled after all others.",
        ends=OF_NAMED,
    ),
)
def readmit(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The client, as client list shows it.")],
    run: Annotated[str, typer.Option("--run", metavar="ID", help="Only in this run.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Readmit a client that was set aside because its updates were refused repeatedly."""
    runs = run_async(_readmitted(session_of(context), name, run))
    if as_json:
        output.say_json({"client": name, "runs": runs})
    elif runs:
        output.say(f"{name} is sampled like the others again, in {', '.join(runs)}")
    else:
        output.say(f"{name} was not set aside{f' in {run}' if run else ''}; nothing changed")


async def _readmitted(session: Session, name: str, run: str) -> list[str]:
    async with session.client() as server:
        return await server.readmit(name, run)


async def _revoked(session: Session, name: str, role: Role, reason: str, unseen: bool) -> views.Json:
    async with session.client() as server:
        try:
            return views.identity_json(await server.revoke(name, role, reason, unseen=unseen))
        except IdentityNotFound as error:
            raise IdentityNotFound(error.message.replace("set `unseen`", "give --unseen")) from None


async def _clients(session: Session) -> list[views.Json]:
    async with session.client() as server:
        return [views.client_json(client) for client in await server.clients()]
