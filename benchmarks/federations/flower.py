"""Flower: SuperLink with its database on disk, SuperNodes, and the ServerApp that holds the rounds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from processes import Processes, Work, wait_for

APP = Path(__file__).parent / "flower_app"


class Flower:
    """A federation that holds one run.

    Args:
        processes: Its processes.
        programs: Folder of Flower's commands.
        port: Port of the SuperLink; those after it are the SuperNodes'.
        isolation: `subprocess`: the SuperLink starts what runs the ServerApp; `process`: it runs beside it.
        work: Its run.
    """

    def __init__(self, processes: Processes, programs: Path, port: int, isolation: str, work: Work) -> None:
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
        for node in range(1, work.clients + 1):
            own = ["--superlink", address, "--port", str(port + node)]
            processes.start(f"node{node}", self._program("flower-supernode"), "--insecure", *own)
        asked = {"rounds": work.rounds, "clients": work.clients, "values": work.values, "client-s": work.client_s}
        settings = " ".join([*(f"{key}={value}" for key, value in asked.items()), f"log='{self._log}'"])
        said = processes.said(self._program("flwr"), "run", str(APP), "here", "--run-config", settings)
        if "Successfully started run" not in said:
            raise RuntimeError(said)

    def _program(self, name: str) -> str:
        return str(self._programs / name)

    def rounds(self) -> list[tuple[int, float, int, float]]:
        """Returns the rounds that ended: number, value, updates, and the time."""
        lines = self._log.read_text().splitlines() if self._log.exists() else []
        rows = map(str.split, lines)
        return [(int(number), float(value), int(count), float(at)) for number, value, count, at in rows]

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
def federation(
    folder: Path, programs: Path, port: int, isolation: str, work: Work
) -> Iterator[tuple[Flower, Processes]]:
    """Gives a federation that is at work, and its processes, which end with the block."""
    own = {"FLWR_HOME": str(folder), "FLWR_TELEMETRY_ENABLED": "0", "PATH": f"{programs}:/usr/bin:/bin"}
    processes = Processes(folder, own)
    try:
        yield Flower(processes, programs, port, isolation, work), processes
    finally:
        processes.close()
