"""`fedpeft top`: runs, the round in progress and the clients at a glance, live."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from fedpeft.api.caller import choose
from fedpeft.errors import SettingsInvalid
from fedpeft.process import output
from fedpeft_operator.cli.epilogs import OF_NAMED, epilog
from fedpeft_operator.cli.session import require, run_async, session_of

if TYPE_CHECKING:
    from fedpeft.api.operator_client import Connect

EPILOG = epilog(
    "fedpeft --server 127.0.0.1:7070 top",
    hint="The keys stand at the bottom; q leaves, the run goes on.",
    ends=OF_NAMED,
)


def top(
    context: typer.Context,
    run: Annotated[str, typer.Argument(metavar="ID", help="The run to begin with; the newest if absent.")] = "",
) -> None:
    """Watch all runs and clients on a full screen; pause, resume and stop runs there."""
    if not output.is_terminal():
        raise SettingsInvalid("fedpeft top needs a terminal; for scripts there is: fedpeft run watch ID --json")
    require("top", "textual")
    session = session_of(context)
    run_async(_looked(session.client, run))
    from fedpeft_operator.top.app import TopApp

    caller = choose(session.asked, session.identity, insecure=session.insecure)
    may_write = caller.identity is None or caller.identity.subject.role == "operator"
    TopApp(session.client, caller.server, may_write=may_write, run=run).run()


async def _looked(connect: Connect, run: str) -> None:
    """Finds a wrong address or run before the screen is taken."""
    from fedpeft.api.operator_client import for_looking

    async with for_looking(connect)() as server:
        if run:
            await server.run(run)
        else:
            await server.check()
