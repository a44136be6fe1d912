"""NVFlare: a provisioned server and sites; a process of the server's holds the rounds of a job."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import numpy as np
from processes import Processes, Work, wait_for

JOB = Path(__file__).parent / "nvflare_job"
_TIME = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}")


class NVFlare:
    """A federation that holds one job; NVFlare's own scripts start a process again that died.

    Args:
        processes: Its processes.
        programs: Folder of NVFlare's commands.
        work: Its job.
    """

    def __init__(self, processes: Processes, programs: Path, work: Work) -> None:
        self._processes, self._nvflare, self._work = processes, str(programs / "nvflare"), work
        processes.said(self._nvflare, "poc", "prepare", "-n", str(work.clients))
        self._place = next(processes.folder.glob("poc/*/prod_00"))
        python = str(programs / "python")
        first = processes.folder / "zeros.npy"
        np.save(first, np.zeros(work.values, np.float32))
        asked = work.rounds, work.clients, first, work.client_s
        processes.said(python, str(JOB / "job.py"), str(processes.folder / "jobs"), *map(str, asked))
        for name in ("server", *(f"site-{number}" for number in range(1, work.clients + 1))):
            processes.start(name, "bash", str(self._place / name / "startup" / "sub_start.sh"))
        all_here = f"Total clients: {work.clients}"
        wait_for(lambda: all_here in processes.log("server"), "the sites")
        said = processes.said(self._nvflare, "job", "submit", "-j", str(processes.folder / "jobs" / "adds"))
        found = re.search(r"job_id: (\S+)", said)
        if found is None:
            raise RuntimeError(said)
        self._job = found[1]

    def ended(self) -> int:
        """Returns the number of rounds that ended, by what the server says of those that began."""
        done = self._work.rounds if "COMPLETED" in self.status() else 0
        return max(done, max(self.began(), default=0))

    def began(self) -> dict[int, float]:
        """Returns the time at which each round began, by its number from 0 on; the word is a line below the time."""
        found, at = {}, ""
        for line in self._processes.log("server").splitlines():
            at = _TIME.findall(line)[0] if _TIME.match(line) else at
            for number in re.findall(r"Round (\d+) started", line):
                found[int(number)] = datetime.strptime(at, "%Y-%m-%d %H:%M:%S,%f").timestamp()
        return found

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
def federation(folder: Path, programs: Path, work: Work) -> Iterator[tuple[NVFlare, Processes]]:
    """Gives a federation that is at work, and its processes, which end with the block."""
    own = {"HOME": str(folder), "NVFLARE_POC_WORKSPACE": str(folder / "poc"), "PATH": f"{programs}:/usr/bin:/bin"}
    processes = Processes(folder, own)
    try:
        yield NVFlare(processes, programs, work), processes
    finally:
        processes.close()
