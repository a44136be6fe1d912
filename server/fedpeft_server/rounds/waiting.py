"""Says in words what a run is waiting for, and from whom; no wait is silent."""

from __future__ import annotations

import time

from fedpeft.rounds import Phase, TicketState
from fedpeft_server.rounds.engine import RunEngine
from fedpeft_server.store.rows import RunState

_NAMED = 8


def awaited(engine: RunEngine, waiting: int) -> str:
    """Returns a sentence about a run with `waiting` clients in the lobby."""
    run, current, config = engine.run, engine.round, engine.run.config.rounds
    if run.state is not RunState.RUNNING:
        return f"{run.id} is {run.state}" + (f": {run.reason}" if run.reason else "")
    if current.phase is Phase.WAITING:
        return f"round {current.number} of {run.id} waits for clients: {waiting} of {config.available} are there"
    if current.phase is Phase.AGGREGATING:
        return f"round {current.number} of {run.id} is being folded"
    names = [t.client for t in current.in_state(TicketState.ISSUED)]
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    left = f", {max(0, round(current.deadline - time.time()))} s to the deadline" if current.deadline else ""
    return f"round {current.number} of {run.id} awaits {', '.join(names[:_NAMED]) or 'replacements'}{more}{left}"
