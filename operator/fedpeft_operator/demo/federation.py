"""The demo's federation: where its parts come from, how its processes are started, and what they leave.

The order of things is in `run_demo`. Notable: whatever ends it, no process stays behind (`federation.process_group`),
and a folder that is not an earlier demo's is never cleared.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import fedpeft
from fedpeft.api import views
from fedpeft.api.following import RunSnapshot
from fedpeft.config import RunConfig, load_run_file
from fedpeft.errors import SettingsInvalid, StateInvalid, TrainingFailed
from fedpeft.process import locks, output
from fedpeft.process.home import NO_HOME, home_folder
from fedpeft.process.race import first_of
from fedpeft_operator.cli.run.create import created
from fedpeft_operator.cli.run.watch import watched
from fedpeft_operator.cli.session import Session
from fedpeft_operator.demo import report
from fedpeft_operator.federation.local_server import FOR_PEOPLE, serve
from fedpeft_operator.federation.process_group import ProcessGroup

EXPERIMENT = Path("experiments/emoji")
EVALUATOR = "evaluator"
MARK = ".fedpeft-demo"
"""File that marks a folder as a demo's, whose contents the next one may replace."""
OURS = ("clients", "held-out", "server", "state", "logs", "report.json", "accuracy.png", "adapter.safetensors")

ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
"""Seven processes share the machine: more threads each would only wait for one another."""


@dataclass(frozen=True)
class Plan:
    """Configuration of a demo.

    Attributes:
        out: Its folder.
        experiment: The folder of the emoji experiment.
        train: Images, a client a vendor if they have such.
        test: Held-out images; None: some of the others.
        config: The run file, flags applied.
        clients: Number of clients, or all.
        weights: File of the backbone's weights; None: the demo's own is fetched, or the hub's are used.
        port: The server's, 0 for a free one.
        metrics_port: Likewise.
    """

    out: Path
    experiment: Path
    train: Path
    test: Path | None
    config: RunConfig
    clients: int | None
    weights: Path | None
    port: int
    metrics_port: int


def plan_of(
    out: Path,
    rounds: int | None,
    clients: int | None,
    data: Path | None,
    weights: str | None,
    port: int,
    metrics_port: int,
) -> Plan:
    """Returns the plan that the flags make.

    Raises:
        SettingsInvalid: If a flag names what is not there.
        ConfigInvalid: If the demo's run file is wrong, or data have one class alone.
        DataInvalid: If data cannot be read.
    """
    experiment = _experiment()
    train, test = _data(data or experiment / "data")
    file = None if weights in (None, "hub") else Path(str(weights))
    if file is not None and not file.is_file():
        raise SettingsInvalid(f"--weights {weights} is neither hub nor a file")
    config = load_run_file(experiment / "demo.toml") if data is None else _of_classes(experiment / "demo.toml", train)
    if weights == "hub":
        config = config.model_copy(update={"model": config.model.model_copy(update={"weights": "hub"})})
    if rounds is not None:
        config = config.model_copy(update={"rounds": config.rounds.model_copy(update={"count": rounds})})
    return Plan(
        out.absolute(),
        experiment,
        train,
        test,
        config,
        clients,
        file,
        port,
        metrics_port,
    )


def _data(data: Path) -> tuple[Path, Path | None]:
    """Returns training and held-out images: a folder of both, or one data set."""
    train, test = data / "train.parquet", data / "test.parquet"
    if train.is_file() and test.is_file():
        return train, test
    from fedpeft.data.sources.hub import local_path

    return local_path(data), None


def _of_classes(file: Path, train: Path) -> RunConfig:
    """Returns the demo's run file for the classes of one's own data, in their order unless they are the demo's."""
    from fedpeft.data.client_folders import classes_there

    config, classes = load_run_file(file), classes_there(train)
    if set(classes) == set(config.model.classes):
        return config
    return load_run_file(file, {"name": "own-data", "model": {"classes": classes}})


