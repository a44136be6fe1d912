"""A world of real processes: daemons, clients, an evaluator and an operator, and what a schedule of faults does to it.

    python -m chaos.world        # holds the schedule of each line on stdin, and prints what came of it

This process imports everything and does nothing with it, so that each process of a world is a fork of it.
"""

from __future__ import annotations

if __name__ == "__main__":
    from . import durations  # before anything takes them by name

import gc
import heapq
import itertools
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ports import free_ports
from simulated_time.machines import own_mounts

from . import identities, mains, oracle, processes, proxy, shared_places
from .identities import OPERATOR
from .machines import Machine
from .mains import DAEMONS
from .schedule import LINKS, POSTGRES, S3, Schedule
from .shared_places import SharedPlaces

LEAVES_S = 10.0


@dataclass
class Outcome:
    """Outcome of a world.

    Attributes:
        faults: Promises that were broken; empty if none was.
        adapter: SHA-256 of the last version's tensors.
        is_exact: True if that must be the one of the undisturbed run.
        seconds: Time until the run was complete.
        cpu_s: Processor time of all processes.
        deaths: Processes that were killed.
        effects: Effects of each machine.
        committed: Moments of the rounds that were committed in a stretch of time, where one is held.
        notes: Ends of processes because of a full disk, and pauses of the run.
        log: The last lines of all processes, where a promise was broken.
    """

    faults: list[str] = field(default_factory=list)
    adapter: str = ""
    is_exact: bool = True
    seconds: float = 0.0
    cpu_s: float = 0.0
    deaths: int = 0
    effects: dict[str, int] = field(default_factory=dict)
    committed: list[float] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    log: list[str] = field(default_factory=list)


def held(schedule: Schedule, keep: str = "") -> Outcome:
    """Holds a world in a process of its own, with mounts of its own.

    Args:
        schedule: Its faults.
        keep: A folder that the world's files are copied to where a promise was broken; empty: nowhere.
    """
    if schedule.are_several:
        shared_places.prepare()
    return begun(schedule, World, keep)()


def begun(schedule: Schedule, make: Callable[[Schedule, Path], World], keep: str = "") -> Callable[[], Outcome]:
    """Begins to hold the world that `make` makes, as `held`; returns the function that waits for its end."""
    reading, writing = os.pipe()
    place, parent = Path(tempfile.mkdtemp(prefix="chaos-")), os.getpid()
    child = os.fork()
    if not child:
        outcome = Outcome()
        try:
            processes.die_with(parent)
            os.close(reading)
            outcome = make(schedule, place).hold()
        except BaseException:
            outcome.faults.append(traceback.format_exc())
        finally:
            if outcome.faults and keep:
                shutil.copytree(place, Path(keep) / schedule.name.replace(" ", "-"), dirs_exist_ok=True)
            with open(writing, "w") as stream:
                json.dump(outcome.__dict__, stream)
            os._exit(0)
    os.close(writing)

    def ended() -> Outcome:
        with open(reading) as stream:
            said = stream.read()
        os.waitpid(child, 0)
        shutil.rmtree(place)  # by now without the disks that were mounted in it
        return Outcome(**json.loads(said)) if said else Outcome(["the process died"])

    return ended


