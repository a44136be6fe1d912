"""One round at the edge: its version is supplied, its clients' updates are awaited, and their sum is fetched.

    GetRun -- not there --> CreateRun from the version ------+
       | older version, or this one ---> SupplyVersion ------+--> WatchRun until the round is committed --> DownloadSum
                                            | the round is committed: the agent, or the parent, lost the update --^

All of it may be begun again at any time, by this process or the next: the edge's server keeps what there is.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedpeft.api.operator_client import OperatorClient
from fedpeft.api.round_parts import folded
from fedpeft.errors import (
    ConfigInvalid,
    FedpeftError,
    IdentityInvalid,
    RelayDiffers,
    RequestIdReused,
    RunNotFound,
    SpecInvalid,
    TrainingFailed,
    VersionDiffers,
)
from fedpeft.formatting import counted
from fedpeft.process.logs import Log
from fedpeft.v1 import operator_service_pb2 as pb
from fedpeft.v1 import run_pb2
from fedpeft_client.relay.edge import AWAY, Edge, private
from fedpeft_client.relay.options import RelayOptions
from fedpeft_client.relay.parent_version import Version, supply
from fedpeft_client.relay.rules import edge_config
from fedpeft_client.state.runs import KnownRun

PARTS = 100
"""An update counts for so many steps of progress, so that steps move while clients train."""


@dataclass(frozen=True)
class RoundRequest:
    """A round of the parent's run that the edge is to work for.

    Attributes:
        number: The round.
        version: The version that it begins with.
        out: The file that the sum is written to.
    """

    number: int
    version: Version
    out: Path

    @property
    def run(self) -> KnownRun:
        """The parent's run."""
        return self.version.run