async def run_demo(plan: Plan) -> RunSnapshot:
    """Holds the whole demo; returns the run as it ended.

    Raises:
        LocalError: If a process ends before its time, with the last lines of its log.
        SettingsInvalid: If the folder cannot be used, or is not a demo's.
        StateInvalid: If another demo runs in the folder, or a server on what an earlier one left there.
        TrainingFailed: If the run was stopped before it was completed.
    """
    _make(plan.out)
    with locks.results(plan.out, "demo"):
        _clear(plan.out)
        return await _run_in(plan)


async def _run_in(plan: Plan) -> RunSnapshot:
    begun = time.monotonic()
    processes = ProcessGroup(plan.out / "logs", ONE_THREAD)
    try:
        async with processes:
            return await _run_processes(plan, processes, begun)
    except asyncio.CancelledError:
        for line in _stopped(plan, processes):
            output.note(line)
        raise


async def _run_processes(plan: Plan, processes: ProcessGroup, begun: float) -> RunSnapshot:
    weights = await _weights(plan, processes)
    names, held_out = _divided(plan)
    session = await _serve(plan, processes)
    _start_clients(plan, processes, session, {**_sites(plan, names), EVALUATOR: held_out}, weights)
    output.say("building the model and creating the run ...")
    config = _sized(plan.config, len(names))
    run = await first_of(created(session, config, weights), processes.watch())
    snapshot = await first_of(watched(session, run.id), processes.watch())
    if views.state(snapshot.run) != "completed":
        raise TrainingFailed(f"{run.id} was {views.state(snapshot.run)}: {snapshot.run.reason or 'no reason given'}")
    await _leave(plan, session, snapshot, names, begun)
    return snapshot


def _stopped(plan: Plan, processes: ProcessGroup) -> list[str]:
    """Returns what is said once a demo was told to stop and all its processes have ended."""
    ended = ", ".join(child.name for child in processes.children) or "nothing had been started"
    lines = [f"fedpeft: the demo was stopped, and its processes with it: {ended}"]
    lines += [f"logs: {plan.out / 'logs'}"] if processes.children else []
    if (plan.out / "server").is_dir():
        lines.append(
            f"the adapter versions until now: {plan.out / 'server'}; fedpeft-server --data-dir {plan.out / 'server'} "
            "goes on with the run"
        )
    return lines


def _experiment() -> Path:
    """Returns the folder of the emoji experiment: in the checkout that is used, or the one that stands around here."""
    around = [Path.cwd(), *Path.cwd().parents, *Path(fedpeft.__file__).resolve().parents]
    for folder in around:
        if (folder / EXPERIMENT / "demo.toml").is_file():
            return folder / EXPERIMENT
    raise SettingsInvalid(f"the demo needs {EXPERIMENT} of the project's source; run it inside a checkout")


def _make(out: Path) -> None:
    """Makes the demo's folder; one that holds anything must be a demo's."""
    with _usable(out):
        if out.exists() and any(out.iterdir()) and not (out / MARK).exists():
            raise SettingsInvalid(f"--out {out} holds something that is not a demo's; name a new or empty folder")
        out.mkdir(parents=True, exist_ok=True)
        (out / MARK).touch()


def _clear(out: Path) -> None:
    """Removes what an earlier demo left in the folder."""
    with _usable(out):
        if process := locks.holder_of(out / "server"):
            raise StateInvalid(
                f"{out / 'server'} is in use by a server (process {process}); stop it first, or name another folder"
            )
        for name in OURS:
            shutil.rmtree(out / name) if (out / name).is_dir() else (out / name).unlink(missing_ok=True)


