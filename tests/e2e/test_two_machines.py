"""Two machines, as network namespaces: from nothing to a run over TLS in six commands, with tshark on the wire."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from .conftest import RUN_FILE, WAIT_S, wait_for, write_site

HEAD, SITE = "10.77.0.1", "10.77.0.2"
BIN = Path(sys.executable).parent

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


class Machines:
    """Two namespaces with a wire between them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.head, self.site = f"fedpeft-head-{os.getpid()}", f"fedpeft-site-{os.getpid()}"
        self.started: list[subprocess.Popen[bytes]] = []

    def lay(self) -> None:
        for name in (self.head, self.site):
            ip("netns", "add", name)
        ip("-n", self.head, "link", "add", "wire", "type", "veth", "peer", "name", "wire", "netns", self.site)
        for name, address in ((self.head, HEAD), (self.site, SITE)):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "wire")
            for link in ("lo", "wire"):
                ip("-n", name, "link", "set", link, "up")

    def clear(self) -> None:
        for process in self.started:
            process.kill()
            process.wait()
        for name in (self.head, self.site):
            subprocess.run(["ip", "netns", "del", name], check=False)

    def run(self, machine: str, *command: str, given: str = "") -> str:
        done = subprocess.run(
            self._on(machine, *command),
            input=given,
            capture_output=True,
            text=True,
            timeout=WAIT_S,
            env=self._environment,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def start(self, machine: str, log: str, *command: str) -> subprocess.Popen[bytes]:
        with (self.folder / log).open("wb") as file:
            line = self._on(machine, *command)
            process = subprocess.Popen(line, stdout=file, stderr=subprocess.STDOUT, env=self._environment)
        self.started.append(process)
        return process

    @property
    def _environment(self) -> dict[str, str]:
        return {**os.environ, "XDG_CONFIG_HOME": str(self.folder / "config"), "OMP_NUM_THREADS": "1"}

    def _on(self, machine: str, program: str, *arguments: str) -> list[str]:
        found = BIN / program
        return ["ip", "netns", "exec", machine, str(found) if found.exists() else program, *arguments]


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    for program in ("ip", "tshark"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed (Debian: iproute2, tshark)")
    made = Machines(tmp_path)
    try:
        made.lay()
        yield made
    finally:
        made.clear()


def test_from_nothing_to_a_run_over_tls_in_six_commands(machines: Machines, tmp_path: Path) -> None:
    write_site(tmp_path / "images.parquet", 1)
    text = RUN_FILE.replace("depth = 8", "depth = 1").replace('"full"', '"head"').replace("steps = 60", "steps = 2")
    (tmp_path / "run.toml").write_text(text.replace("clients = 2", "clients = 1"))
    data, state, wire = str(tmp_path / "data"), str(tmp_path / "state"), str(tmp_path / "wire.pcap")
    sniffer = machines.start(machines.head, "tshark.log", "tshark", "-i", "wire", "-w", wire, "-q")
    wait_for(lambda: Path(wire).exists(), "tshark")

    machines.run(machines.head, "fedpeft-server", "init", "--data-dir", data, "--host", HEAD)
    machines.start(machines.head, "server.log", "fedpeft-server", "--data-dir", data, "--listen", f"{HEAD}:7070")
    wait_for(lambda: '"serving"' in (tmp_path / "server.log").read_text(), "the daemon")
    token = machines.run(machines.head, "fedpeft", "token", "create", "--name", "site-a", "--role", "client")
    machines.run(machines.site, "fedpeft-client", "enroll", "-", "--state-dir", state, given=token)
    what = ["--state-dir", state, "--data", str(tmp_path / "images.parquet"), "--once"]
    client = machines.start(machines.site, "client.log", "fedpeft-client", *what)
    created = machines.run(machines.head, "fedpeft", "run", "create", str(tmp_path / "run.toml"), "--json")
    run = json.loads(created)["run"]

    assert client.wait(WAIT_S) == 0, (tmp_path / "client.log").read_text()
    shown = json.loads(machines.run(machines.head, "fedpeft", "run", "show", run, "--json"))
    assert (shown["state"], [r["clients"] for r in shown["rounds"]]) == ("completed", [["site-a"], ["site-a"]])
    out = str(tmp_path / "adapter.safetensors")
    machines.run(machines.head, "fedpeft", "run", "export", run, "--format", "safetensors", "--out", out)
    time.sleep(1)  # the last packets reach tshark's file
    sniffer.terminate()
    sniffer.wait(WAIT_S)

    heard = Path(wire).read_bytes()
    up = sum(r["wire_bytes_up"] for r in shown["rounds"])
    assert len(heard) > up, "tshark was on the way"
    assert not [n for n, tensor in load_file(out).items() if tensor.tobytes()[:16] in heard]
    assert not [word for word in (b"fedpeft.v1", b"head.weight", b"site-a", token.encode()) if word in heard]
    assert set(fields(wire, "tls.handshake.type == 2", "tls.handshake.extensions.supported_version")) == {"0x0304"}
    bare = fields(wire, "tcp.len > 0 && !tls && !tcp.analysis.retransmission && !tcp.reassembled_in", "frame.number")
    assert not bare, "every segment with data is a part of a TLS record"


def fields(capture: str, which: str, field: str) -> list[str]:
    """Returns a field of the packets that a display filter selects."""
    # Port 7071 is no protocol's; what speaks TLS there is found by its handshake.
    command = ["tshark", "-r", capture, "-Y", which, "-T", "fields", "-e", field]
    text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    return [line for line in text.splitlines() if line]