class World:
    """One world.

    Args:
        schedule: Its faults.
        place: An empty folder.

    Attributes:
        machines: The machines by name.
    """

    def __init__(self, schedule: Schedule, place: Path) -> None:
        self._schedule = schedule
        self._place = place
        self._said = place / "operator.jsonl"
        (place / "logs").mkdir()
        self._daemons = dict(zip(DAEMONS if schedule.are_several else DAEMONS[:1], free_ports(), strict=False))
        self._shared = SharedPlaces(place, next(free_ports()) + 1) if schedule.are_several else None
        self._listeners = {name: socket.create_server(("127.0.0.1", 0), backlog=128) for name in self._links()}
        self._ports = {name: listener.getsockname()[1] for name, listener in self._listeners.items()}
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._running: list[int] = []
        self.machines: dict[str, Machine] = {}

    def hold(self) -> Outcome:
        """Holds the world until the run is complete, and looks at what it left."""
        if self._schedule.own_disks:
            own_mounts()
        outcome = Outcome()
        self._begin()
        begun = time.monotonic()
        last = self._plan(begun)
        try:
            self._until(
                lambda: self._completed() is not None, last + self._schedule.patience_s, "the run is not complete"
            )
            outcome.seconds = time.monotonic() - begun
            self._due.clear()
            self._heal()
            run = str(self._word("run"))
            self._until(lambda: self._scored(), last + self._schedule.patience_s, "the last version is not scored")
            outcome.faults += self._verify(run)
        except TimeoutError as error:
            outcome.faults.append(str(error))
        self._end()
        return self._judged(outcome)

    def line(self, client: str, what: str, amount: float = 0.0) -> None:
        """Changes a line."""
        message = {"link": list(self._listeners).index(client), "what": what, "amount": amount}
        self._control.sendall(json.dumps(message).encode() + b"\n")

    def _links(self) -> dict[str, list[int]]:
        """Returns the ports that each line leads to, by its name."""
        ports = list(self._daemons.values())
        links = {name: ports[n % len(ports) :] + ports[: n % len(ports)] for n, name in enumerate((*LINKS, OPERATOR))}
        return {**links, **(self._shared.links(self._daemons) if self._shared else {})}

    def _begin(self) -> None:
        self._control, far = socket.socketpair()
        listeners, targets = list(self._listeners.values()), list(self._links().values())
        serve = lambda: asyncio_run(proxy.serve(listeners, targets, far))  # noqa: E731
        kept = [*(listener.fileno() for listener in listeners), far.fileno()]
        self._running.append(processes.start(serve, self._place / "logs" / "proxy.0.log", kept))
        far.close()
        for listener in listeners:
            listener.close()
        self._identities = self._place / "identities"
        if self._schedule.is_secured:
            reached = {name: self._ports[name] for name in LINKS}
            make = lambda: identities.make(self._identities, self._ports[OPERATOR], reached)  # noqa: E731
            log = self._place / "logs" / "init.txt"
            if os.waitpid(processes.start(make, log), 0)[1]:
                raise RuntimeError(log.read_text())
        schedule = self._schedule
        if self._shared:
            self._running.append(self._shared.s3)
            self.machines[POSTGRES] = self._shared.machine(self._place, self._drawn(POSTGRES))
            self.machines[POSTGRES].start()
            self._shared.await_postgres()
        for name, port in self._daemons.items():
            self._add(name, partial(self._serve, name, port))
        longest_s = schedule.longest_training_s
        for name in LINKS:
            self._add(name, lambda disk, name=name: mains.take_part(name, disk / "state", self._ports[name], longest_s))
        config = mains.run_config(schedule.rounds, schedule.wanted, buffered=schedule.is_buffered)
        operate = lambda: mains.operate(self._ports[OPERATOR], config, self._said, self._operator)  # noqa: E731
        self._running.append(processes.start(operate, self._place / "logs" / "operator.0.log"))

    def _serve(self, name: str, port: int, disk: Path) -> int:
        if self._shared:
            places = self._shared.flags(self._ports[f"{name}/{POSTGRES}"])
            return mains.serve(disk / "data", port, places, self._shared.environment(self._ports[S3]))
        places = ["--updates", str(disk / "updates")] if self._schedule.has_store else []
        return mains.serve(disk / "data", port, places, {})

    @property
    def _operator(self) -> Path | None:
        return self._identities / identities.OPERATOR if self._schedule.is_secured else None

    def _add(self, name: str, main: Callable[[Path], int | None]) -> None:
        own, lies = self._schedule.own_disks, self._schedule.disks_lie
        prepare = partial(identities.give, self._identities, name) if self._schedule.is_secured else lambda _: None
        self.machines[name] = Machine(
            name, self._place, self._drawn(name), main, own_disk=own, lies=lies, prepare=prepare
        )
        self.machines[name].start()

    def _drawn(self, name: str) -> random.Random:
        return random.Random(f"{self._schedule.name} {name}")

    @property
    def _data(self) -> Path:
        """The data folder of the daemon, or what several share as one has it."""
        return self._place / "shared" if self._shared else self.machines[DAEMONS[0]].disk.path / "data"

    def _plan(self, begun: float) -> float:
        """Puts the faults into their order; returns when the last one is over."""
        last = begun
        for fault in self._schedule.faults:
            begins, ends = begun + fault.at_s, begun + fault.over_s
            self._at(begins, lambda fault=fault: fault.begin(self))
            self._at(ends, lambda fault=fault: fault.end(self))
            last = max(last, ends)
        self._at(last, self._heal)
        return last

    def _at(self, when: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._due, (when, next(self._order), act))

    def _heal(self) -> None:
        """Ends all faults: from now on the run must come to its end."""
        for line in self._listeners:
            self.line(line, "heal")
        for machine in self.machines.values():
            machine.dies_before(-1)
            machine.signal(signal.SIGCONT)
            machine.is_stopped = False
            if self._schedule.own_disks:
                machine.fill(None)

    def _until(self, reached: Callable[[], Any], until: float, why: str) -> None:
        while True:
            now = time.monotonic()
            while self._due and self._due[0][0] <= now:
                heapq.heappop(self._due)[2]()
            for machine in self.machines.values():
                machine.look(now)
            if reached():
                return
            if now > until and why:
                raise TimeoutError(f"{self._schedule.patience_s:.0f} s after the last fault {why}")
            time.sleep(0.02)

    def _words(self) -> list[dict[str, Any]]:
        if not self._said.exists():
            return []
        return [json.loads(line) for line in self._said.read_text().splitlines()]

    def _word(self, key: str) -> Any:
        return next((word[key] for word in self._words() if key in word), None)

    def _completed(self) -> Any:
        return self._word("completed")

    def _scored(self) -> bool:
        """Returns whether the evaluator has scored the last version."""
        wanted = f'"version": {self._schedule.rounds}'.encode()
        logs = (self._place / "logs").glob("e.*.log")
        return any(b'"evaluated"' in line and wanted in line for log in logs for line in log.read_bytes().splitlines())

    def _verify(self, run: str) -> list[str]:
        """Has the run verified, up to each update that was folded."""
        if self._shared:
            folders = [self.machines[name].disk.path / "data" for name in self._daemons]
            self._shared.gather(folders, self._data)
        spool, log = self._data / "spool", self._place / "logs" / "verify.0.log"
        port = self._ports[OPERATOR]
        pid = processes.start(lambda: mains.verify(port, run, spool, self._operator), log)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        return [] if code == 0 else [f"the run does not verify: {log.read_text()[-2000:]}"]

    def _end(self) -> None:
        for name in (*LINKS, *self._daemons):
            self.machines[name].end(LEAVES_S)
        for pid in self._running:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)

    def _judged(self, outcome: Outcome) -> Outcome:
        machines = self.machines.values()
        outcome.deaths = sum(machine.deaths for machine in machines)
        outcome.cpu_s = sum(machine.cpu_s for machine in machines)
        for machine in machines:
            machine.switches.look()
        outcome.effects = {machine.name: machine.switches.effects for machine in machines}
        outcome.notes = [f"paused: {word['paused']}" for word in self._words() if "paused" in word]
        read = self._shared.read if self._shared else None
        found = oracle.look(self._place / "logs", self.machines, self._schedule, self._data, read)
        if self._shared:
            self.machines[POSTGRES].end(LEAVES_S)
        outcome.adapter, outcome.is_exact = found.adapter, self._schedule.is_exact
        outcome.faults += found.faults
        outcome.notes += found.notes
        outcome.log = oracle.last_lines(self._place / "logs") if outcome.faults else []
        return outcome


def asyncio_run(work: Any) -> int:
    """Runs the main coroutine of a process."""
    import asyncio

    asyncio.run(work)
    return 0


if __name__ == "__main__":
    assert durations
    gc.collect()
    gc.freeze()  # what a fork's collections visit would be copied for it
    for name in sys.stdin:
        print(json.dumps(held(Schedule.named(name.strip()), os.environ.get("KEEP", "")).__dict__), flush=True)
