"""`fedpeft token`: create, list, delete."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated

import typer

from fedpeft.api import views
from fedpeft.errors import SettingsInvalid
from fedpeft.identity.subject import Role
from fedpeft.process import durable, output
from fedpeft_operator.cli.epilogs import OF_NAMED, OF_SERVER, epilog
from fedpeft_operator.cli.path_checks import check_file
from fedpeft_operator.cli.session import Session, run_async, session_of

app = typer.Typer(no_args_is_help=True, help="Enrolment tokens, each of which enrolls one device or person.")

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_LIFE = re.compile(r"([0-9]{1,9})([smhd])")


@app.command(
    "create",
    epilog=epilog(
        "fedpeft token create --name hospital-a --role client --expires 24h",
        "fedpeft token create --name hospital-a --role client --out hospital-a.token",
        hint="The token is secret until it is used: whoever uses it first is enrolled under this name.",
        ends=OF_SERVER,
    ),
)
def create(
    context: typer.Context,
    name: Annotated[str, typer.Option("--name", metavar="NAME", help="Name that it enrolls; the id of a client.")],
    role: Annotated[Role, typer.Option("--role", help="Role that it enrolls.")] = Role.CLIENT,
    expires: Annotated[
        str, typer.Option("--expires", metavar="TIME", help="Lifetime: 30m, 24h or 7d, for example.")
    ] = "24h",
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Write the line to a file that only you can read.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make an enrolment token and print its line, which is all of the standard output."""
    life_s = seconds(expires)
    if out:
        check_file(out, "a token")
        if os.path.lexists(out):  # an earlier token there may not have been used
            raise SettingsInvalid(f"--out {out} is there already; name another file, or remove it first")
    made = run_async(_created(session_of(context), name, role, life_s))
    if out:
        line = made.pop("line")
        with durable.refusals(f"writing {out}"):
            durable.write(out, f"{line}\n".encode())
    if as_json:
        output.say_json(made)
        return
    if not out:
        output.say(made["line"])
    who = "fedpeft-client" if role in (Role.CLIENT, Role.EVALUATOR) else "fedpeft"
    output.note(
        f"token {made['id']} for {role} {made['name']}, usable once, until {made['expires_at']}; carry the line to its "
        f"machine by a private channel, and run there: {who} enroll {'@FILE' if out else '-'}"
    )


@app.command("list", epilog=epilog("fedpeft token list", ends=OF_SERVER))
def list_(context: typer.Context, as_json: AsJson = False) -> None:
    """List the tokens that were not deleted; their secrets are nowhere."""
    rows = run_async(_listed(session_of(context)))
    if as_json:
        output.say_json(rows)
        return
    output.say_table(
        ("TOKEN", "ROLE", "NAME", "EXPIRES", "USED", "CREATED BY"),
        [
            (row["id"], row["role"], row["name"], row["expires_at"], row["used_at"] or "-", row["created_by"])
            for row in rows
        ],
    )


@app.command("delete", epilog=epilog("fedpeft token delete 0a1b2c3d4e5f", ends=OF_NAMED))
def delete(
    context: typer.Context,
    token: Annotated[str, typer.Argument(metavar="ID", help="The token's id, as `token list` shows it.")],
) -> None:
    """Delete a token, so that it cannot be used; a certificate it was used for stays valid."""
    run_async(_deleted(session_of(context), token))
    output.say(f"token {token} is deleted and cannot be used")


def seconds(text: str) -> int:
    """Reads a time like 30m, 24h or 7d.

    Raises:
        SettingsInvalid: If it is not one.
    """
    match = _LIFE.fullmatch(text)
    if not match or not int(match[1]):
        raise SettingsInvalid(f"--expires: {text[:40]!r} is not a time like 30m, 24h or 7d")
    found = int(match[1]) * _UNITS[match[2]]
    if not _UNITS["m"] <= found <= 30 * _UNITS["d"]:
        raise SettingsInvalid(f"--expires: {text} is not between 1m and 30d, the lifetimes allowed")
    return found


async def _created(session: Session, name: str, role: Role, life_s: int) -> views.Json:
    async with session.client() as server:
        answer = await server.create_token(name, role, life_s)
    return {**views.token_json(answer.token), "line": answer.line}


async def _listed(session: Session) -> list[views.Json]:
    async with session.client() as server:
        return [views.token_json(token) for token in await server.tokens()]


async def _deleted(session: Session, token: str) -> None:
    async with session.client() as server:
        await server.delete_token(token)
