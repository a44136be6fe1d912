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
    from fedpeft.api.following import Picture

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
        picture = run_async(watched(session_of(context), run, as_json=as_json))
    except KeyboardInterrupt:
        output.note(f"fedpeft: no longer watching; {run} goes on")
        raise typer.Exit(Exit.INTERRUPTED) from None
    if views.state(picture.run) != "completed":
        raise typer.Exit(Exit.NOT_COMPLETED)


async def watched(session: Session, run: str, *, as_json: bool = False) -> Picture:
    """Shows a run until it ends; returns its last picture."""
    from fedpeft.api.following import follow
    from fedpeft_operator.cli.run.live import LiveView

    narrator, live = Narrator(), output.is_terminal() and not as_json
    picture: Picture | None = None
    with LiveView() if live else nullcontext() as view:
        async for picture in follow(session.client, run):
            if view is not None:
                view.show(picture)
                continue
            for line in narrator.lines(picture):
                (output.note if as_json else output.say)(line)
            if as_json and not (picture.lost or picture.waiting):
                _say_change(picture)
    if picture is None:
        raise AssertionError("unreachable: a run that is found has a picture")
    if not as_json:
        for line in summary(picture):
            output.say(line)
    return picture


def _say_change(picture: Picture) -> None:
    rounds = [picture.rounds[number] for number in sorted(picture.changed)]
    output.say_json(views.change_json(picture.run, rounds, picture.current), line=True)
