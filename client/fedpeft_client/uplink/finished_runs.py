"""Folders of runs that are over, removed once the server says so; nothing that was trained here and never left is lost.

The adapter version goes at once: the server has it. Tensors that stay on this client (a personal head) are kept, for
they are its owner's. What updates left unsent cannot be sent any more; it is kept for KEPT, because an operator may
have a run go on from an earlier version. A run with an update that the server has not answered for is left as it is.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import safetensors.numpy
from safetensors import SafetensorError

from fedpeft import ids
from fedpeft.errors import FedpeftError, LocalError
from fedpeft.process import durable
from fedpeft.process.logs import Log
from fedpeft.rounds.groups import LASTING
from fedpeft.v1 import federation_service_pb2 as pb
from fedpeft.v1 import run_pb2
from fedpeft_client.egress.log import EgressLog
from fedpeft_client.owner.run_series import RunSeries
from fedpeft_client.state import state_dir
from fedpeft_client.state.outbox import Outbox
from fedpeft_client.state.state_dir import StateDirectory
from fedpeft_client.uplink.channel import Channel

ASKED = 32
"""Most runs of one question."""
KEPT = timedelta(days=30)
"""Time for which the residual of a finished run is kept, and any state but the local tensors."""
MARK = "finished"
"""Says in a run's folder that the run is over, and by its time of modification since when that is known; empty."""

_OVER = {
    run_pb2.RUN_STATE_UNSPECIFIED: "deleted",
    run_pb2.RUN_STATE_COMPLETED: "completed",
    run_pb2.RUN_STATE_STOPPED: "stopped",
}


Ending = Callable[[str, str], Awaitable[bool]]
"""Ends a run, by how it is over, where else it is held; returns False if that must be tried again."""


class FinishedRuns:
    """Looks now and then which runs of the state directory are over, and removes what nobody needs of them."""

    def __init__(
        self,
        directory: StateDirectory,
        outbox: Outbox,
        channel: Channel,
        egress_log: EgressLog,
        series: RunSeries,
        log: Log,
        end: Ending | None = None,
    ) -> None:
        self._directory = directory
        self._outbox = outbox
        self._channel = channel
        self._egress_log = egress_log
        self._series = series
        self._runs = directory.path / "runs"
        self._found_over: set[str] = set()
        self._log = log
        self._end = end
        self._unended_since: float | None = None
        self._next = 0.0

    @property
    def ends_elsewhere(self) -> bool:
        """True while a run that is over still goes on where else it is held; for `Timing.relay_away_s` at most."""
        since = self._unended_since
        return since is not None and time.monotonic() - since < self._channel.timing.relay_away_s

    def look_soon(self) -> None:
        """Has the next `clean_up` look, because a run was found to be over."""
        self._next = 0.0

    async def clean_up(self) -> None:
        """Removes the files of finished runs, if it is time to; after a failure the next call tries again.

        Raises:
            LocalError: If the ledger or the state directory cannot be written.
        """
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + self._channel.timing.finished_check_s
        there = await asyncio.to_thread(self._there)
        runs = sorted({*there, *filter(ids.RUN.fullmatch, self._series.runs)})
        all_ended = True
        for start in range(0, len(runs), ASKED):
            some = runs[start : start + ASKED]
            try:
                answer = await self._channel.check_runs(pb.CheckRunsRequest(runs=some))
            except LocalError:
                raise
            except FedpeftError as error:  # a server that does not know the question, or is away
                self._log.debug("finished runs could not be looked for; trying again later", cause=str(error))
                return
            over = {each.run: _OVER[each.state] for each in answer.runs if each.state in _OVER}
            for run in some:
                if run in there:
                    if await self._is_ended(run, over.get(run)):
                        await asyncio.to_thread(self._file, run, over.get(run))
                    else:
                        all_ended = False
                if run in over:
                    self._drop_series(run)
                else:  # it may have been over, and go on
                    self._found_over.discard(run)
        if all_ended:
            self._unended_since = None
        elif self._unended_since is None:
            self._unended_since = time.monotonic()

    async def _is_ended(self, run: str, how: str | None) -> bool:
        """Returns True unless a run that is over goes on where else it is held."""
        return how is None or self._end is None or await self._end(run, how)

    def _drop_series(self, run: str) -> None:
        """Drops the metrics of a run at the second look that finds it over: the last counts were collected by then."""
        if run in self._found_over:
            self._series.drop(run)
            self._found_over.discard(run)
        elif run in self._series.runs:
            self._found_over.add(run)

    def _file(self, run: str, how: str | None) -> None:
        """Cleans the folder of a run that is over, or takes the mark from one that goes on.

        One folder that the file system refuses to change keeps neither the others nor the agent.
        """
        try:
            if how is None:
                (self._runs / run / MARK).unlink(missing_ok=True)
            else:
                self._clean(run, how)
        except OSError as error:
            cause = f"{error.filename or self._runs / run}: {error.strerror or error}"
            self._log.warning("files of a run could not be removed; trying again later", run=run, cause=cause)

    def _there(self) -> list[str]:
        """Returns the runs that have a folder with something to remove."""
        names = sorted(each.name for each in self._runs.iterdir() if each.is_dir()) if self._runs.is_dir() else []
        return [name for name in names if ids.RUN.fullmatch(name) and not _is_clean(self._runs / name)]

    def _clean(self, run: str, how: str) -> None:
        if self._outbox.holds(run):
            return
        folder = self._runs / run
        self._outbox.confirm(run)  # its last update was folded, or never will be
        mark = folder / MARK
        if not mark.exists():
            durable.write(mark, b"")
        lasting = _since(mark) <= KEPT
        groups = state_dir.groups(folder).items()
        kept = [file for group, file in groups if (group in LASTING or lasting) and _holds_values(file)]
        if not kept:
            shutil.rmtree(folder)
            durable.sync(folder.parent)
        else:
            for file in _files(folder):
                if file not in (mark, *kept):
                    file.unlink()
        self._egress_log.forget(run)
        self._log.info("run is over; its files are removed", run=run, state=how, kept=[file.name for file in kept])


def _is_clean(folder: Path) -> bool:
    """Returns True if a folder has nothing but what stays for good, or for now; False if it cannot be looked into."""
    try:
        names = {file.name for file in _files(folder)}
    except OSError:
        return False
    groups = state_dir.groups(folder)
    return (
        MARK in names
        and names <= {MARK, *(file.name for file in groups.values())}
        and not (groups.keys() - LASTING and _since(folder / MARK) > KEPT)
    )


def _files(folder: Path) -> list[Path]:
    """Returns the files of a run's folder; a folder in it is not this client's, but one of a file server's, say."""
    return [path for path in folder.iterdir() if path.is_symlink() or not path.is_dir()]


def _since(mark: Path) -> timedelta:
    return datetime.now(UTC) - datetime.fromtimestamp(mark.stat().st_mtime, UTC)


def _holds_values(file: Path) -> bool:
    """Returns True if a file of tensors has one that is not zero everywhere, or cannot be read."""
    try:
        return any(values.any() for values in safetensors.numpy.load_file(file).values())
    except FileNotFoundError:
        return False
    except (SafetensorError, OSError):
        return True
