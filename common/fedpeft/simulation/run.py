"""The entry of a simulation: what it is asked for is checked, model and data are loaded, and a run is held.

It leaves in its folder the newest adapter version in adapter.safetensors and the records so far in records.jsonl, both
after every round, and report.json at the end; earlier ones there are replaced. The report is what
`fedpeft run show --json` says of a run, `wire_bytes_up` and `wire_bytes_down` None; besides `facts` (torch's version,
device, precision, threads), `partition`, `overlap` (see `fedpeft.data.overlap.Overlap`) and `seconds`.

The folder is held meanwhile: another simulation there is refused before it changes anything. One that was killed or
interrupted goes on after the last round that it committed, to the same bits, if its content is the same still
(`fedpeft.simulation.content`); buffered rounds begin anew. What passes lies in a scratch folder, which is removed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import structlog

from fedpeft import ids
from fedpeft.config import RunConfig, SimulationConfig
from fedpeft.data.reading import Reading
from fedpeft.errors import ConfigInvalid, DataInvalid
from fedpeft.privacy.accounting import calibrated
from fedpeft.process import durable, locks
from fedpeft.rounds.combinations import check_combination, check_makes_versions, check_population
from fedpeft.rounds.commit import RunHeader
from fedpeft.rounds.state_machine import policy_of
from fedpeft.rpc import wire
from fedpeft.simulation.client_memory import ClientMemory
from fedpeft.simulation.clients import Clients, Data, reading_of
from fedpeft.simulation.content import content_of_simulation
from fedpeft.simulation.engines import Engine, engine_named
from fedpeft.simulation.leakage import leakage
from fedpeft.simulation.local_trainer import Inputs, LocalTrainer
from fedpeft.simulation.out_folder import REPORT, check_folder
from fedpeft.simulation.progress_log import MEMORY, UNFINISHED, ProgressLog
from fedpeft.simulation.report import Json
from fedpeft.simulation.simulated_run import SimulatedRun
from fedpeft.simulation.versions import Versions
from fedpeft.tracking import Tracking
from fedpeft.training.devices import device_of
from fedpeft.training.run_spec import spec_without_weights

RUN = "simulation"
"""Id of a simulated run, where none is given."""

log = structlog.get_logger(__name__)


def simulate(
    config: RunConfig,
    clients: Clients,
    out: Path,
    evaluate: Path | Data | None = None,
    weights: Path | None = None,
    *,
    label_map: Path | None = None,
    device: str = "auto",
    reading: Reading | None = None,
    run: str = RUN,
    partition: Mapping[str, Any] | None = None,
    resumed: Callable[[int], None] | None = None,
    committed: Callable[[Json], None] | None = None,
    worked: Callable[[int, int, int], None] | None = None,
    tracking: Tracking | None = None,
) -> Json:
    """Holds a whole run, or goes on with one: see this module.

    Args:
        config: The run file; its `[simulation]` has done its work by now, see `fedpeft.simulation.clients.clients_of`.
        clients: Data by client: a path, or what the model's task read. The order means nothing, names do.
        out: The folder; made if it is not there.
        evaluate: Held-out data, by path or open, on which every version is scored.
        weights: A file, or a folder of files, that stands for the weights that the run names.
        label_map: A file of own class names to the run's, for all of the data.
        device: auto, cpu, cuda or cuda:N.
        reading: Settings of reading images; as in `[simulation]` if absent.
        run: Id of the run, which stands in the adapter file and the records.
        partition: Division of the data, for the report.
        resumed: Told of the number of rounds that an earlier process committed, where the simulation goes on.
        committed: Told of every committed round, as the report has it.
        worked: Told, after every client's turn, of the round's number, how many had theirs, and how many were sampled.
        tracking: Trackers of the run; ended with it. None for none.

    Returns:
        The report, as in report.json; `state` is paused if a round could not get its updates.

    Raises:
        ConfigInvalid: If a round wants more clients than there are, there is no such engine, an option of the PEFT
            method is wrong, or the strategy cannot fold its tensors.
        DataInvalid: If a client's data, or the held-out data, cannot be used.
        DiskFull: If there is no room in `out`; the same simulation goes on where it was.
        ModelInvalid: If the model or its weights cannot be had.
        SettingsInvalid: If there is no such device.
        StateInvalid: If `out` cannot be written, another simulation writes there, or something in it would be replaced
            that is not a simulation's.
    """
    check_clients(config, clients)
    reading, settings = reading or reading_of(config), config.simulation or SimulationConfig()
    given = evaluate, weights, label_map, device, reading, settings.held_out, settings.ranks or ()
    inputs, kind = Inputs(_as_served(config), clients, *given), engine_named(settings.engine)
    with _held(out) as scratch, tracking or Tracking() as tracked:
        trainer = LocalTrainer(inputs)
        shared = leakage(clients, evaluate, config, reading)
        header = _header(run, trainer, settings)
        with kind(trainer, settings.workers) as engine:
            report = _ready(header, engine, out, scratch).run(resumed, committed, worked, tracked)
        report["partition"] = None if partition is None else dict(partition)
        report["overlap"] = None if shared is None else shared.as_dict()
        durable.write_text(out / REPORT, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
        shutil.rmtree(out / UNFINISHED, ignore_errors=True)
        try:
            tracked.end(report["state"])
        except KeyboardInterrupt:  # which ends the wait: everything else is done
            log.warning("trackers are waited for no longer; the simulation has ended")
    return report


def _as_served(config: RunConfig) -> RunConfig:
    """Returns a run file as a server gets it, without `[simulation]`, and makes a run of it."""
    return calibrated(wire.config_from_proto(wire.config_to_proto(config)))


@contextmanager
def _held(out: Path) -> Iterator[Path]:
    """Holds the folder of the results; yields a scratch folder in it.

    Raises:
        DiskFull: If there is no room.
        StateInvalid: If it cannot be written, another simulation writes there, or `check_folder` refuses it.
    """
    with durable.refusals(f"writing {out}"):
        out.mkdir(parents=True, exist_ok=True)
        with locks.results(out, "simulation"), durable.scratch(out / "simulation") as scratch:
            check_folder(out)
            yield scratch


def _header(run: str, trainer: LocalTrainer, settings: SimulationConfig) -> RunHeader:
    """Returns the run's header; raises `ConfigInvalid` if its parts do not go together."""
    header = RunHeader(run, trainer.inputs.config, trainer.run.spec, trainer.run.fingerprint)
    check_combination(header.config.model_copy(update={"simulation": settings}), header.spec)
    check_makes_versions(header.config)
    return header


