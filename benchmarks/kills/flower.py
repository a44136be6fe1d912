"""Flower: SuperLink with its database on disk, three SuperNodes, and the ServerApp that holds the rounds."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from processes import AWAY_S, CLIENTS, ROUNDS, TOLERANCE, Outcome, Processes, last_round, wait_for

APP = Path(__file__).parent / "flower_app"


class Flower:
    """A federation that holds one run.

    Args:
        processes: Its processes.
        programs: Folder of Flower's commands.
        port: Port of the SuperLink; those after it are the SuperNodes'.
        isolation: `subprocess`: the SuperLink starts what runs the ServerApp; `process`: it runs beside it.
    """

    def __init__(self, processes: Processes, programs: Path, port: int, isolation: str) -> None:
        self._processes, self._programs = processes, programs
        self._log = processes.folder / "rounds"
        address = f"127.0.0.1:{port}"
        (processes.folder / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "{address}"\ninsecure = true\n'
        )
        database = ["--database", str(processes.folder / "state.db"), "--isolation", isolation]
        processes.start(
            "superlink",
            self._program("flower-superlink"),
            "--insecure",
            *database,
            *("--host", "127.0.0.1", "--port", str(port)),
        )
        wait_for(lambda: "Uvicorn running" in processes.log("superlink"), "the SuperLink")
        if isolation == "process":
            processes.start(
                "superexec", self._program("flower-superexec"), "--insecure", "--runtime-api-address", address
            )
        for node in range(1, CLIENTS + 1):
            own = ["--superlink", address, "--port", str(port + node)]
            processes.start(f"node{node}", self._program("flower-supernode"), "--insecure", *own)
        settings = f"rounds={ROUNDS} clients={CLIENTS} log='{self._log}'"
        said = processes.said(self._program("flwr"), "run", str(APP), "here", "--run-config", settings)
        if "Successfully started run" not in said:
            raise RuntimeError(said)

    def _program(self, name: str) -> str:
        return str(self._programs / name)

    def rounds(self) -> list[tuple[int, float, int]]:
        """Returns the rounds that ended: number, value, updates."""
        lines = self._log.read_text().splitlines() if self._log.exists() else []
        return [(int(number), float(value), int(count)) for number, value, count in map(str.split, lines)]

    def status(self) -> str:
        """Returns Flower's word on the run."""
        said = self._processes.said(self._program("flwr"), "list", "here", "--format", "json")
        with suppress(ValueError, KeyError, IndexError):
            return str(json.loads(said[said.index("{") :])["runs"][0]["status"])
        return "unknown: " + " ".join(said.split())[-80:]

    def kill_server_app(self) -> None:
        """Kills the process that holds the rounds."""
        self._processes.kill_started(b"flwr-serverapp")


@contextmanager
def federation(folder: Path, programs: Path, port: int, isolation: str) -> Iterator[tuple[Flower, Processes]]:
    """Gives a federation that is at work, and its processes, which end with the block."""
    own = {"FLWR_HOME": str(folder), "FLWR_TELEMETRY_ENABLED": "0", "PATH": f"{programs}:/usr/bin:/bin"}
    processes = Processes(folder, own)
    try:
        yield Flower(processes, programs, port, isolation), processes
    finally:
        processes.close()


def measure(folder: Path, programs: Path, port: int, isolation: str, victim: str) -> Outcome:
    """Kills a process after two rounds, starts it again as a service manager would, and tells what came of it."""
    with federation(folder, programs, port, isolation) as (flower, processes):
        wait_for(lambda: len(flower.rounds()) >= 2, "two rounds")
        time.sleep(1)
        killed_at = time.monotonic()
        if victim == "ServerApp":
            flower.kill_server_app()
        else:
            processes.kill("superlink")
            time.sleep(AWAY_S)
            processes.start("superlink")
        ended = ("finished", "failed", "stopped")
        pause_s = last_round(
            lambda: len(flower.rounds()), lambda: any(word in flower.status() for word in ended), killed_at
        )
        rounds = flower.rounds()
        last = wait_for(flower.status, "the status")
        time.sleep(5)
        status = flower.status() if "running" in last else last
        return Outcome(
            len(rounds), sum(count for *_, count in rounds), status, abs(rounds[-1][1] - ROUNDS) < TOLERANCE, pause_s
        )
