"""`fedpeft identity`: list, restore, renew."""

from __future__ import annotations

from typing import Annotated

import typer

from fedpeft.api import views
from fedpeft.identity.subject import Role
from fedpeft.process import output
from fedpeft_operator.cli.epilogs import OF_NAMED, OF_SERVER, epilog
from fedpeft_operator.cli.session import Session, run_async, session_of

REPLACED = "authority replaced"

app = typer.Typer(no_args_is_help=True, help="Identities that the server knows by certificate.")


@app.callback()
def identities_() -> None:
    """Identities that the server knows by certificate."""


@app.command("list", epilog=epilog("fedpeft identity list", ends=OF_SERVER))
def list_(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List every identity that was enrolled or revoked, with the end of its newest certificate."""
    rows = run_async(_listed(session_of(context)))
    if as_json:
        output.say_json(rows)
        return
    output.say_table(
        ("ROLE", "NAME", "ISSUED", "ENDS", "REFUSED", "FINGERPRINT"),
        [
            (
                row["role"],
                row["name"],
                row["issued_at"] or "-",
                row["expires_at"] or "-",
                f"revoked {row['revoked_at']}" if row["revoked_at"] else REPLACED if row["authority_replaced"] else "-",
                row["fingerprint"][:16] or "-",
            )
            for row in rows
        ],
    )
    for row in rows:
        if row["revoked_at"] and row["reason"]:
            output.say(f"{row['role']} {row['name']} was revoked: {row['reason']}")
    if any(row["authority_replaced"] and not row["revoked_at"] for row in rows):
        output.say(
            f"{REPLACED}: their certificates were issued by an authority that this server does not trust any more; a "
            "new token (fedpeft token create) enrolls each again, with --replace"
        )


@app.command(
    "restore",
    epilog=epilog(
        "fedpeft identity restore hospital-a",
        hint="For certificates of an authority elsewhere; where this server issues them, a new token does the same.",
        ends=OF_NAMED,
    ),
)
def restore(
    context: typer.Context,
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="Name to admit again; after -- if it begins with a hyphen.")
    ],
    role: Annotated[Role, typer.Option("--role", help="Its role.")] = Role.CLIENT,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Admit a revoked name again, with a certificate issued from now on; older ones stay refused."""
    row = run_async(_restored(session_of(context), name, role))
    who, since = f"{row['role']} {row['name']}", row["restored_at"]
    if as_json:
        output.say_json(row)
    elif since:
        output.say(f"{who} is admitted again, with a certificate issued after {since}")
    else:
        output.say(f"{who} is not revoked")


@app.command(
    "renew",
    epilog=epilog(
        "fedpeft identity renew",
        hint="Commands renew it by themselves once half its life is over; this is for when the server's authority is "
        "being replaced.",
        ends=OF_NAMED,
    ),
)
def renew(context: typer.Context) -> None:
    """Renew your own certificate now."""
    session = session_of(context)
    subject, end = run_async(_renewed(session))
    output.say(f"{subject}: renewed until {end}")


async def _renewed(session: Session) -> tuple[str, str]:
    async with session.client() as server:
        identity = await server.renew()
    return str(identity.subject), f"{identity.certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC"


async def _restored(session: Session, name: str, role: Role) -> views.Json:
    async with session.client() as server:
        return views.identity_json(await server.restore(name, role))


async def _listed(session: Session) -> list[views.Json]:
    async with session.client() as server:
        return [views.identity_json(identity) for identity in await server.identities()]
