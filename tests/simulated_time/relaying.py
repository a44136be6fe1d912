"""The hierarchy of a world: two clients at an edge, whose agent is a client of the parent, beside one of the parent's.

The agent's worker is the relay's own, with which it shares a process here: it dies with the agent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fedpeft.errors import StateInvalid
from fedpeft_client.owner.policy import Policy
from fedpeft_client.relay.worker import RelayWorker
from fedpeft_client.settings import Settings
from fedpeft_client.timing import Timing

from .schedule import CLIENTS
from .worker import ROWS

PARENT_PORT, EDGE_PORT = 7070, 7071
AGENT = "relay"
AT_EDGE = ("a", "b")
RELAYING = {
    "relay": f"127.0.0.1:{EDGE_PORT}",
    "relay_clients": len(AT_EDGE),
    "relay_quorum": len(AT_EDGE),
    "relay_examples": sum(ROWS[client] for client in AT_EDGE),
}
"""Settings of the edge's agent."""


def at_parent(*, hierarchy: bool) -> tuple[str, ...]:
    """Returns the clients of the server that makes the versions."""
    return (AGENT, *(client for client in CLIENTS if client not in AT_EDGE)) if hierarchy else CLIENTS


class RelayProcess:
    """Stands for `WorkerProcess`, with a relay in it.

    Args:
        settings: The agent's.
        timing: Likewise.
    """

    def __init__(self, settings: Settings, timing: Timing) -> None:
        assert settings.relaying is not None
        self.timing = timing
        self.hello: dict[str, Any] = {}
        self._worker = RelayWorker(
            {"relay": settings.relaying.as_json(), "policy": Policy().model_dump(mode="json", exclude_defaults=True)}
        )

    async def start(self) -> dict[str, Any]:
        """Looks whether the edge's server is there."""
        if not self.hello:
            self.hello = await self._worker.hello()
        return self.hello

    async def ask(
        self, request: dict[str, Any], on_progress: Callable[[dict[str, Any]], None] = lambda _: None
    ) -> dict[str, Any]:
        """Checks a run, has the edge hold a round, or ends the edge's run."""
        try:
            if request["op"] == "check":
                return await self._worker.check(request)
            if request["op"] == "finished":
                return await self._worker.finished(request)
            return await self._worker.train(request, on_progress, bool)
        except OSError as error:  # as the worker's process says it
            raise StateInvalid(f"cannot read or write {error.filename or 'a file'}: {error.strerror}") from None

    async def close(self) -> None:
        """Ends."""