def _ready(header: RunHeader, engine: Engine, out: Path, scratch: Path) -> SimulatedRun:
    """Returns the run as it is about to begin, or where it was when an earlier process ended."""
    if (out / REPORT).exists():  # an earlier simulation's would stand beside what this one leaves
        shutil.rmtree(out / UNFINISHED, ignore_errors=True)
        (out / REPORT).unlink()
    goes_on = is_resumable(header.config)
    progress = ProgressLog(out / UNFINISHED, content_of_simulation(header, engine) if goes_on else {})
    memory = ClientMemory(progress.folder / MEMORY, [line["memory"] for line in progress.rounds])
    versions = Versions(header, out, scratch, progress.folder)
    return SimulatedRun(header, engine, memory, versions, progress if goes_on else None)


def is_resumable(config: RunConfig) -> bool:
    """Returns True if a simulation that is killed can go on: all but rounds on a clock, whose clients are at work."""
    return not policy_of(config.rounds).has_clock


def check_run(config: RunConfig, device: str, *, is_simulated: bool = True) -> None:
    """Checks a run by itself, before its data and weights are read.

    Args:
        config: The run file.
        device: auto, cpu, cuda or cuda:N.
        is_simulated: False if a server and agents hold the run: then no engine is asked.

    Raises:
        ConfigInvalid: If its parts do not work with each other, or not with the engine, with the field.
        ModelInvalid: If there is no such model.
        SettingsInvalid: If there is no such device.
    """
    config, found = calibrated(config), device_of(device)
    if is_simulated:
        engine = engine_named((config.simulation or SimulationConfig()).engine)
        if fault := engine.misfit(config, found):
            raise ConfigInvalid(": ".join(fault), (fault,))
    check_makes_versions(config)
    check_combination(config, spec_without_weights(config))


def check_clients(config: RunConfig, clients: Clients) -> None:
    """Checks that the clients of a simulation have names, and are enough for a round.

    Raises:
        ConfigInvalid: If a round wants more than there are, or a formula of the run has another number of them.
        DataInvalid: If a name is none of a client.
    """
    for name in clients:
        if not ids.CLIENT.fullmatch(name):
            raise DataInvalid(f"client name {name[:80]!r} is not {ids.CLIENT_FORM}")
    check_population(config, len(clients))
    if len(clients) < config.rounds.least_available:
        given = (f"rounds.{key}" for key in ("min_available", "quorum") if getattr(config.rounds, key) is not None)
        why = next(given, "the quorum of rounds.clients")
        raise ConfigInvalid(
            f"a round needs {config.rounds.least_available} clients ({why}), and there are {len(clients)}: lower that, "
            "or simulate more"
        )
    if len(clients) < config.rounds.available:
        log.warning("rounds open without all clients that they want", wanted=config.rounds.sampled, there=len(clients))