@contextmanager
def _usable(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SettingsInvalid(f"--out {out} cannot be used: {error.strerror}") from None


async def _weights(plan: Plan, processes: ProcessGroup) -> Path | None:
    """Returns the backbone's file; fetches and converts it the first time. None: no file is needed."""
    if plan.weights is not None or plan.config.model.weights in ("hub", "none"):
        return plan.weights
    path = _cache(plan) / plan.config.model.weights
    if not path.is_file():
        output.say("fetching the backbone (once, about 97 MB) ...")
    fetching = processes.start("backbone", [str(plan.experiment / "backbone.py"), "--out", str(path)])
    await fetching.until_ended()
    processes.children.remove(fetching)
    if fetching.end() != 0:
        raise fetching.death()
    return path


def _cache(plan: Plan) -> Path:
    """Returns the folder that keeps the backbone: the checkout's `.demo`, or the user's cache."""
    checkout = plan.experiment.parent.parent
    if os.access(checkout, os.W_OK):
        return checkout / ".demo"
    if cache := os.environ.get("XDG_CACHE_HOME"):
        return Path(cache) / "fedpeft"
    if (home := home_folder()) is None:
        raise SettingsInvalid(f"{NO_HOME}; set HOME or XDG_CACHE_HOME to where the backbone, 97 MB, may be kept")
    return home / ".cache" / "fedpeft"


def _divided(plan: Plan) -> tuple[dict[str, int], Path]:
    """Writes each client's images; returns how many each has, and where the held-out ones are."""
    from fedpeft_operator.demo.division import divide  # of what only the processes need otherwise

    return divide(plan.train, plan.test, plan.clients, plan.out / "clients", plan.out / "held-out")


async def _serve(plan: Plan, processes: ProcessGroup) -> Session:
    """Starts the server and waits until it answers."""
    listen, metrics = await serve(processes, plan.out / "server", plan.port, plan.metrics_port)
    output.say(f"server on {listen}, metrics on http://{metrics}/metrics, logs in {plan.out / 'logs'}")
    return Session(listen, insecure=True)  # this server speaks plain text, whatever identity this person has


def _sites(plan: Plan, names: Iterable[str]) -> dict[str, Path]:
    return {name: plan.out / "clients" / name for name in names}


def _start_clients(
    plan: Plan, processes: ProcessGroup, session: Session, sites: Mapping[str, Path], weights: Path | None
) -> None:
    """Starts a client beside each part of the data, and the evaluator beside the held-out images."""
    shared = ["--server", session.server, "--threads", "1", "--device", "cpu", *FOR_PEOPLE]
    if weights is not None:
        shared += ["--weights", str(weights)]
    for name, data in sites.items():
        own = ["--name", name, "--data", str(data), "--state-dir", str(plan.out / "state" / name)]
        own += ["--evaluate"] if name == EVALUATOR else []
        processes.start(name, ["-m", "fedpeft_client", *shared, *own])


def _sized(config: RunConfig, clients: int) -> RunConfig:
    """Returns the run file for so many clients, all of which every round wants."""
    rounds = config.rounds.model_copy(update={"clients": clients, "quorum": None, "min_available": None})
    return config.model_copy(update={"rounds": rounds})


async def _leave(plan: Plan, session: Session, snapshot: RunSnapshot, names: Mapping[str, int], begun: float) -> None:
    """Writes the results and says what came out."""
    async with session.client() as server:
        await server.download(snapshot.run.id, plan.out / "adapter.safetensors")
    made = report.report_of(snapshot, names, time.monotonic() - begun)
    report.write_json(made, plan.out / "report.json")
    report.write_png(made, plan.out / "accuracy.png")
    for line in report.summary(made):
        output.say(line)


def run_until_signalled(plan: Plan) -> bool:
    """Holds the demo; returns False if SIGINT, SIGTERM or SIGHUP ended it."""

    async def holding() -> None:
        task = asyncio.current_task()
        assert task is not None
        for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(each, task.cancel)
        await run_demo(plan)

    try:
        asyncio.run(holding())
    except asyncio.CancelledError:
        return False
    return True
