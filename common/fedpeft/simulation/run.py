"""A simulated run, from its first round to its report.

Notable: nothing of a round is written twice. Rounds follow `fedpeft.rounds.state_machine`, clients train through
`fedpeft.training.loop` and `fedpeft.adapters.updates`, updates are folded by `fedpeft.rounds.fold`, so with the same
run file, client names, data and number of torch's threads the adapter has the bits that a server and its agents give.

What is different: clients work one after the other, and no deadline runs out while one works. Where a round wants more
clients than it counts (`over_selection`), who is late is drawn from the seed. A client that trains in vain gives its
ticket back, as an agent does; the round's deadline passes only once nobody is left to work. How clients used their
tickets has the consequences that it has on a server (`fedpeft.rounds.conduct`): those who did not deliver are sampled
last.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import structlog
from google.protobuf import json_format

from fedpeft import ids, seeds
from fedpeft.adapters import payload
from fedpeft.config import RunConfig
from fedpeft.data.reading import Reading
from fedpeft.errors import (
    ConfigInvalid,
    DataInvalid,
    ManifestInvalid,
    PayloadInvalid,
    StateInvalid,
    TrainingFailed,
)
from fedpeft.process import durable, locks
from fedpeft.process.mapped_files import mapped
from fedpeft.rounds import conduct, state_machine
from fedpeft.rounds.combinations import check_combination
from fedpeft.rounds.commit import RoundEmptied, RunHeader
from fedpeft.rounds.fold import squared_norm
from fedpeft.rounds.state_machine import Phase, Round, Ticket, TicketState
from fedpeft.rpc import wire
from fedpeft.simulation.bench import Trained, Version, Workbench
from fedpeft.simulation.clients import Clients, reading_of
from fedpeft.simulation.leakage import leakage
from fedpeft.simulation.report import Arrival, Json, RoundBook, moment, progress_json, round_json
from fedpeft.simulation.versions import Versions

REPORT = "report.json"
RUN = "simulation"
"""Id of a simulated run, where none is given."""

log = structlog.get_logger(__name__)


def simulate(
    config: RunConfig,
    clients: Clients,
    out: Path,
    evaluate: Path | None = None,
    weights: Path | None = None,
    *,
    label_map: Path | None = None,
    device: str = "auto",
    reading: Reading | None = None,
    run: str = RUN,
    partition: Mapping[str, Any] | None = None,
    committed: Callable[[Json], None] | None = None,
    worked: Callable[[int, int, int], None] | None = None,
) -> Json:
    """Holds a whole run.

    Leaves in `out`: the newest adapter version in adapter.safetensors and the records so far in records.jsonl, both
    after every round, and report.json at the end. Earlier ones there are replaced. `out` is held meanwhile: another
    simulation there is refused before it changes anything.

    Args:
        config: The run file; its `[simulation]` has done its work by now, see `fedpeft.simulation.clients.clients_of`.
        clients: Data by client: a path, or what the model's learner read. The order means nothing, names do.
        out: The folder; made if it is not there.
        evaluate: Held-out data on which every version is scored.
        weights: A file, or a folder of files, that stands for the weights that the run names.
        label_map: A file of own class names to the run's, for all of the data.
        device: auto, cpu, cuda or cuda:N.
        reading: How images are read; as `[simulation]` says if absent.
        run: Id of the run, which stands in the adapter file and the records.
        partition: How the data was divided, for the report.
        committed: Told of every committed round, as the report has it.
        worked: Told, after every client's turn, of the round's number, how many had theirs, and how many were sampled.

    Returns:
        The report, as in report.json: what `fedpeft run show --json` says of a run, `wire_bytes_up` and
        `wire_bytes_down` None because nothing was sent; besides `facts` (torch's version, device, precision, threads),
        `partition`, `overlap` (held-out images that are training images too, see `fedpeft.data.overlap.Overlap`) and
        `seconds`. `state` is completed, or paused if a round could not get its updates.

    Raises:
        ConfigInvalid: If a round wants more clients than there are, an option of the PEFT method is wrong, or the
            strategy cannot fold its tensors.
        DataInvalid: If a client's data, or the held-out data, cannot be used.
        ModelInvalid: If the model or its weights cannot be had.
        SettingsInvalid: If there is no such device.
        StateInvalid: If `out` cannot be written, or another simulation writes there.
    """
    _check(config, clients)
    reading = reading or reading_of(config)
    config = wire.config_from_proto(wire.config_to_proto(config))  # as a server gets it: without [simulation]
    try:
        out.mkdir(parents=True, exist_ok=True)
        with locks.results(out, "simulation"), durable.scratch(out / "simulation") as scratch:
            memory = scratch / "memory"
            memory.mkdir()
            bench = Workbench(config, clients, memory, evaluate, weights, label_map, device, reading)
            shared = leakage(clients, evaluate, config, reading)
            check_combination(config, bench.spec)
            versions = Versions(RunHeader(run, config, bench.spec, bench.fingerprint), out, scratch)
            (out / REPORT).unlink(missing_ok=True)  # an earlier simulation's would stand beside what this one leaves
            simulation = _Simulation(config, sorted(clients), bench, versions, run)
            report = {
                **simulation.run(committed, worked),
                "partition": None if partition is None else dict(partition),
                "overlap": None if shared is None else shared.as_dict(),
            }
            durable.write_text(out / REPORT, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        raise StateInvalid(f"cannot use {error.filename or out}: {error.strerror or error}") from None
    return report


def _check(config: RunConfig, clients: Clients) -> None:
    for name in clients:
        if not ids.CLIENT.fullmatch(name):
            raise DataInvalid(f"client name {name[:80]!r} is not {ids.CLIENT_FORM}")
    if len(clients) < config.rounds.least_available:
        raise ConfigInvalid(
            f"a round needs {config.rounds.least_available} clients ([rounds]), and there are {len(clients)}: lower "
            "rounds.clients, or simulate more"
        )
    if len(clients) < config.rounds.available:
        log.warning("rounds open without all clients that they want", wanted=config.rounds.sampled, there=len(clients))


class _Simulation:
    """One run.

    Args:
        config: The run file, as a server has it.
        names: All clients.
        bench: The client half.
        versions: The server half.
        run: The run's id.
    """

    def __init__(self, config: RunConfig, names: Sequence[str], bench: Workbench, versions: Versions, run: str) -> None:
        self._config = config
        self._everybody = frozenset(names)
        self._bench = bench
        self._versions = versions
        self._run = run
        self._holds: dict[str, tuple[int, bytes]] = {}
        self._facts: dict[str, str] = {}
        self._excluded: set[str] = set()
        self._conducts: dict[str, conduct.Conduct] = {}
        self._began = time.time()

    def run(self, committed: Callable[[Json], None] | None, worked: Callable[[int, int, int], None] | None) -> Json:
        """Holds all rounds; returns the report."""
        self._worked = worked
        self._versions.begin(self._bench.initial)
        version = self._newest()
        initial = self._bench.score(version)
        done: list[Json] = []
        for number in range(1, self._config.rounds.count + 1):
            book, reason = self._folded(number, version)
            if reason:
                return self._report(initial, done, book, reason)
            book.round = self._advance(book.round, state_machine.Aggregated())
            book.committed_at = time.time()
            self._settle(book.round)
            version = self._newest()
            book.metrics = {**book.metrics, **self._bench.score(version)}
            done.append(round_json(book, self._bench.parameters))
            if committed is not None:
                committed(done[-1])
        return self._report(initial, done, None, "")

    def _settle(self, done: Round) -> None:
        """Notes how clients used their tickets of a committed round; those who did not deliver are sampled last."""
        known = self._conducts
        for client, new in conduct.settled(done, self._config.rounds, lambda c: known.get(c, conduct.GOOD)).items():
            if new.is_aside and not known.get(client, conduct.GOOD).is_aside:
                log.warning("client set aside", round=done.number, client=client, refused=new.refused)
            known[client] = new

    def _newest(self) -> Version:
        with self._versions.newest() as adapter:
            return self._bench.version(adapter)

    def _folded(self, number: int, version: Version) -> tuple[RoundBook, str]:
        """Holds a round up to its commit; or returns why it cannot get there."""
        book = RoundBook(Round(self._run, number))
        while not (reason := self._close(book, version)):
            try:
                self._versions.fold(book)
            except RoundEmptied as emptied:
                self._exclude(book, emptied.excluded)
                continue
            self._exclude(book, book.excluded)
            break
        self._versions.forget(book)
        return book, reason

    def _exclude(self, book: RoundBook, excluded: Mapping[str, str]) -> None:
        """Takes updates out of a round; each goes into its client's residual, as it would at a site."""
        for ticket in book.round.tickets:
            if ticket.id in excluded:
                log.warning("update excluded", round=book.round.number, client=ticket.client, cause=excluded[ticket.id])
                self._take_back(book, ticket)
            elif ticket.state is TicketState.RECEIVED:
                self._excluded.discard(ticket.client)
        book.round = self._advance(book.round, state_machine.Excluded(excluded))

    def _take_back(self, book: RoundBook, ticket: Ticket) -> None:
        memory, client = self._bench.memory, ticket.client
        if client in self._excluded:  # what it was made from was excluded before: it would be so for ever
            self._excluded.discard(client)
            memory.forget_residual(client)
            return
        self._excluded.add(client)
        if self._bench.remembers:
            manifest, left = book.arrivals[ticket.id].manifest, memory.residual(client)
            sent = payload.decode(manifest, mapped(self._versions.spool(ticket.id)))
            whole = {name: values + left[name] if name in left else values for name, values in sent.items()}
            memory.keep(client, residual={**left, **whole}, local=memory.local(client))

    def _close(self, book: RoundBook, version: Version) -> str:
        """Brings a round to its fold; or returns why it cannot get there."""
        settings = self._config.rounds
        while book.round.phase is not Phase.AGGREGATING:
            ticket = self._next(book.round)
            if ticket is not None:
                book.round = self._work(book, ticket, version)
                self._say_worked(book.round)
                continue
            here, now = book.round, book.round.deadline or time.time()
            waiting = state_machine.Waiting(self._everybody, conduct.demerits(self._conducts, here.number), math.inf)
            after, effects = state_machine.advance(here, waiting, settings, now)
            if after is here:
                after, effects = state_machine.advance(here, state_machine.TimePassed(), settings, now)
            book.round = after
            for effect in effects:
                if isinstance(effect, state_machine.Pause):
                    return effect.reason
        self._late(book, version)
        return ""

    def _say_worked(self, current: Round) -> None:
        if self._worked is not None:
            left = len(current.in_state(TicketState.ISSUED))
            self._worked(current.number, len(current.tickets) - left, len(current.tickets))

    def _next(self, current: Round) -> Ticket | None:
        """Returns whose turn it is: an order of arrival that the seed draws anew for each round."""
        seed, number = self._config.rounds.seed, current.number
        return min(
            current.in_state(TicketState.ISSUED),
            key=lambda t: (seeds.derive(seed, "arrival", number, t.client), t.client),
            default=None,
        )

    def _work(self, book: RoundBook, ticket: Ticket, version: Version) -> Round:
        """Lets a client use its ticket; returns the round after it."""
        trained = self._train(book, ticket, version)
        if isinstance(trained, str):
            return self._advance(book.round, state_machine.Withdrawn(ticket.id, trained))
        manifest, data = trained.update.manifest, trained.update.payload
        book.up[ticket.client] = len(data)
        try:
            payload.check_manifest(manifest, self._bench.spec.sent(book.round.number), (self._config.codec.encoding,))
            payload.check_payload(manifest, memoryview(data))
        except (ManifestInvalid, PayloadInvalid) as error:
            log.warning("update refused", round=book.round.number, client=ticket.client, cause=error.message)
            self._bench.memory.forget_residual(ticket.client)
            return self._advance(book.round, state_machine.Refused(ticket.id, f"{error.reason}: {error.message}"))
        after = self._advance(book.round, state_machine.Received(ticket.id))
        self._versions.spool(ticket.id).write_bytes(data)
        norm = math.sqrt(squared_norm(manifest, memoryview(data)))
        book.arrivals[ticket.id] = Arrival(trained.examples, norm, manifest, trained.metrics)
        self._bench.memory.keep(ticket.client, residual=trained.update.residual_if_counted, local=trained.local)
        return after

    def _train(self, book: RoundBook, ticket: Ticket, version: Version) -> Trained | str:
        """Returns what a client trained, or why it could not."""
        self._pull(book, ticket, version)
        try:
            trained = self._bench.train(ticket.client, book.round.number, version)
        except TrainingFailed as error:
            log.warning("ticket is given up", round=book.round.number, client=ticket.client, cause=error.message)
            return f"{error.reason}: {error.message}"
        self._facts = trained.facts
        return trained

    def _pull(self, book: RoundBook, ticket: Ticket, version: Version) -> None:
        """Books what a server would send: nothing to who holds these bytes already, else what changed since."""
        manifest, number = version.manifest, book.round.base_version
        have, sha256 = self._holds.get(ticket.client, (None, b""))
        needed = payload.missing(manifest, self._bench.spec, number, have)
        book.down[ticket.client] = 0 if sha256 == manifest.sha256 else sum(manifest.entries[i].length for i in needed)
        self._holds[ticket.client] = number, manifest.sha256

    def _late(self, book: RoundBook, version: Version) -> None:
        """Lets those who are too late finish: what they trained goes into their residuals, if there are any."""
        for ticket in book.round.in_state(TicketState.LATE):
            if not self._bench.remembers:
                self._pull(book, ticket, version)
                continue
            trained = self._train(book, ticket, version)
            if not isinstance(trained, str):
                self._bench.memory.keep(ticket.client, residual=trained.update.residual_if_not, local=trained.local)

    def _advance(self, current: Round, event: state_machine.Event) -> Round:
        return state_machine.advance(current, event, self._config.rounds, time.time())[0]

    def _report(self, initial: Mapping[str, float], done: list[Json], paused: RoundBook | None, reason: str) -> Json:
        bench = self._bench
        return {
            "run": self._run,
            "name": self._config.name,
            "state": "paused" if paused else "completed",
            "reason": reason,
            "round": paused.round.number if paused else len(done),
            "version": len(done),
            "created_at": moment(self._began),
            "method": bench.spec.method,
            "adapter_parameters": bench.spec.parameters,
            "model_parameters": bench.parameters,
            "backbone_fingerprint": bench.fingerprint,
            "initial_metrics": dict(sorted(initial.items())),
            "config": json_format.MessageToDict(wire.config_to_proto(self._config), preserving_proto_field_name=True),
            "rounds": done,
            "set_aside": sorted(client for client, each in self._conducts.items() if each.is_aside),
            "declines": [],  # a simulated client takes what it is given
            "evaluators": [],  # versions are scored here
            "progress": [],  # nobody is awaited
            "in_progress": progress_json(paused) if paused else None,
            "facts": self._facts,
            "seconds": round(time.time() - self._began, 3),
        }
