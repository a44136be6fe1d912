"""`fedpeft audit`: show, export, verify."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedpeft import text_files
from fedpeft.errors import SettingsInvalid, StateInvalid
from fedpeft.formatting import counted
from fedpeft.process import output
from fedpeft_operator.cli.epilogs import OF_SERVER, epilog
from fedpeft_operator.cli.session import Session, run_async, session_of

if TYPE_CHECKING:
    from fedpeft.identity.audit import AuditEntry

app = typer.Typer(no_args_is_help=True, help="The audit log: who did what, and proof that nobody changed it.")

After = Annotated[int, typer.Option("--after", metavar="NUMBER", min=0, help="Only entries with a higher number.")]
Head = Annotated[
    str | None,
    typer.Option(
        "--head",
        metavar="NUMBER:SHA256",
        help="What `audit verify` printed before: nothing up to that entry may have been rewritten since.",
    ),
]


@app.command("show", epilog=epilog("fedpeft audit show --after 100", ends=OF_SERVER))
def show(
    context: typer.Context,
    after: After = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print a line of JSON for every entry.")] = False,
) -> None:
    """Show the audit log, oldest first."""
    run_async(_shown(session_of(context), after, as_json))


@app.command(
    "export",
    epilog=epilog(
        "fedpeft audit export --out audit.jsonl",
        hint="One entry a line, in the form that was hashed; keep exports where the server cannot write.",
        ends=OF_SERVER,
    ),
)
def export(
    context: typer.Context,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The file to write; - for standard output.")],
) -> None:
    """Write the whole audit log as lines of JSON, checked while it is written."""
    last = run_async(_exported(session_of(context), out))
    entries = counted(last.number if last else 0, "entry", "entries")
    output.note(entries + (f", the last one is {_head(last)}" if last else ""))


@app.command(
    "verify",
    epilog=epilog(
        "fedpeft audit verify",
        "fedpeft audit verify --file audit.jsonl",
        hint="Write down the head that it prints: with --head, a later check shows that nothing up to it was "
        "rewritten.",
        ends=OF_SERVER,
    ),
)
def verify(
    context: typer.Context,
    file: Annotated[
        Path | None, typer.Option("--file", metavar="FILE", help="An export, in place of the server's log.")
    ] = None,
    head: Head = None,
) -> None:
    """Check that no entry was changed, removed or put in; print the head of the log."""
    from fedpeft.identity import audit

    try:
        noted = None if head is None else audit.parse_head(head)
    except ValueError as error:
        raise SettingsInvalid(f"--head: {error}") from None
    last = run_async(_verified(_entries(session_of(context), file), noted))
    if last is None:
        output.say("the audit log is empty: there is nothing to verify")
        return
    entries = counted(last.number, "entry", "entries")
    output.say(f"{entries}, each follows the one before it" + (", and the one noted" if noted else ""))
    output.say(f"head {_head(last)}")


async def _shown(session: Session, after: int, as_json: bool) -> None:
    async with session.client() as server:
        async for found in server.audit(after):
            if as_json:
                output.say(found.to_line())
                continue
            details = ", ".join(f"{key} {_readable(key, value)}" for key, value in json.loads(found.details).items())
            parts = (
                str(found.number),
                _moment(found.at),
                found.actor,
                found.action,
                found.object,
                details,
            )
            output.say(output.GAP.join(part for part in parts if part))


def _readable(key: str, value: object) -> object:
    return _moment(value) if key.endswith("_at") and isinstance(value, float) else value


def _moment(at: float) -> str:
    return f"{datetime.fromtimestamp(at, UTC):%Y-%m-%dT%H:%M:%SZ}"


async def _entries(session: Session, file: Path | None) -> AsyncIterator[AuditEntry]:
    if file is not None:
        for entry in _of_file(file):
            yield entry
        return
    async with session.client() as server:
        async for entry in server.audit():
            yield entry


def _of_file(file: Path) -> list[AuditEntry]:
    from fedpeft.identity.audit import of_line

    try:
        with text_files.opened(file) as lines:
            entries = iter(lambda: lines.readline(text_files.MOST_BYTES), "")
            return [of_line(line, f"{file}:{number}") for number, line in enumerate(entries, 1)]
    except OSError as error:
        raise SettingsInvalid(f"--file: {file} cannot be read: {error.strerror}") from None
    except text_files.NotText as error:
        raise SettingsInvalid(f"--file: {file} cannot be read: {error}") from None


async def _verified(entries: AsyncIterator[AuditEntry], head: tuple[int, str] | None) -> AuditEntry | None:
    from fedpeft.identity import audit

    last: AuditEntry | None = None
    async for found in entries:
        audit.check(last, found)
        audit.check_head(found, head)
        last = found
    audit.check_reached(last, head)
    return last


async def _exported(session: Session, out: Path) -> AuditEntry | None:
    """Writes every entry; a file appears whole or not at all."""
    from fedpeft.identity import audit
    from fedpeft.process import durable

    last: AuditEntry | None = None
    lines: list[str] = []
    async for found in _entries(session, None):
        audit.check(last, found)
        lines.append(found.to_line())
        last = found
    if str(out) == "-":
        for line in lines:
            output.say(line)
        return last
    try:
        durable.write(out, "".join(f"{line}\n" for line in lines).encode())
    except OSError as error:
        raise StateInvalid(f"cannot write {out}: {error.strerror}") from None
    return last


def _head(last: AuditEntry) -> str:
    return f"{last.number}:{last.sha256}"
