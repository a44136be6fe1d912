"""The entry of a simulation: what it is asked for is checked, model and data are loaded, and a run is held.

Everything that passes lies in a scratch folder, which is removed at the end.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import structlog

from fedpeft import ids
from fedpeft.config import RunConfig, SimulationConfig
from fedpeft.data.reading import Reading
from fedpeft.errors import ConfigInvalid, DataInvalid, StateInvalid
from fedpeft.privacy.accounting import calibrated
from fedpeft.process import durable, locks
from fedpeft.rounds.combinations import check_combination
from fedpeft.rounds.commit import RunHeader
from fedpeft.rounds.state_machine import policies
from fedpeft.rpc import wire
from fedpeft.simulation.clients import ClientMemory, Clients, Data, reading_of
from fedpeft.simulation.engines import Engine, engine_named
from fedpeft.simulation.leakage import leakage
from fedpeft.simulation.local_trainer import Inputs, LocalTrainer
from fedpeft.simulation.progress_log import UNFINISHED, ProgressLog
from fedpeft.simulation.report import Json
from fedpeft.simulation.simulated_run import SimulatedRun
from fedpeft.simulation.versions import Versions
from fedpeft.tracking import Tracking

REPORT = "report.json"
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
    committed: Callable[[Json], None] | None = None,
    worked: Callable[[int, int, int], None] | None = None,
    tracking: Tracking | None = None,
) -> Json:
    """Holds a whole run.

    Leaves in `out`: the newest adapter version in adapter.safetensors and the records so far in records.jsonl, both
    after every round, and report.json at the end. Earlier ones there are replaced. `out` is held meanwhile: another
    simulation there is refused before it changes anything. One that was killed or interrupted goes on after the last
    round that it committed, to the same bits, if run file, data, weights, device and threads are the same; buffered
    rounds begin anew.

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
        committed: Told of every committed round, as the report has it.
        worked: Told, after every client's turn, of the round's number, how many had theirs, and how many were sampled.
        tracking: Trackers of the run; ended with it. None for none.

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
    check_clients(config, clients)
    reading, settings = reading or reading_of(config), config.simulation or SimulationConfig()
    engine = engine_named(settings.engine)
    # As a server gets it, without [simulation], and makes a run of it.
    config = calibrated(wire.config_from_proto(wire.config_to_proto(config)))
    try:
        out.mkdir(parents=True, exist_ok=True)
        with locks.results(out, "simulation"), durable.scratch(out / "simulation") as scratch:
            trainer = LocalTrainer(
                Inputs(
                    config,
                    clients,
                    evaluate,
                    weights,
                    label_map,
                    device,
                    reading,
                    settings.held_out,
                    settings.ranks or (),
                )
            )
            shared = leakage(clients, evaluate, config, reading)
            header = RunHeader(run, config, trainer.run.spec, trainer.run.fingerprint)
            check_combination(config.model_copy(update={"simulation": settings}), header.spec)
            if (out / REPORT).exists():  # an earlier simulation's would stand beside what this one leaves
                shutil.rmtree(out / UNFINISHED, ignore_errors=True)
                (out / REPORT).unlink()
            made = engine(trainer, settings.workers)
            progress = ProgressLog(out / UNFINISHED, _identity(header, made))
            memory = ClientMemory(progress.folder / "memory", len(progress.rounds))
            versions = Versions(header, out, scratch, progress.folder)
            with tracking or Tracking() as tracked, made as started:
                kept = progress if is_resumable(config) else None
                report = SimulatedRun(header, started, memory, versions, kept).run(committed, worked, tracked)
                tracked.end(report["state"])
            report["partition"] = None if partition is None else dict(partition)
            report["overlap"] = None if shared is None else shared.as_dict()
            durable.write_text(out / REPORT, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
            progress.clear()
    except OSError as error:
        raise StateInvalid(f"cannot use {error.filename or out}: {error.strerror or error}") from None
    return report


def is_resumable(config: RunConfig) -> bool:
    """Returns True if a simulation that is killed can go on: all but rounds on a clock, whose clients are at work."""
    return not policies.get(config.rounds.policy_name).has_clock


def _identity(header: RunHeader, engine: Engine) -> dict[str, Any]:
    """Returns all that decides the bits of a simulation."""
    import torch

    inputs = engine.trainer.inputs
    return {
        "run": header.run,
        "config": wire.config_to_proto(header.config).SerializeToString(deterministic=True).hex(),
        "backbone": header.fingerprint,
        "clients": _clients_digest(inputs.clients),
        "evaluation": [_evaluation_digest(inputs.evaluation), inputs.held_out],
        "ranks": list(inputs.ranks),
        "reading": str(inputs.reading),
        "label_map": str(inputs.label_map),
        "device": inputs.device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        **({"arithmetic": engine.arithmetic} if engine.arithmetic else {}),
    }


def _evaluation_digest(data: Path | Data | None) -> str:
    """Returns the path of held-out data, or a digest of what is open already."""
    return str(data) if data is None or isinstance(data, Path) else _clients_digest({"evaluation": data})


def _clients_digest(clients: Clients) -> str:
    """Returns a digest of the clients' names, and of where their data lie or which labels they have."""
    digest = hashlib.sha256()
    for name, data in sorted(clients.items()):
        digest.update(f"{name}\0{data if isinstance(data, Path) else len(data)}\0".encode())
        if not isinstance(data, Path):
            digest.update(data.labels.astype("<i8").tobytes())
    return digest.hexdigest()


def check_clients(config: RunConfig, clients: Clients) -> None:
    """Checks that the clients of a simulation have names, and are enough for a round.

    Raises:
        ConfigInvalid: If a round wants more than there are.
        DataInvalid: If a name is none of a client.
    """
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
