"""A simulated run, from its first round to its report.

Notable: nothing of a round is written twice. Rounds follow `fedpeft.rounds.state_machine`, clients train through
`fedpeft.training.loop` and `fedpeft.adapters.updates`, updates are accepted by `fedpeft.rounds.acceptance` and folded
by `fedpeft.rounds.folding.fold`, so with the same run file, client names, data and number of torch's threads the
adapter has the bits that a server and its agents give.

What is different: no deadline runs out while a client works, and updates arrive in an order that is drawn from the
seed, which says who is late where a round wants more clients than it counts (`over_selection`). A client that trains in
vain gives its ticket back, as an agent does; the round's deadline passes only once nobody is left to work. How clients
used their tickets has the consequences that it has on a server (`fedpeft.rounds.conduct`): those who did not deliver
are sampled last. In buffered rounds a free place is given away at once, and a simulated clock says whose update is next
(`fedpeft.simulation.at_work`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import astuple

import structlog
from google.protobuf import json_format

from fedpeft.adapters import payload
from fedpeft.config import RunConfig
from fedpeft.errors import BlobCorrupt, InvalidArgument, StateInvalid
from fedpeft.privacy.accounting import overspent
from fedpeft.privacy.statement import EPSILON, statement
from fedpeft.rounds import acceptance, conduct, events, state_machine
from fedpeft.rounds.commit import RoundEmptied, RunHeader
from fedpeft.rounds.groups import SENT
from fedpeft.rounds.local_job import LocalFailure, LocalOutcome, LocalUpdate
from fedpeft.rounds.state_machine import Phase, Round
from fedpeft.rounds.tickets import Ticket, TicketState, withdrawals
from fedpeft.rpc import wire
from fedpeft.simulation.at_work import ClientsAtWork
from fedpeft.simulation.client_memory import ClientMemory
from fedpeft.simulation.engines import Engine
from fedpeft.simulation.progress_log import ProgressLog
from fedpeft.simulation.report import Arrival, Json, RoundBook, moment, progress_json, round_json
from fedpeft.simulation.versions import Versions
from fedpeft.tracking import Tracking
from fedpeft.training.run_spec import version_0

log = structlog.get_logger(__name__)

LONGEST_S = 1000 * 86_400.0
"""Longer than any simulation takes."""


class SimulatedRun:
    """One run.

    Args:
        header: The run.
        engine: Computes what clients do.
        memory: State that clients keep from round to round.
        versions: The server half.
        progress: Progress on disk; None for a simulation that cannot go on where it was.
    """

    def __init__(
        self,
        header: RunHeader,
        engine: Engine,
        memory: ClientMemory,
        versions: Versions,
        progress: ProgressLog | None = None,
    ) -> None:
        self._config = header.config
        self._header = header
        self._everybody = frozenset(engine.trainer.inputs.clients)
        self._trainer = engine.trainer
        self._at_work = ClientsAtWork(header.config, engine, memory)
        self._rounds = header.config.rounds
        if self._at_work.has_clock:  # a client that works keeps its place, however long that really takes
            self._rounds = self._rounds.model_copy(update={"deadline_s": LONGEST_S})
        self._memory = memory
        self._versions = versions
        self._progress = progress
        self._seconds_before = 0.0
        self._holds: dict[str, tuple[int, bytes]] = {}
        self._facts: dict[str, str] = {}
        self._excluded: set[str] = set()
        self._conducts: dict[str, conduct.Conduct] = {}
        self._clock: list[float] = []
        self._began = self._resumed_at = time.time()

    def run(
        self,
        resumed: Callable[[int], None] | None,
        committed: Callable[[Json], None] | None,
        worked: Callable[[int, int, int], None] | None,
        tracking: Tracking,
    ) -> Json:
        """Holds all rounds; returns the report."""
        self._worked = worked
        initial, done = self._begin()
        if resumed is not None and done:
            resumed(len(done))
        tracking.begin(self._identity(initial), simulated=True)
        for row in done:
            tracking.round(row)
        current = Round(self._header.run, len(done) + 1)
        while current.number <= self._config.rounds.count:
            if why := overspent(self._config, self._versions.ledger, current.number):
                return self._report(initial, done, RoundBook(current), why)
            book, reason = self._folded(current, _spent(done))
            if reason:
                return self._report(initial, done, book, reason)
            book.round = self._advance(book.round, events.Aggregated())
            book.committed_at = time.time()
            self._clock.append(self._at_work.now)
            self._settle(book.round)
            self._version = self._versions.publish(current.number)
            book.metrics = {**book.metrics, **self._trainer.evaluate(self._version)}
            done.append(round_json(book, self._trainer.run.model.backbone.parameters))
            self._keep_progress(book.round, done[-1])
            tracking.round(done[-1])
            if committed is not None:
                committed(done[-1])
            current = book.round.following(self._rounds, time.time())
            self._versions.keep_published({current.base_version, *(t.base_version for t in current.tickets)})
        return self._report(initial, done, None, "")

    def _begin(self) -> tuple[dict[str, float], list[Json]]:
        """Begins the run, or goes on where it was; returns the figures of version 0, and the rounds that are done."""
        progress = self._progress
        if progress is not None and progress.begun is not None:
            try:
                return self._resume(progress, progress.begun)
            except BlobCorrupt as error:
                progress.clear()
                raise StateInvalid(
                    f"{progress.folder} is damaged ({error.message}), so the simulation cannot go on where it was; the "
                    "folder was removed, and the same command begins at round 1"
                ) from None
        self._versions.begin(version_0(self._trainer.run.spec, self._trainer.run.model))
        first = self._versions.first
        self._version = self._versions.publish(0)
        initial = self._trainer.evaluate(self._version)
        if progress is not None:
            self._versions.sync()
            progress.begin({"began": self._began, "initial": initial, "first": first})
        return initial, []

    def _resume(self, progress: ProgressLog, begun: Json) -> tuple[dict[str, float], list[Json]]:
        self._memory.check()
        self._versions.resume([line["versions"] for line in progress.rounds], begun["first"])
        for line in progress.rounds:
            self._holds.update(
                {client: (number, bytes.fromhex(sha)) for client, (number, sha) in line["holds"].items()}
            )
            self._conducts.update({client: conduct.Conduct(*each) for client, each in line["conducts"].items()})
            self._excluded, self._facts = set(line["excluded"]), line["facts"]
            self._clock.append(self._at_work.now)
            self._seconds_before = line["seconds"]
        self._resumed_at, self._began = time.time(), begun["began"]
        self._version = self._versions.publish(len(progress.rounds))
        return begun["initial"], [line["row"] for line in progress.rounds]

    def _keep_progress(self, done: Round, row: Json) -> None:
        """Makes a committed round count, whatever happens to this process from now on."""
        clients = [ticket.client for ticket in done.tickets]
        if self._progress is not None:
            holds = {client: self._holds[client] for client in clients if client in self._holds}
            conducts = {client: self._conducts[client] for client in clients if client in self._conducts}
            self._versions.sync()
            self._memory.sync()
            self._progress.committed(
                {
                    "row": row,
                    "versions": self._versions.progress(),
                    "memory": self._memory.changes,
                    "holds": {client: [number, sha.hex()] for client, (number, sha) in holds.items()},
                    "conducts": {client: astuple(each) for client, each in conducts.items()},
                    "excluded": sorted(self._excluded),
                    "facts": self._facts,
                    "seconds": self._seconds(),
                }
            )
        self._memory.settle()
        self._versions.settle()

    def _seconds(self) -> float:
        """Returns the time that the run took, without that in which no process held it."""
        return round(self._seconds_before + time.time() - self._resumed_at, 3)

    def _settle(self, done: Round) -> None:
        """Notes how clients used their tickets of a committed round; those who did not deliver are sampled last."""
        known = self._conducts
        for client, new in conduct.settled(done, self._config.rounds, lambda c: known.get(c, conduct.GOOD)).items():
            if new.is_aside and not known.get(client, conduct.GOOD).is_aside:
                log.warning("client set aside", round=done.number, client=client, refused=new.refused)
            known[client] = new

    def _folded(self, current: Round, epsilon: float) -> tuple[RoundBook, str]:
        """Holds a round up to its commit, `epsilon` being spent before; or returns why it cannot get there."""
        book = RoundBook(current)
        while not (reason := self._close(book)):
            try:
                self._versions.fold(book, epsilon)
            except RoundEmptied as emptied:
                self._exclude(book, emptied.excluded)
                continue
            self._exclude(book, book.excluded)
            break
        self._versions.forget(book)
        return book, reason

    def _exclude(self, book: RoundBook, excluded: Mapping[str, str]) -> None:
        """Takes updates out of a round; each goes into its client's residual, as it would at a site."""
        for ticket in book.round.in_state(TicketState.RECEIVED):
            if ticket.id in excluded:
                log.warning("update excluded", round=book.round.number, client=ticket.client, cause=excluded[ticket.id])
                self._take_back(ticket.client)
            else:
                self._excluded.discard(ticket.client)
                self._memory.confirm(ticket.client)
        book.round = self._advance(book.round, events.Excluded(excluded))

    def _take_back(self, client: str) -> None:
        self._memory.take_back(client)
        if client in self._excluded:  # what it was made from was excluded before: it would be so for ever
            self._memory.forget_residual(client)
        self._excluded ^= {client}

    def _close(self, book: RoundBook) -> str:
        """Brings a round to its fold; or returns why it cannot get there."""
        if self._at_work.has_clock:
            self._sample(book)
        while book.round.phase is not Phase.AGGREGATING:
            if book.round.phase is Phase.OPEN and book.round.in_state(TicketState.ISSUED):
                self._work(book)
            elif not self._sample(book):
                now = book.round.deadline or time.time()
                book.round, effects = state_machine.advance(book.round, events.TimePassed(), self._rounds, now)
                for effect in effects:
                    if isinstance(effect, events.Pause):
                        return effect.reason + withdrawals(book.round.tickets)
        return ""

    def _sample(self, book: RoundBook) -> bool:
        """Offers all clients to a round, and sets those to work that get a ticket; returns whether that changed it."""
        here = book.round
        now = time.time() if self._at_work.has_clock else here.deadline or time.time()
        waiting = events.Waiting(self._everybody, conduct.Demerits(self._conducts, here.number), math.inf)
        book.round, effects = state_machine.advance(here, waiting, self._rounds, now)
        for effect in effects:
            for ticket in effect.tickets if isinstance(effect, events.Issue) else ():
                self._pull(book, ticket.client)
                self._at_work.begin(ticket, self._version)
        return book.round is not here

    def _work(self, book: RoundBook) -> None:
        """Lets clients use their tickets, until the round closes or nobody is at work."""
        for ticket, outcome in self._at_work.arrivals(book):
            if isinstance(outcome, LocalUpdate):
                self._facts = outcome.facts
            if ticket.state is TicketState.LATE:
                if isinstance(outcome, LocalUpdate):
                    self._memory.keep(ticket.client, outcome.if_not)
                continue
            self._arrive(book, ticket, outcome)
            self._say_worked(book.round)
            if self._at_work.has_clock:  # a free place is given away at once, and not when nobody is at work
                self._sample(book)

    def _arrive(self, book: RoundBook, ticket: Ticket, outcome: LocalOutcome) -> None:
        """Takes what came of a client's work into an open round."""
        client, number = ticket.client, book.round.number
        if isinstance(outcome, LocalFailure):
            log.warning("ticket is given up", round=number, client=client, cause=outcome.error.message)
            reason = f"{outcome.error.reason}: {outcome.error.message}"
            book.round = self._advance(book.round, events.Withdrawn(ticket.id, reason))
            return
        manifest, data = outcome.prepared.manifest, outcome.prepared.payload
        book.up[client] = len(data)
        try:
            acceptance.check_manifest(ticket, manifest, self._config, self._header.spec)
            acceptance.check_claims(outcome.examples, outcome.metrics)
            squared = payload.checked_squared_norm(manifest, memoryview(data))
            norm = acceptance.norm_of(manifest, squared, outcome.examples)
            acceptance.check_norm(norm, self._config)
        except InvalidArgument as error:
            log.warning("update refused", round=number, client=client, cause=error.message)
            self._memory.forget_residual(client)
            if SENT in outcome.if_not:  # it was seen, and what it spent is spent
                self._memory.keep(client, {SENT: outcome.if_not[SENT]})
            refused = events.Refused(ticket.id, f"{error.reason}: {error.message}")
            book.round = self._advance(book.round, refused)
            return
        self._versions.spool(ticket.id).write_bytes(data)
        book.arrivals[ticket.id] = Arrival(outcome.examples, norm, manifest, outcome.metrics)
        self._memory.keep(client, outcome.if_counted, outcome.if_not)
        book.round = self._advance(book.round, events.Received(ticket.id))

    def _pull(self, book: RoundBook, client: str) -> None:
        """Books what a server would send: nothing to who holds these bytes already, else what changed since."""
        manifest, number = self._version.manifest, book.round.base_version
        have, sha256 = self._holds.get(client, (None, b""))
        needed = payload.missing(manifest, self._header.spec, number, have)
        sent = 0 if sha256 == manifest.sha256 else sum(manifest.entries[i].length for i in needed)
        book.down[client] = book.down.get(client, 0) + sent  # again after it gave a ticket back
        self._holds[client] = number, manifest.sha256

    def _say_worked(self, current: Round) -> None:
        if self._worked is not None:
            left = len(current.in_state(TicketState.ISSUED))
            self._worked(current.number, len(current.tickets) - left, len(current.tickets))

    def _advance(self, current: Round, event: events.Event) -> Round:
        return state_machine.advance(current, event, self._rounds, time.time())[0]

    def _identity(self, initial: Mapping[str, float]) -> Json:
        """Returns what the report says of the run from its beginning."""
        run = self._trainer.run
        return {
            "run": self._header.run,
            "name": self._config.name,
            "created_at": moment(self._began),
            "method": run.model.spec.method,
            "adapter_parameters": run.model.spec.parameters,
            "model_parameters": run.model.backbone.parameters,
            "backbone_fingerprint": run.fingerprint,
            "initial_metrics": dict(sorted(initial.items())),
            "config": json_format.MessageToDict(wire.config_to_proto(self._config), preserving_proto_field_name=True),
        }

    def _report(self, initial: Mapping[str, float], done: list[Json], paused: RoundBook | None, reason: str) -> Json:
        return {
            **self._identity(initial),
            "state": "paused" if paused else "completed",
            "reason": reason,
            "round": paused.round.number if paused else len(done),
            "version": len(done),
            "rounds": done,
            **({"privacy": stated} if (stated := _privacy(self._config, done)) else {}),
            "set_aside": sorted(client for client, each in self._conducts.items() if each.is_aside),
            "declines": [],  # a simulated client takes what it is given
            "evaluators": [],  # versions are scored here
            "progress": [],  # nobody is awaited
            "in_progress": progress_json(paused) if paused else None,
            "facts": self._facts,
            "squared_distances": self._versions.squared_distances(self._trainer.run.model),
            "seconds": self._seconds(),
            **({"clock": self._clock} if self._at_work.has_clock else {}),
        }


def _privacy(config: RunConfig, done: list[Json]) -> Json | None:
    """Returns the guarantee of a run with these rounds; None if it adds no noise."""
    given = config.privacy
    if given is None or given.mechanism is None:
        return None
    return statement(given.mechanism, given.delta or 0.0, _spent(done), given.noise_multiplier, given.target_epsilon)


def _spent(done: list[Json]) -> float:
    """Returns the epsilon that these rounds have spent; 0 without noise."""
    return max((row["metrics"].get(EPSILON, 0.0) for row in done), default=0.0)
