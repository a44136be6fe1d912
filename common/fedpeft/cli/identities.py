"""`fedpeft identity list`."""

from __future__ import annotations

from typing import Annotated

import typer

from fedpeft import views
from fedpeft.cli import output
from fedpeft.cli.epilogs import OF_SERVER, epilog
from fedpeft.cli.session import Session, run_async, session_of

app = typer.Typer(no_args_is_help=True, help="Whom the server knows by certificate.")


@app.callback()
def identities_() -> None:
    """Whom the server knows by certificate."""


@app.command("list", epilog=epilog("fedpeft identity list", ends=OF_SERVER))
def list_(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List whoever was enrolled or revoked, with the end of the newest certificate."""
    rows = run_async(_listed(session_of(context)))
    if as_json:
        output.say_json(rows)
        return
    output.say_table(
        ("ROLE", "NAME", "ISSUED", "ENDS", "REVOKED", "FINGERPRINT"),
        [
            (
                row["role"],
                row["name"],
                row["issued_at"] or "-",
                row["expires_at"] or "-",
                row["revoked_at"] or "-",
                row["fingerprint"][:16] or "-",
            )
            for row in rows
        ],
    )
    for row in rows:
        if row["revoked_at"] and row["reason"]:
            output.say(f"{row['role']} {row['name']} was revoked: {row['reason']}")


async def _listed(session: Session) -> list[views.Json]:
    async with session.client() as server:
        return [views.identity_json(identity) for identity in await server.identities()]
