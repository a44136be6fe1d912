"""NVFlare: a provisioned server and three sites; a process of the server's holds the rounds of a job."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from processes import CLIENTS, ROUNDS, TOLERANCE, Outcome, Processes, last_round, wait_for

JOB = Path(__file__).parent / "nvflare_job"


class NVFlare:
    """A federation that holds one job; NVFlare's own scripts start a process again that died.

    Args:
        processes: Its processes.
        programs: Folder of NVFlare's commands.
    """

    def __init__(self, processes: Processes, programs: Path) -> None:
        self._processes, self._nvflare = processes, str(programs / "nvflare")
        processes.said(self._nvflare, "poc", "prepare", "-n", str(CLIENTS))
        self._place = next(processes.folder.glob("poc/*/prod_00"))
        python = str(programs / "python")
        processes.said(python, str(JOB / "job.py"), str(processes.folder / "jobs"), str(ROUNDS), str(CLIENTS))
        for name in ("server", *(f"site-{number}" for number in range(1, CLIENTS + 1))):
            processes.start(name, "bash", str(self._place / name / "startup" / "sub_start.sh"))
        all_here = f"Total clients: {CLIENTS}"
        wait_for(lambda: all_here in processes.log("server"), "the sites")
        said = processes.said(self._nvflare, "job", "submit", "-j", str(processes.folder / "jobs" / "kills"))
        found = re.search(r"job_id: (\S+)", said)
        if found is None:
            raise RuntimeError(said)
        self._job = found[1]

    def ended(self) -> int:
        """Returns the number of rounds that ended, by what the server says of those that began."""
        began = {int(number) for number in re.findall(r"Round (\d+) started", self._processes.log("server"))}
        done = ROUNDS if "COMPLETED" in self.status() else 0
        return max(done, max(began, default=0))

    def status(self) -> str:
        """Returns NVFlare's word on the job."""
        listed = self._processes.said(self._nvflare, "job", "list")
        line = next((line for line in listed.splitlines() if line.startswith(self._job)), "")
        return line.split()[2] if line else "unknown"

    def kill(self, victim: str) -> None:
        """Kills the server, or the process that holds the rounds."""
        self._processes.kill_started({"server": b"server_train", "job": b"runner_process"}[victim])

    def value(self) -> float:
        """Returns the first value of the result; not a number if there is none."""
        self._processes.said(self._nvflare, "job", "download", self._job, "-o", str(self._processes.folder / "result"))
        files = list((self._processes.folder / "result").rglob("*.npy"))
        return float(np.load(files[0]).reshape(-1)[0]) if files else float("nan")


@contextmanager
def federation(folder: Path, programs: Path) -> Iterator[NVFlare]:
    """Gives a federation that is at work; its processes end with the block."""
    own = {"HOME": str(folder), "NVFLARE_POC_WORKSPACE": str(folder / "poc"), "PATH": f"{programs}:/usr/bin:/bin"}
    processes = Processes(folder, own)
    try:
        yield NVFlare(processes, programs)
    finally:
        processes.close()


def measure(folder: Path, programs: Path, victim: str) -> Outcome:
    """Kills a process after two rounds, and tells what came of it; nobody but NVFlare's scripts starts it again."""
    with federation(folder, programs) as nvflare:
        wait_for(lambda: nvflare.ended() >= 2, "two rounds")
        time.sleep(1)
        killed_at = time.monotonic()
        nvflare.kill(victim)
        pause_s = last_round(nvflare.ended, lambda: "FINISHED" in nvflare.status(), killed_at)
        rounds = nvflare.ended()
        return Outcome(rounds, rounds * CLIENTS, nvflare.status(), abs(nvflare.value() - ROUNDS) < TOLERANCE, pause_s)
