"""The worker of a relay: it has the edge's server collect updates, and computes nothing itself. No torch."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import structlog
from google.protobuf import json_format

from fedpeft.api.operator_client import FINISHED
from fedpeft.errors import ConfigInvalid, FedpeftError, IdentityInvalid, RelayDiffers, RunNotFound, VersionDiffers
from fedpeft.v1 import run_pb2
from fedpeft_client.eligibility.rules import Reason
from fedpeft_client.owner.policy import Policy
from fedpeft_client.relay.edge import Edge
from fedpeft_client.relay.edge_round import EdgeRound, RoundRequest
from fedpeft_client.relay.options import RelayOptions
from fedpeft_client.relay.parent_version import Version, supply
from fedpeft_client.relay.rules import reasons_against
from fedpeft_client.state.outbox import PAYLOAD
from fedpeft_client.state.runs import KnownRun

_log = structlog.get_logger(__name__)

Message = dict[str, Any]

COMPLETED = "completed"
"""State of a parent's run whose rounds have all been held."""


class RelayWorker:
    """Works for the agent of an edge; it calls a server, so its answers are awaited.

    Args:
        options: The `open` request: relay, policy.
    """

    def __init__(self, options: Message) -> None:
        self._options = RelayOptions.from_json(options["relay"])
        self._policy = Policy.model_validate(options["policy"])
        self._edge = Edge(self._options)

    async def hello(self) -> Message:
        """Returns what a relay says of itself: no torch, methods or data of its own.

        Raises:
            IdentityInvalid: If the edge's server does not let it in.
        """
        await self._edge.look(_log)
        return {
            "torch": "",
            "device": "relay of an edge",
            "methods": [],
            "rows": self._options.examples or 0,
            "rows_are": "examples",
        }

    async def check(self, request: Message) -> Message:
        """Returns why a run does not suit a relay; a server of the edge that is away is no reason against it."""
        run = KnownRun.from_json(request["run"], of_sums=True)
        reasons = reasons_against(run, self._options, self._policy)
        if not reasons and await self._edge.makes_versions_of(run.id, _log):
            fault = (
                f"--relay {self._options.server} is the run's own server; name that of the edge, with its own clients"
            )
            reasons = (Reason.of(ConfigInvalid(fault), "the relay is set to work for this server itself"),)
        return {
            "reasons": [reason.as_json() for reason in reasons],
            "report": {} if reasons else {"examples": self._options.examples or 0},
        }

    async def train(self, request: Message, progress: Callable[[Message], None], stop: Callable[[], bool]) -> Message:
        """Has the edge's server collect the updates of a round; writes the payload of their sum into `out`."""
        began = time.monotonic()
        run, number = KnownRun.from_json(request["run"], of_sums=True), int(request["round"])
        version = Version.from_json(run, number - 1, request["adapter"])
        wanted = RoundRequest(number, version, Path(request["out"]) / PAYLOAD)
        found = await EdgeRound(self._edge, self._options, wanted, progress, stop, _log).collect()
        return {
            "manifest": json_format.MessageToDict(found.manifest),
            "examples": found.examples,
            "metrics": {**found.metrics, "seconds": time.monotonic() - began},
            "facts": {},
        }

    async def finished(self, request: Message) -> Message:
        """Ends the edge's run of a parent's run that is over: with its last version, or stopped where there is none.

        A last version that is there is compared: the parent may have made it again, after a restore from a backup.

        Returns:
            `done`: True if that is done, or need not be. `wants`: the edge's run, where its last version is needed for
            that and did not come with the request.

        Raises:
            IdentityInvalid: If the edge's server does not let this relay in.
        """
        return await self._end(str(request["run"]["id"]), str(request["how"]), request.get("adapter"))

    async def _end(self, run: str, how: str, adapter: Message | None) -> Message:
        try:
            async with self._edge.connected() as server:
                found, _ = await server.run(run)
                last = found.config.rounds.count
                if how != COMPLETED or found.state == run_pb2.RUN_STATE_STOPPED:
                    if found.state not in FINISHED:
                        await server.stop(run, f"the parent's run is {how}")
                        _log.info("the edge's run is stopped, for the parent's is over", state=how)
                elif adapter is None:
                    return {"done": False, "wants": json_format.MessageToDict(found)}
                else:
                    version = Version.from_json(KnownRun.of(found, of_sums=True), last, adapter)
                    await supply(server, self._options, version)
                    if found.state not in FINISHED:
                        _log.info("the edge's run is completed with the parent's last version", version=last)
        except VersionDiffers as error:  # nothing that another attempt would mend
            _log.error("the edge's last version is not the parent's", reason=error.reason, cause=error.message)
            return {"done": True}
        except (RunNotFound, RelayDiffers):
            return {"done": True}
        except IdentityInvalid:
            raise
        except FedpeftError as error:
            _log.warning("the edge's run could not be ended; trying again later", cause=str(error))
            return {"done": False}
        return {"done": True}
