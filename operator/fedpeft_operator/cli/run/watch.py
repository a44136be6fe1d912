"""`fedpeft run watch`: a live table on a terminal, plain lines otherwise, JSON lines with `--json`."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated

import typer

from fedpeft.api import views
from fedpeft.api.narration import Narrator, summary
from fedpeft.process import output
from fedpeft_operator.cli.epilogs import OF_NAMED, epilog
from fedpeft_operator.cli.exit_codes import Exit
from fedpeft_operator.cli.session import Session, run_async, session_of

if TYPE_CHECKING:
    from fedpeft.api.following import RunSnapshot

EPILOG = epilog(
    "fedpeft run watch run-0a1b2c3d4e5f",
    hint="Ctrl-C ends the watch, not the run.",
    ends=(*OF_NAMED, Exit.NOT_COMPLETED, Exit.INTERRUPTED),
)


def watch(
    context: typer.Context,
    run: Annotated[str, typer.Argument(metavar="ID", help="The run's id, as `run list` shows it.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print a line of JSON for every change.")] = False,
) -> None:
    """Watch a run until it ends; goes on when the server restarts.

    Ends with 0 when the run is completed and with 5 when it was stopped.
    """
    try:
        snapshot = run_async(watched(session_of(context), run, as_json=as_json))
    except KeyboardInterrupt:
        output.note(f"fedpeft: no longer watching; {run} goes on")
        raise typer.Exit(Exit.INTERRUPTED) from None
    if views.state(snapshot.run) != "completed":
        raise typer.Exit(Exit.NOT_COMPLETED)


async def watched(session: Session, run: str, *, as_json: bool = False) -> RunSnapshot:
    """Shows a run until it ends; returns its last snapshot."""
    from fedpeft.api.following import follow
    from fedpeft_operator.cli.run.live import LiveView

    narrator, live = Narrator(), output.is_terminal() and not as_json
    snapshot: RunSnapshot | None = None
    with LiveView() if live else nullcontext() as view:
        async for snapshot in follow(session.client, run):
            if view is not None:
                view.show(snapshot)
                continue
            for line in narrator.lines(snapshot):
                (output.note if as_json else output.say)(line)
            if as_json and not (snapshot.lost or snapshot.waiting):
                _say_change(snapshot)
    if snapshot is None:
        raise AssertionError("unreachable: a run that is found has a snapshot")
    if not as_json:
        for line in summary(snapshot):
            output.say(line)
    return snapshot


def _say_change(snapshot: RunSnapshot) -> None:
    rounds = [snapshot.rounds[number] for number in sorted(snapshot.changed)]
    output.say_json(views.change_json(snapshot.run, rounds, snapshot.current), line=True)
