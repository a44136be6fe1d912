"""Parts that the benchmarks share: payloads, processes, and the reading of memory."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

from fedpeft.identity import folder as identity_folder
from fedpeft.identity.folder import Identity
from fedpeft.identity.subject import Role, Subject
from fedpeft_server.access.certificates import read_authority
from fedpeft_server.access.files import Files

HERE = Path(__file__).resolve().parent
CHUNK_BYTES = 1024 * 1024
PAYLOADS = {"small": (75, 2_400), "large": (172, 125_000)}
"""(tensors, float32 values in each): 180,000 values are bias tuning of a ViT-B; 21.5 million a whole ViT-S."""
START_S = 60.0


def print_measured(measure: Callable[[str, int, int], dict[str, Any]], about: str) -> None:
    """Reads --payload, --clients and --repeat, and prints what was measured as JSON."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--payload", choices=list(PAYLOADS), default="small")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--repeat", type=int, default=5)
    chosen = parser.parse_args()
    print(json.dumps(measure(chosen.payload, chosen.clients, chosen.repeat), indent=2))


def payload_bytes(payload: str) -> int:
    """Size of one payload in bytes."""
    tensors, values = PAYLOADS[payload]
    return 4 * tensors * values


def free_address() -> str:
    """A HOST:PORT on loopback that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def peak_memory_bytes(pid: int) -> int:
    """The most resident memory a process ever had."""
    return _status_bytes(pid, "VmHWM")


def processor_seconds(pid: int) -> float:
    """The processor time of a process so far, user and system."""
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def resident_bytes(pid: int) -> int:
    """The resident memory of a process."""
    return _status_bytes(pid, "VmRSS")


def _status_bytes(pid: int, field: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"process {pid} shows no {field}; this needs Linux")


def machine() -> dict[str, str | int]:
    """Conditions that the figures depend on."""
    cpus = [ln for ln in Path("/proc/cpuinfo").read_text().splitlines() if ln.startswith("model name")]
    name = cpus[0].partition(": ")[2] if cpus else platform.machine()
    return {
        "cpu": name,
        "cores": os.cpu_count() or 0,
        "python": platform.python_version(),
        "system": platform.release(),
    }


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Leaves the block as an exception does when SIGTERM or SIGHUP comes, so that its processes and folders go too."""

    def end(number: int, _: FrameType | None) -> None:
        for each in before:
            signal.signal(each, signal.SIG_IGN)  # a second one must not break the clearing off
        raise SystemExit(128 + number)

    before = {each: signal.signal(each, end) for each in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@contextmanager
def process(arguments: list[str], address: str, log: Path, open_files: int | None = None) -> Iterator[int]:
    """Runs a Python process that listens on `address`; yields its pid once it does, and ends it afterwards."""
    limited = ["bash", "-c", f'ulimit -n {open_files}; exec "$@"', "bash"] if open_files else []
    with log.open("wb") as out:
        child = subprocess.Popen([*limited, sys.executable, *arguments], stdout=out, stderr=subprocess.STDOUT)
    try:
        host, _, port = address.rpartition(":")
        give_up = time.monotonic() + START_S
        while True:
            try:
                socket.create_connection((host, int(port)), timeout=1).close()
                break
            except OSError:
                if child.poll() is not None or time.monotonic() > give_up:
                    raise RuntimeError(f"{' '.join(arguments)} does not serve:\n{log.read_text()[-2000:]}") from None
                time.sleep(0.05)
        yield child.pid
    finally:
        child.terminate()
        try:
            child.wait(60)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder on the disk of this checkout, because a /tmp in memory would make every fsync free.

    A signal that ends the program in the block removes it, and ends the processes of the block.
    """
    parent = HERE.parent / "build"
    parent.mkdir(exist_ok=True)
    with ended_by_signals():
        folder = Path(tempfile.mkdtemp(prefix="bench-", dir=parent))
        try:
            yield folder
        finally:
            shutil.rmtree(folder)


@dataclass(frozen=True)
class Daemon:
    """A running `fedpeft-server`."""

    pid: int
    address: str
    metrics: str
    enrolling: str = ""
    identity: Identity | None = None
    """The operator's, over TLS; None for plain text."""

    def enroll(self, folder: Path, clients: int) -> None:
        """Writes an identity folder for each of so many clients, signed with the authority's key, without a token."""
        files = Files(folder / "data" / "identity")
        authority = read_authority(files)
        if authority is None:
            raise RuntimeError(f"{files.folder} has no authority")
        for number in range(clients):
            name = f"client-{number:03}"
            into = folder / "identities" / name
            key = identity_folder.take_key(into)
            certificate = authority.issue(Subject(Role.CLIENT, name), key.public_key(), timedelta(days=1))
            identity_folder.write(into, self.address, [authority.certificate], [certificate])

    def samples(self) -> list[str]:
        """The lines of /metrics now."""
        with urllib.request.urlopen(f"http://{self.metrics}/metrics", timeout=30) as answer:
            return answer.read().decode().splitlines()

    def counters(self, run: str) -> dict[str, float]:
        """The bytes of a run so far, from /metrics: `wire_up`, `wire_down`, `payload_up`, `payload_down`."""
        found = {f"{kind}_{way}": 0.0 for kind in ("wire", "payload") for way in ("up", "down")}
        for line in self.samples():
            for kind in ("wire", "payload"):
                for way in ("up", "down"):
                    if line.startswith(f"fedpeft_{kind}_bytes_total{{") and f'"{run}"' in line and f'"{way}"' in line:
                        found[f"{kind}_{way}"] += float(line.rpartition(" ")[2])
        return found


@contextmanager
def daemon(folder: Path, *, tls: bool = False, open_files: int | None = None) -> Iterator[Daemon]:
    """Runs a `fedpeft-server` on a data folder of its own, in plain text or over TLS, with a limit of open files."""
    address, metrics, enroll = free_address(), free_address(), free_address()
    data = ["--data-dir", str(folder / "data")]
    person = folder / "operator"
    if tls:
        command = [sys.executable, "-m", "fedpeft_server", "init", *data, "--operator-identity", str(person)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    arguments = ["-m", "fedpeft_server", *data, "--listen", address, "--enroll", enroll, "--metrics", metrics]
    with process(arguments, address, folder / "server.log", open_files) as pid:
        yield Daemon(pid, address, metrics, enroll, Identity.load(person) if tls else None)
