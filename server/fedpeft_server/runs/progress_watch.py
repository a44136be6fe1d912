"""Watches the clients that open rounds await: keeps how far each is, and says once when one hangs and when it is back.

All of it is in memory, and gone with the ticket. A server that was started again counts from its start.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice

import structlog

from fedpeft.errors import DiskFull, FedpeftError, ProgressInvalid, TransfersBusy, Unavailable
from fedpeft.rounds.tickets import Ticket, TicketState
from fedpeft_server.metrics import Metrics
from fedpeft_server.runs.engine import RunEngine
from fedpeft_server.runs.progress import NO_PAST, Past, Progress, Refusal, Report, State, Verdict, judge
from fedpeft_server.store.store import Store
from fedpeft_server.timing import Timing

log = structlog.get_logger()

AT_ONCE = 500
"""Clients whose last rounds are read in one look, and clients that are judged before others get their turn."""


@dataclass(slots=True)
class _Open:
    """An open ticket: whose it is, how far that client is, and what its last rounds took, once that was read."""

    run: str
    client: str
    progress: Progress
    past: Past | None = None


class ProgressWatch:
    """Progress of the clients that hold open tickets.

    Args:
        store: Knows what their last rounds took.
        metrics: Metrics that show how many hang.
        heard: Returns when anything was last heard of a client, on the monotonic clock.
        uploading: Says whether an update of a client is arriving.
        timing: Bounds after which a client is said to hang, and the pause between two looks.
    """

    def __init__(
        self,
        store: Store,
        metrics: Metrics,
        heard: Callable[[str], float],
        uploading: Callable[[str], bool],
        timing: Timing,
    ) -> None:
        self.timing = timing
        self._store = store
        self._metrics = metrics
        self._heard = heard
        self._uploading = uploading
        self._open: dict[str, _Open] = {}  # by ticket
        self._of: dict[str, set[str]] = {}  # tickets by client
        self._reports: dict[str, Report] | None = None  # None where nobody asks for them
        self._uploads_elsewhere: dict[str, frozenset[str]] = {}  # by daemon
        self._ill: dict[str, dict[str, State]] = {}  # run, client: those of whom there was something to say

    def issued(self, run: str, tickets: Iterable[Ticket]) -> None:
        """Begins to watch the clients of tickets that were given out, or that are open at the start."""
        now = time.monotonic()
        for ticket in tickets:
            self._open[ticket.id] = _Open(run, ticket.client, Progress.at(now))
            self._of.setdefault(ticket.client, set()).add(ticket.id)

    def report(self, ticket: str, report: Report) -> None:
        """Takes what a client says of the training for its ticket; of one that is not open, nothing is kept.

        Raises:
            ProgressInvalid: If it says more steps, or updates, than there are.
        """
        for done, name, total in ((report.step, "step", report.steps), (report.updates, "updates", report.wanted)):
            if done > total:
                of = "steps" if name == "step" else "updates_wanted"
                fault = (
                    f"is {done}, of {total} in all" if total else f"is given without `{of}`, how many there are in all"
                )
                raise ProgressInvalid(f"{name} {fault}", ((name, fault),))
        self.follow_report(ticket, report)
        if self._reports is not None and report.steps and ticket in self._open:
            self._reports[ticket] = report

    def take_reports(self) -> dict[str, Report]:
        """Returns the reports on tickets for which clients said how far they are since this was asked last."""
        reports, self._reports = self._reports or {}, {}
        return reports

    def follow_report(self, ticket: str, report: Report) -> None:
        """Takes up what a client said, to another daemon for example."""
        if (open_ := self._open.get(ticket)) is not None:
            open_.progress = open_.progress.reported(report, time.monotonic())

    def upload_elsewhere(self, daemon: str, clients: Collection[str]) -> None:
        """Takes up of which clients updates are arriving at another daemon; none where it is gone."""
        self._uploads_elsewhere.pop(daemon, None)
        if clients:
            self._uploads_elsewhere[daemon] = frozenset(clients)

    def is_uploading(self, client: str) -> bool:
        """Returns True if an update of a client is arriving, here or elsewhere."""
        return self._uploading(client) or any(client in clients for clients in self._uploads_elsewhere.values())

    @contextmanager
    def noting_refusals(self, run: str, client: str, transfer: State) -> Iterator[None]:
        """Keeps why the call in the block is refused for now, until one like it is served or training moves.

        Args:
            run: Run of the call.
            client: Caller.
            transfer: `UPLOADING`, or `TRAINING` for a download.
        """
        try:
            yield
        except (DiskFull, TransfersBusy, Unavailable) as error:
            self.note_refusal(run, client, transfer, error)
            raise
        self._note(run, client, transfer, None)

    def note_refusal(self, run: str, client: str, transfer: State, error: FedpeftError) -> None:
        """Keeps why a call for a transfer is refused for now."""
        self._note(run, client, transfer, Refusal(transfer, error.in_short, time.monotonic()))

    def _note(self, run: str, client: str, transfer: State, refusal: Refusal | None) -> None:
        for open_ in (self._open[ticket] for ticket in self._of.get(client, ())):
            known = open_.progress.refusal
            if open_.run == run and (refusal or (known and known.transfer is transfer)):
                open_.progress = replace(open_.progress, refusal=refusal)

    def of(self, client: str, usable: Callable[[str, str, str], bool]) -> tuple[str, Progress, Verdict] | None:
        """Returns run, progress and verdict of a client: of several open tickets of the one that is worst.

        Args:
            client: The client.
            usable: Says of run, client and ticket whether it is open; those that were closed since the last look are
                still known here.
        """
        known = ((ticket, self._open[ticket]) for ticket in self._of.get(client, ()))
        mine = [open_ for ticket, open_ in known if usable(open_.run, client, ticket)]
        found = [(open_.run, open_.progress, self._judge(open_)) for open_ in mine]
        return min(found, key=lambda each: (each[2].rank, each[1].issued), default=None)

    def awaited(self, engine: RunEngine, most: int) -> list[tuple[str, Progress, Verdict]]:
        """Returns client, progress and verdict of those that a run's open round awaits, those that hang first."""
        ill = self._ill.get(engine.run.id, {})
        tickets = engine.awaited()
        first = [ticket for ticket in tickets if ticket.client in ill] if ill else []
        then = islice((ticket for ticket in tickets if ticket.client not in ill), most)
        known = [open_ for ticket in (*first, *then) if (open_ := self._open.get(ticket.id))][:most]
        found = [(open_.client, open_.progress, self._judge(open_)) for open_ in known]
        return sorted(found, key=lambda each: (each[2].rank, each[0]))

    async def check(self, engines: Iterable[RunEngine], changed: Callable[[str], None]) -> None:
        """Judges every awaited client; logs and shows what is new.

        Args:
            engines: The runs with rounds left to be held.
            changed: Told the run whose clients' state is another than at the last look.
        """
        engines = list(engines)
        held = {ticket.id for engine in engines for ticket in engine.awaited()}
        self._forget(ticket for ticket in list(self._open) if ticket not in held)
        for engine in engines:
            await self._remember(engine)
            await self._look(engine, changed)
        for run in set(self._ill) - {engine.run.id for engine in engines}:
            self.forget(run)

    def forget(self, run: str) -> None:
        """Forgets a run that is over."""
        self._forget([ticket for ticket, open_ in self._open.items() if open_.run == run])
        if self._ill.pop(run, None) is not None:
            self._metrics.awaited_clients.remove_by_labels({"run": run})

    async def _look(self, engine: RunEngine, changed: Callable[[str], None]) -> None:
        run, counts, ill = engine.run.id, Counter[State](), dict[str, State]()
        words: dict[str, str] = {}
        for number, ticket in enumerate(engine.awaited(), 1):
            if (open_ := self._open.get(ticket.id)) is None:
                continue
            verdict = self._judge(open_)
            counts[verdict.state] += 1
            if not verdict.is_well:
                ill[open_.client], words[open_.client] = verdict.state, verdict.words
            if number % AT_ONCE == 0:
                await asyncio.sleep(0)
        before = self._ill.get(run, {})
        self._ill[run] = ill
        for state in State:
            self._metrics.awaited_clients.labels(run, state).set(counts[state])
        self._say(engine, before, ill, words)
        if before != ill:
            changed(run)

    def _say(self, engine: RunEngine, before: dict[str, State], now: dict[str, State], words: dict[str, str]) -> None:
        """Logs who hangs now and did not before, and who is back."""
        number, run = engine.round.number, engine.run.id
        for client, state in now.items():
            if state.hangs and not (client in before and before[client].hangs):
                log.warning("client hangs", run=run, round=number, client=client, cause=words[client])
        for client, state in before.items():
            if state.hangs and not (client in now and now[client].hangs):
                ticket = engine.round.ticket_of(client)
                if ticket and ticket.state in (TicketState.ISSUED, TicketState.RECEIVED):
                    log.info("client is back", run=run, round=number, client=client)

    async def _remember(self, engine: RunEngine) -> None:
        """Reads what the last rounds took those clients that are at work long enough for it to matter."""
        old = time.monotonic() - self.timing.slow_least_s
        mine = (self._open.get(ticket.id) for ticket in engine.awaited())
        wanted = [open_ for open_ in mine if open_ and open_.past is None and open_.progress.issued <= old][:AT_ONCE]
        if not wanted:
            return
        names = [open_.client for open_ in wanted]
        pasts = await self._store.read(self._store.db.pasts, engine.run.id, engine.round.number, names)
        for open_ in wanted:
            taken = pasts.get(open_.client, [])
            open_.past = Past([each for each, _ in taken], [each for _, each in taken if each is not None])

    def _judge(self, open_: _Open) -> Verdict:
        heard, uploading = self._heard(open_.client), self.is_uploading(open_.client)
        past = open_.past or NO_PAST
        return judge(open_.progress, time.monotonic(), heard=heard, uploading=uploading, past=past, timing=self.timing)

    def _forget(self, tickets: Iterable[str]) -> None:
        for ticket in tickets:
            open_ = self._open.pop(ticket)
            mine = self._of[open_.client]
            mine.discard(ticket)
            if not mine:
                del self._of[open_.client]
