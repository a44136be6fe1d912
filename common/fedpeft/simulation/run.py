"""A simulated run, from its first round to its report.

Notable: nothing of a round is written twice. Rounds follow `fedpeft.rounds.state_machine`, clients train through
`fedpeft.training.loop` and `fedpeft.adapters.updates`, updates are folded by `fedpeft.rounds.fold`, so with the same
run file, client names, data and number of torch's threads the adapter has the bits that a server and its agents give.

What is different: no deadline runs out while a client works, and updates arrive in an order that is drawn from the
seed, which says who is late where a round wants more clients than it counts (`over_selection`). A client that trains in
vain gives its ticket back, as an agent does; the round's deadline passes only once nobody is left to work. How clients
used their tickets has the consequences that it has on a server (`fedpeft.rounds.conduct`): those who did not deliver
are sampled last.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import structlog
from google.protobuf import json_format

from fedpeft import ids, seeds
from fedpeft.adapters import payload
from fedpeft.config import RunConfig, SimulationConfig
from fedpeft.data.reading import Reading
from fedpeft.errors import (
    ConfigInvalid,
    DataInvalid,
    ManifestInvalid,
    PayloadInvalid,
    StateInvalid,
)
from fedpeft.privacy.transforms import transforms_of
from fedpeft.process import durable, locks
from fedpeft.rounds import conduct, state_machine
from fedpeft.rounds.combinations import check_combination
from fedpeft.rounds.commit import RoundEmptied, RunHeader
from fedpeft.rounds.local_job import LocalFailure, LocalJob, LocalOutcome, LocalUpdate, Version
from fedpeft.rounds.state_machine import Phase, Round, TicketState
from fedpeft.rpc import wire
from fedpeft.simulation.clients import ClientMemory, Clients, reading_of
from fedpeft.simulation.engines import Engine, engine_named
from fedpeft.simulation.leakage import leakage
from fedpeft.simulation.local_trainer import Inputs, LocalTrainer
from fedpeft.simulation.report import Arrival, Json, RoundBook, moment, progress_json, round_json
from fedpeft.simulation.versions import Versions
from fedpeft.training.run_spec import version_0

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
        clients: Data by client: a path, or what the model's task read. The order means nothing, names do.
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
        `wire_bytes_down` None; besides `facts` (torch's version, device, precision, threads), `partition`, `overlap`
        (see `fedpeft.data.overlap.Overlap`) and `seconds`. `state` is paused if a round could not get its updates.

    Raises:
        ConfigInvalid: If a round wants more clients than there are, there is no such engine, an option of the PEFT
            method is wrong, or the strategy cannot fold its tensors.
        DataInvalid: If a client's data, or the held-out data, cannot be used.
        ModelInvalid: If the model or its weights cannot be had.
        SettingsInvalid: If there is no such device.
        StateInvalid: If `out` cannot be written, or another simulation writes there.
    """
    _check(config, clients)
    reading, settings = reading or reading_of(config), config.simulation or SimulationConfig()
    engine = engine_named(settings.engine)
    config = wire.config_from_proto(wire.config_to_proto(config))  # as a server gets it: without [simulation]
    try:
        out.mkdir(parents=True, exist_ok=True)
        with locks.results(out, "simulation"), durable.scratch(out / "simulation") as scratch:
            trainer = LocalTrainer(Inputs(config, clients, evaluate, weights, label_map, device, reading))
            shared = leakage(clients, evaluate, config, reading)
            header = RunHeader(run, config, trainer.run.spec, trainer.run.fingerprint)
            check_combination(config, header.spec)
            (out / REPORT).unlink(missing_ok=True)  # an earlier simulation's would stand beside what this one leaves
            memory, versions = ClientMemory(scratch / "memory"), Versions(header, out, scratch)
            with engine(trainer, settings.workers) as started:
                report = _Simulation(header, started, memory, versions).run(committed, worked)
            report["partition"] = None if partition is None else dict(partition)
            report["overlap"] = None if shared is None else shared.as_dict()
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
        header: The run.
        engine: Computes what clients do.
        memory: What clients keep from round to round.
        versions: The server half.
    """

    def __init__(self, header: RunHeader, engine: Engine, memory: ClientMemory, versions: Versions) -> None:
        self._config = header.config
        self._header = header
        self._everybody = frozenset(engine.trainer.inputs.clients)
        self._engine = engine
        self._trainer = engine.trainer
        self._memory = memory
        self._versions = versions
        self._holds: dict[str, tuple[int, bytes]] = {}
        self._facts: dict[str, str] = {}
        self._excluded: set[str] = set()
        self._conducts: dict[str, conduct.Conduct] = {}
        self._began = time.time()

    def run(self, committed: Callable[[Json], None] | None, worked: Callable[[int, int, int], None] | None) -> Json:
        """Holds all rounds; returns the report."""
        self._worked = worked
        self._versions.begin(version_0(self._trainer.run.spec, self._trainer.run.model))
        version = self._versions.newest()
        initial = self._trainer.evaluate(version)
        done: list[Json] = []
        for number in range(1, self._config.rounds.count + 1):
            book, reason = self._folded(number, version)
            if reason:
                return self._report(initial, done, book, reason)
            book.round = self._advance(book.round, state_machine.Aggregated())
            book.committed_at = time.time()
            self._settle(book.round)
            version = self._versions.newest()
            book.metrics = {**book.metrics, **self._trainer.evaluate(version)}
            done.append(round_json(book, self._trainer.run.model.backbone.parameters))
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

    def _folded(self, number: int, version: Version) -> tuple[RoundBook, str]:
        """Holds a round up to its commit; or returns why it cannot get there."""
        book = RoundBook(Round(self._header.run, number))
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
        for ticket in book.round.in_state(TicketState.RECEIVED):
            if ticket.id in excluded:
                log.warning("update excluded", round=book.round.number, client=ticket.client, cause=excluded[ticket.id])
                self._take_back(ticket.client)
            else:
                self._excluded.discard(ticket.client)
                self._memory.confirm(ticket.client)
        book.round = self._advance(book.round, state_machine.Excluded(excluded))

    def _take_back(self, client: str) -> None:
        self._memory.take_back(client)
        if client in self._excluded:  # what it was made from was excluded before: it would be so for ever
            self._memory.forget_residual(client)
        self._excluded ^= {client}

    def _close(self, book: RoundBook, version: Version) -> str:
        """Brings a round to its fold; or returns why it cannot get there."""
        settings = self._config.rounds
        while book.round.phase is not Phase.AGGREGATING:
            if book.round.in_state(TicketState.ISSUED):
                self._train(book, version)
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
        return ""

    def _train(self, book: RoundBook, version: Version) -> None:
        """Lets all clients with a ticket use it; those who are too late keep what they trained for the next round."""
        seed, number = self._config.rounds.seed, book.round.number
        waiting = sorted(
            (ticket.client for ticket in book.round.in_state(TicketState.ISSUED)),
            key=lambda client: (seeds.derive(seed, "arrival", number, client), client),
        )
        for outcome in self._engine.run(self._jobs(book, waiting, version)):
            if isinstance(outcome, LocalUpdate):
                self._facts = outcome.facts
            if book.round.phase is Phase.OPEN:
                self._arrive(book, outcome)
                self._say_worked(book.round)
            elif isinstance(outcome, LocalUpdate):
                self._memory.keep(outcome.client, outcome.if_not)
        for client in waiting:
            self._pull(book, client, version)

    def _jobs(self, book: RoundBook, clients: Sequence[str], version: Version) -> Iterator[LocalJob]:
        """Yields the work of clients in the order of their arrival, until nothing more of it could be of use."""
        seed, number = self._config.rounds.seed, book.round.number
        for client in clients:
            if book.round.phase is not Phase.OPEN and not self._trainer.run.keeps_state:
                return
            self._pull(book, client, version)
            state = self._memory.state(client)
            yield LocalJob(client, number, seeds.training(seed, number, client), self._config.training, version, state)

    def _arrive(self, book: RoundBook, outcome: LocalOutcome) -> None:
        """Takes what came of a client's work into an open round."""
        client, number = outcome.client, book.round.number
        ticket = state_machine.ticket_id(self._header.run, number, client)
        if isinstance(outcome, LocalFailure):
            log.warning("ticket is given up", round=number, client=client, cause=outcome.error.message)
            reason = f"{outcome.error.reason}: {outcome.error.message}"
            book.round = self._advance(book.round, state_machine.Withdrawn(ticket, reason))
            return
        manifest, data = outcome.prepared.manifest, outcome.prepared.payload
        book.up[client] = len(data)
        try:
            payload.check_manifest(manifest, self._header.spec.sent(number), (self._config.codec.encoding,))
            payload.check_payload(manifest, memoryview(data))
            norm = math.sqrt(payload.squared_norm(manifest, memoryview(data)))
            for transform in transforms_of(self._config):
                transform.check(norm)
        except (ManifestInvalid, PayloadInvalid) as error:
            log.warning("update refused", round=number, client=client, cause=error.message)
            self._memory.forget_residual(client)
            book.round = self._advance(book.round, state_machine.Refused(ticket, f"{error.reason}: {error.message}"))
            return
        self._versions.spool(ticket).write_bytes(data)
        book.arrivals[ticket] = Arrival(outcome.examples, norm, manifest, outcome.metrics)
        self._memory.keep(client, outcome.if_counted, outcome.if_not)
        book.round = self._advance(book.round, state_machine.Received(ticket))

    def _pull(self, book: RoundBook, client: str, version: Version) -> None:
        """Books what a server would send, once a round: nothing to who holds these bytes already, else what changed."""
        if client in book.down:
            return
        manifest, number = version.manifest, book.round.base_version
        have, sha256 = self._holds.get(client, (None, b""))
        needed = payload.missing(manifest, self._header.spec, number, have)
        book.down[client] = 0 if sha256 == manifest.sha256 else sum(manifest.entries[i].length for i in needed)
        self._holds[client] = number, manifest.sha256

    def _say_worked(self, current: Round) -> None:
        if self._worked is not None:
            left = len(current.in_state(TicketState.ISSUED))
            self._worked(current.number, len(current.tickets) - left, len(current.tickets))

    def _advance(self, current: Round, event: state_machine.Event) -> Round:
        return state_machine.advance(current, event, self._config.rounds, time.time())[0]

    def _report(self, initial: Mapping[str, float], done: list[Json], paused: RoundBook | None, reason: str) -> Json:
        run = self._trainer.run
        return {
            "run": self._header.run,
            "name": self._config.name,
            "state": "paused" if paused else "completed",
            "reason": reason,
            "round": paused.round.number if paused else len(done),
            "version": len(done),
            "created_at": moment(self._began),
            "method": run.model.spec.method,
            "adapter_parameters": run.model.spec.parameters,
            "model_parameters": run.model.backbone.parameters,
            "backbone_fingerprint": run.fingerprint,
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