class EdgeRound:
    """A round at the edge.

    Args:
        edge: The edge's server.
        options: The relay's options.
        request: The round.
        progress: Called every `Timing.relay_report_s` with `step` of `steps`, and how many `updates` there are
            `of` those wanted.
        stop: Returns True once it is to end.
        log: Log of the relay.
    """

    def __init__(
        self,
        edge: Edge,
        options: RelayOptions,
        request: RoundRequest,
        progress: Callable[[dict[str, Any]], None],
        stop: Callable[[], bool],
        log: Log,
    ) -> None:
        self._edge = edge
        self._timing = edge.timing
        self._options = options
        self._request = request
        self._progress = progress
        self._stop = stop
        self._log = log
        self._run = run_pb2.Run()
        self._rounds: dict[int, run_pb2.Round] = {}
        self._failing_since: float | None = None

    async def collect(self) -> pb.DownloadSumHeader:
        """Returns the description of the sum, once it is on disk.

        Raises:
            ConfigInvalid, SpecInvalid: If the edge's server does not take the run.
            RelayDiffers: If it works for another client of the parent's.
            IdentityInvalid: If that server does not let this relay in.
            TrainingFailed: If there will be no sum, if the server has been away for `Timing.relay_away_s`, or if it is
                to stop.
        """
        work = asyncio.ensure_future(self._insist())
        try:
            while not (await asyncio.wait({work}, timeout=self._timing.relay_report_s))[0]:
                if self._stop():
                    raise TrainingFailed(f"it was stopped as asked, with {counted(self._received(), 'update')}")
                self._report()
            return await work
        finally:
            await _cancelled(work)

    async def _insist(self) -> pb.DownloadSumHeader:
        while True:
            try:
                async with self._edge.connected() as server:
                    return await self._collect(server)
            except AWAY as error:
                now = time.monotonic()
                if self._failing_since is None:
                    self._failing_since = now
                    self._log.warning("the edge's server is away; it is called again", cause=str(error))
                elif now - self._failing_since >= self._timing.relay_away_s:
                    raise private(error, self._log) from None
            except (ConfigInvalid, RelayDiffers, SpecInvalid) as error:
                raise type(error)(f"the edge's server does not take the run: {error.message}") from None
            except RequestIdReused:
                self._log.warning("another agent has made the run at the edge meanwhile")
            except (IdentityInvalid, TrainingFailed):
                raise
            except FedpeftError as error:
                raise private(error, self._log) from None
            await asyncio.sleep(self._timing.relay_report_s)

    async def _collect(self, server: OperatorClient) -> pb.DownloadSumHeader:
        await self._begin(server)
        self._failing_since = None
        if not self._is_over():
            await self._await_updates(server)
        return await server.download_sum(self._request.run.id, self._request.number, self._request.out)

    async def _begin(self, server: OperatorClient) -> None:
        """Has the edge's run begin the round, if it has not."""
        ours = self._request
        try:
            self._run, _ = await server.run(ours.run.id)
        except RunNotFound:
            self._run = await self._create(server)
            return
        found = await server.rounds(ours.run.id, after=ours.version.number, records=False)
        self._rounds = {each.number: each for each in found}
        known = self._run.version
        if known > ours.version.number:
            raise TrainingFailed(
                f"the edge has version {known} of the run, and the ticket starts from version {ours.version.number}: "
                "was this server restored from a backup? Then stop and delete the run at the edge; the next ticket "
                "creates it anew from here"
            )
        if known == ours.version.number or not self._is_over():
            await self._supply(server)
        if known < self._run.version:
            self._log.info("version is supplied to the edge", version=ours.version.number)

    async def _supply(self, server: OperatorClient) -> None:
        """Supplies the round's version; the edge's server compares one that it has, so that no other is trained from.

        Raises:
            TrainingFailed: If it has another one of this number. The edge's server pauses the run, with that for its
                reason.
        """
        ours = self._request
        try:
            self._run = await supply(server, self._options, ours.version)
        except VersionDiffers as error:
            self._log.error(
                "the edge's version is not the parent's of that number", reason=error.reason, cause=error.message
            )
            raise TrainingFailed(
                f"the edge has another version {ours.version.number} of the run than this server, which made it again, "
                "as after a restore from a backup; the run is to be stopped and deleted at the edge"
            ) from None

    async def _create(self, server: OperatorClient) -> run_pb2.Run:
        ours = self._request
        config = edge_config(ours.run.config, self._options)
        run = await server.create_run(
            config,
            ours.run.spec,
            ours.run.fingerprint,
            ours.version.tensors(),
            ours.run.message.model_parameters,
            relays=ours.version.relays(self._options),
        )
        self._log.info("run is created at the edge", version=ours.version.number, clients=config.rounds.clients)
        return run

    async def _await_updates(self, server: OperatorClient) -> None:
        """Waits until the round is over; asks meanwhile how far the clients are, which a watch does not say."""
        watching = asyncio.ensure_future(self._watch(server))
        try:
            while not (await asyncio.wait({watching}, timeout=self._timing.relay_report_s))[0]:
                self._run, _ = await server.run(self._request.run.id)
            await watching
        finally:
            await _cancelled(watching)

    async def _watch(self, server: OperatorClient) -> None:
        async for change in server.watch(self._request.run.id, after=self._request.version.number):
            self._run, self._rounds = change.run, folded(self._rounds, change.rounds)
            if self._is_over():
                return

    def _is_over(self) -> bool:
        """Returns True if the round is committed, or the edge's run went on without it.

        Raises:
            TrainingFailed: If it is paused or stopped before that.
        """
        number, run = self._request.number, self._run
        known = self._rounds.get(number)
        if known is not None and known.phase == run_pb2.ROUND_PHASE_COMMITTED:
            return True
        if run.state == run_pb2.RUN_STATE_COMPLETED or any(each > number for each in self._rounds):
            return True
        if run.state in (run_pb2.RUN_STATE_PAUSED, run_pb2.RUN_STATE_STOPPED):
            how = "paused" if run.state == run_pb2.RUN_STATE_PAUSED else "stopped"
            self._log.error(f"the edge's run is {how}", cause=run.reason)  # which may name clients and files
            there = counted(self._received(), "update")
            raise TrainingFailed(f"the edge's run is {how}, with {there} of round {number}; its operator sees why")
        return False

    def _received(self) -> int:
        known = self._rounds.get(self._request.number)
        tickets = known.tickets if known is not None else ()
        return sum(ticket.state == run_pb2.TICKET_STATE_RECEIVED for ticket in tickets)

    def _report(self) -> None:
        received, wanted = self._received(), self._run.config.rounds.clients or self._options.clients
        begun = sum(PARTS * each.step // each.steps for each in self._run.awaited if 0 < each.steps >= each.step)
        steps = PARTS * wanted
        self._progress(
            {"step": min(PARTS * received + begun, steps), "steps": steps, "updates": received, "of": wanted}
        )


async def _cancelled(task: asyncio.Future[Any]) -> None:
    """Ends a task, if it has not ended, and waits for that."""
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled():
        task.exception()  # it was raised where the task was awaited
