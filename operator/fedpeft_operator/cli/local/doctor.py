"""`fedpeft doctor`: checks a set-up and says what to do."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedpeft.api.caller import parsed
from fedpeft.process import output
from fedpeft_operator.cli.columns import ImageColumn, LabelColumn
from fedpeft_operator.cli.epilogs import epilog
from fedpeft_operator.cli.exit_codes import Exit
from fedpeft_operator.cli.session import session_of

if TYPE_CHECKING:
    from fedpeft_operator.doctor.findings import Finding

EPILOG = epilog(
    "fedpeft doctor",
    "fedpeft doctor --data-dir /var/lib/fedpeft",
    "fedpeft doctor --state-dir state --data photos",
    hint="Exit code 1 means a fault; warnings do not count. It changes nothing.",
)
Database = Annotated[
    str,
    typer.Option(
        "--database",
        envvar="FEDPEFT_SERVER_DATABASE",
        metavar="URL",
        help="URL of its database, if not in the folder.",
        show_envvar=True,
    ),
]
Blobs = Annotated[
    str,
    typer.Option(
        "--blobs",
        envvar="FEDPEFT_SERVER_BLOBS",
        metavar="PLACE",
        help="Place of its adapter versions, if not in the folder.",
        show_envvar=True,
    ),
]


def doctor(
    context: typer.Context,
    data_dir: Annotated[
        Path | None, typer.Option("--data-dir", metavar="DIR", help="A server's data folder: checks that side.")
    ] = None,
    listen: Annotated[
        str, typer.Option("--listen", metavar="HOST:PORT", help="Address that server serves gRPC on.")
    ] = "127.0.0.1:7070",
    metrics: Annotated[
        str, typer.Option("--metrics", metavar="HOST:PORT", help="Address of its metrics; empty: none.")
    ] = "127.0.0.1:9464",
    database: Database = "",
    blobs: Blobs = "",
    state_dir: Annotated[
        Path | None, typer.Option("--state-dir", metavar="DIR", help="A client's state directory: checks that side.")
    ] = None,
    data: Annotated[Path | None, typer.Option("--data", metavar="PATH", help="That client's images.")] = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check a set-up: versions, certificates, network, disk, database, ports, data, GPU; print each with its cure."""
    from fedpeft_operator.doctor.checks import examine
    from fedpeft_operator.doctor.findings import Level, Setup

    session = session_of(context)
    for given in (session.asked, listen, metrics):
        if given:
            parsed(given)
    identity = session.identity
    if (state_dir or data) and not session.identity_named:  # the environment's is the operator's; a site's has its own
        identity = Path(own) if (own := os.environ.get("FEDPEFT_CLIENT_IDENTITY")) else None
    setup = Setup(
        session.asked,
        identity,
        data_dir,
        listen,
        metrics,
        database,
        state_dir,
        data,
        device,
        image_column,
        label_column,
        blobs,
    )
    findings = list(examine(setup)) if as_json else [_said(finding) for finding in examine(setup)]
    if as_json:
        output.say_json([asdict(finding) for finding in findings])
    faults = sum(finding.level is Level.FAULT for finding in findings)
    warnings = sum(finding.level is Level.WARNING for finding in findings)
    if not as_json:
        output.say(f"{_count(faults, 'fault')}, {_count(warnings, 'warning')}")
    if faults:
        raise typer.Exit(Exit.FAILED)


def _said(finding: Finding) -> Finding:
    output.say(f"{finding.level:<8}{finding.check:<14}{finding.text}")
    if finding.cure:
        output.say(f"{'':<8}{'':<14}do: {finding.cure}")
    return finding


def _count(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number or 'no'} {word}s"
