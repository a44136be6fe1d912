"""`fedpeft compare`: runs, simulations and studies side by side."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from fedpeft import ids
from fedpeft.errors import RunNotFound, ServerUnreachable
from fedpeft.process import output
from fedpeft_operator.cli.epilogs import OF_NAMED, epilog
from fedpeft_operator.cli.session import Session, run_async, session_of
from fedpeft_operator.cli.study import options

EPILOG = epilog(
    "fedpeft compare simulated sweep run-0123456789ab",
    "fedpeft compare before after --out comparison",
    ends=OF_NAMED,
)


def compare(
    context: typer.Context,
    what: Annotated[
        list[str],
        typer.Argument(
            metavar="WHAT...",
            help="Folders of simulations or studies, files of fedpeft run show --json, or ids of runs of the server.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Folder for the report: HTML, figures, CSV and LaTeX."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Put runs side by side: what they reached, with how many bytes, and how far their clients differ."""
    options.require_study()
    from fedpeft.studies.comparison import compared
    from fedpeft.studies.report import write_report
    from fedpeft.studies.report.tables import outcome

    result = compared([_source(session_of(context), name) for name in what])
    table = outcome(result)
    if as_json:
        output.say_json([dict(zip(table.columns, row, strict=True)) for row in table.rows])
    else:
        heads = [column.upper() for column in table.columns]
        output.say_table(heads, table.rows, right=heads[table.texts :])
    if out is not None:
        files = write_report(result, out)
        output.note(f"report: {files[0]}")


def _source(session: Session, name: str) -> tuple[str, Mapping[str, Any] | Path]:
    """Returns what a name means: something on this machine, or a run of the server."""
    path = Path(name)
    if path.exists() or not ids.RUN.fullmatch(name):
        return path.name or str(path.resolve().name), path
    from fedpeft_operator.cli.run.commands import shown_run

    try:
        return name, run_async(shown_run(session, name))
    except (RunNotFound, ServerUnreachable) as error:
        raise type(error)(f"there is no folder or file {name}, and as the id of a run: {error.message}") from None
