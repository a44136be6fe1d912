"""From `fedpeft-server init` to a revoked client, with processes as people start them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ..ports import free_port
from ..run_files import TINY_MODEL
from .conftest import WAIT_S, Process, wait_for, write_site

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]

RUN_FILE = f"""
{TINY_MODEL}
[peft]
method = "bias"
[rounds]
count = 2
clients = 2
[training]
steps = 2
batch_size = 4
"""
LIFE_S = 300
"""Certificates begin ten minutes before they are made, so these are past their half at once, and are renewed."""


class Secured:
    """A federation whose every connection is TLS, of processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = next(p for p in iter(free_port, 0) if p < 65_535)
        self.started: list[Process] = []
        self.secrets: list[str] = []
        init = ["init", "--data-dir", "server", "--operator", "ada", "--port", str(self.port), "--host", "localhost"]
        assert self.command("fedpeft_server", *init).returncode == 0
        flags = ["--data-dir", str(folder / "server"), "--listen", f"127.0.0.1:{self.port}", "--metrics", ""]
        self.server = self.start("fedpeft_server", "server", *flags, "--certificate-life-s", str(LIFE_S))
        wait_for(lambda: self.server.events("serving") or self.server.process.poll() is not None, "the daemon")

    def command(self, module: str, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", module, *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=WAIT_S,
            cwd=self.folder,
            env={**os.environ, "XDG_CONFIG_HOME": str(self.folder / "config")},
        )

    def fedpeft(self, *arguments: str) -> str:
        done = self.command("fedpeft_operator.app", *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def start(self, module: str, name: str, *flags: str) -> Process:
        self.started.append(Process(module, self.folder / f"{name}.log", *flags))
        return self.started[-1]

    def enroll(self, name: str, role: str = "client") -> Path:
        line = self.fedpeft("token", "create", "--name", name, "--role", role, "--expires", "1h")
        self.secrets.append(line.split(".")[4])
        state = self.folder / name
        done = self.command("fedpeft_client", "enroll", "-", "--state-dir", str(state), stdin=line)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"enrolled as {role} {name} at localhost:{self.port} until ")
        return state

    def client(self, name: str, *flags: str) -> Process:
        data = write_site(self.folder / "data" / f"{name}.parquet", len(name))
        given = ["--data", str(data), "--state-dir", str(self.folder / name), "--threads", "1", "--device", "cpu"]
        return self.start("fedpeft_client", name, *given, *flags)

    def close(self) -> None:
        for process in self.started:
            process.kill()


@pytest.fixture
def secured(tmp_path: Path) -> Iterator[Secured]:
    made = Secured(tmp_path)
    yield made
    made.close()


def test_a_federation_with_certificates(secured: Secured) -> None:
    for name in ("alice", "bob", "mallory"):
        secured.enroll(name)
    (secured.folder / "run.toml").write_text(RUN_FILE)
    run = json.loads(secured.fedpeft("run", "create", "run.toml", "--json"))["run"]
    clients = [secured.client(name, "--once") for name in ("alice", "bob")]
    for client in clients:
        assert client.process.wait(WAIT_S) == 0, client.log.read_text()[-3000:]
        assert client.events("certificate renewed")
    shown = json.loads(secured.fedpeft("run", "show", run, "--json"))
    assert shown["state"] == "completed"
    assert [round_["clients"] for round_ in shown["rounds"]] == [["alice", "bob"]] * 2

    mallory = secured.client("mallory")
    wait_for(lambda: mallory.events("waiting"), "the client to wait")
    secured.fedpeft("client", "revoke", "mallory", "--reason", "laptop lost")
    assert mallory.process.wait(20) == 5, "revoked while its call is open"
    last = mallory.log.read_text().splitlines()[-1]
    assert last.startswith("fedpeft-client: ") and "revoked" in last
    again = secured.client("mallory", "--once")
    assert again.process.wait(WAIT_S) == 5

    verified = secured.fedpeft("audit", "verify")
    assert re.search(r"^head \d+:[0-9a-f]{64}$", verified, re.M)
    actions = {json.loads(line)["action"] for line in secured.fedpeft("audit", "show", "--json").splitlines()}
    assert {"token.created", "identity.enrolled", "identity.revoked", "run.created"} <= actions
    nothing_secret_is_written(secured)


def nothing_secret_is_written(secured: Secured) -> None:
    """No log, no database and no other file has a token's secret, and none but key.pem has a key."""
    for path in secured.folder.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert not any(secret.encode() in data for secret in secured.secrets), path
            assert b"PRIVATE KEY" not in data or path.name.endswith("key.pem") or path.suffix == ".key", path
