"""`fedpeft run track`: the rounds of a server's run in experiment trackers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedpeft.api import views
from fedpeft.api.narration import Narrator
from fedpeft.process import output
from fedpeft_operator.cli.epilogs import OF_NAMED, epilog
from fedpeft_operator.cli.exit_codes import Exit
from fedpeft_operator.cli.session import Session, run_async, session_of
from fedpeft_operator.cli.trackers import NAMES

if TYPE_CHECKING:
    from fedpeft.tracking import Tracking

EPILOG = epilog(
    "fedpeft run track run-0a1b2c3d4e5f --to tensorboard=boards --to mlflow=http://127.0.0.1:5000",
    hint="Rounds of before are written too, and none twice: it may be ended and started again at any time.",
    ends=(*OF_NAMED, Exit.NOT_COMPLETED, Exit.INTERRUPTED),
)


def track(
    context: typer.Context,
    run: Annotated[str, typer.Argument(metavar="ID", help="The run's id, as `run list` shows it.")],
    to: Annotated[
        list[str],
        typer.Option(
            "--to", metavar="NAME[=TARGET]", help=f"{NAMES} The default is a folder or file here. May be repeated."
        ),
    ],
) -> None:
    """Write a run's rounds to experiment trackers until it ends; goes on when the server restarts.

    Ends with 0 when the run is completed and with 5 when it was stopped, or a tracker does not have every round.
    """
    from fedpeft.process import logs
    from fedpeft.tracking import tracking_to

    logs.to_standard_error()
    tracking, state = tracking_to(to, Path.cwd()), "running"
    try:
        state = run_async(_tracked(session_of(context), run, tracking))
    except KeyboardInterrupt:
        output.note(f"fedpeft: no longer tracking; {run} goes on")
        raise typer.Exit(Exit.INTERRUPTED) from None
    finally:
        tracking.end(state)
    if state != "completed" or tracking.missed:
        raise typer.Exit(Exit.NOT_COMPLETED)


async def _tracked(session: Session, run: str, tracking: Tracking) -> str:
    """Hands every round to the trackers, again when it was scored; returns the state in which the run ended."""
    from fedpeft.api.following import follow

    narrator, begun, initial, state = Narrator(), False, views.Json(), "running"
    async for snapshot in follow(session.client, run):
        for line in narrator.lines(snapshot):
            output.say(line)
        report, state = views.run_json(snapshot.run, [], None), views.state(snapshot.run)
        if not begun:
            tracking.begin(report)
        elif report["initial_metrics"] != initial:
            tracking.initial(report)
        begun, initial = True, report["initial_metrics"]
        for each in views.committed(snapshot.rounds[number] for number in snapshot.changed):
            tracking.round(views.round_json(each, snapshot.run))
    return state
