"""A site whose only way out is an HTTP proxy with a password: tinyproxy, between two network namespaces."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import wait_for

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

BIN = Path(sys.executable).parent
SERVER = "10.78.0.1"
"""An address of the head's that the site has no route to."""
PROXY = "10.77.0.1"
RULES = f"""
Port 8888
Listen {PROXY}
Timeout 600
ConnectPort 7070
ConnectPort 7071
BasicAuth ada secret
"""
LINKS = f"""
ip link add way netns head type veth peer name way netns site
ip -n head addr add {PROXY}/24 dev way
ip -n head addr add {SERVER}/32 dev lo
ip -n site addr add 10.77.0.2/24 dev way
ip -n head link set lo up
ip -n head link set way up
ip -n site link set lo up
ip -n site link set way up
"""


class Site:
    """A head with server and proxy, and a site that reaches the proxy alone."""

    def __init__(self, folder: Path, head: str, site: str) -> None:
        self.folder, self.head, self.site = folder, head, site
        self.started: list[subprocess.Popen[bytes]] = []

    def run(self, machine: str, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        where = {"cwd": self.folder, "env": self._environment(environment)}
        words = ["ip", "netns", "exec", machine, *command]
        return subprocess.run(words, capture_output=True, text=True, timeout=120, **where)  # type: ignore[call-overload, no-any-return]

    def start(self, *command: str) -> None:
        words = ["ip", "netns", "exec", self.head, *command]
        with (self.folder / f"{Path(command[0]).name}.log").open("wb") as file:
            self.started.append(
                subprocess.Popen(words, stdout=file, stderr=file, cwd=self.folder, env=self._environment({}))
            )

    def _environment(self, more: dict[str, str]) -> dict[str, str]:
        bare = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
        return {**bare, "XDG_CONFIG_HOME": str(self.folder / "config"), **more}


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    for program in ("ip", "tinyproxy"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed (Debian: iproute2, tinyproxy)")
    names = [f"{name}{os.getpid()}" for name in ("head", "site")]
    made = Site(tmp_path, *names)
    for name in names:
        subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        for line in LINKS.strip().splitlines():
            words = [dict(zip(("head", "site"), names, strict=True)).get(word, word) for word in line.split()]
            subprocess.run(words, check=True)
        yield made
    finally:
        for process in made.started:
            process.terminate()
            process.wait(30)
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=True)


def test_a_site_enrolls_and_calls_through_the_proxy_alone(site: Site, tmp_path: Path) -> None:
    (tmp_path / "tinyproxy.conf").write_text(RULES)
    fedpeft, server, client = (str(BIN / name) for name in ("fedpeft", "fedpeft-server", "fedpeft-client"))
    operator = ("--identity", "operator")
    given = ("--data-dir", "data", "--host", SERVER, "--operator", "ada", "--operator-identity", "operator")
    assert site.run(site.head, server, "init", *given).returncode == 0
    site.start("tinyproxy", "-d", "-c", "tinyproxy.conf")
    site.start(
        server, "--data-dir", "data", "--listen", f"{SERVER}:7070", "--enroll", f"{SERVER}:7071", "--metrics", ""
    )
    log = tmp_path / "fedpeft-server.log"
    wait_for(lambda: '"event": "serving"' in log.read_text(), "the server")
    token = (*operator, "token", "create", "--name", "site-a", "--role", "client", "--out", "token.txt")
    assert site.run(site.head, fedpeft, *token).returncode == 0

    def called(**environment: str) -> str:
        done = site.run(site.site, fedpeft, *operator, "run", "list", **environment)
        return done.stdout + done.stderr

    way = f"http://ada:secret@{PROXY}:8888"
    assert "Network is unreachable" in called()
    assert "wants a user and password" in called(HTTPS_PROXY=f"http://{PROXY}:8888")
    assert called(HTTPS_PROXY=way).startswith("RUN ")
    assert "Network is unreachable" in called(HTTPS_PROXY=way, NO_PROXY=SERVER)
    enrolled = site.run(site.site, client, "enroll", "token.txt", "--state-dir", "state", https_proxy=way)
    assert enrolled.stdout.startswith(f"enrolled as client site-a at {SERVER}:7070")
    asked = (tmp_path / "tinyproxy.log").read_text()
    assert f"CONNECT {SERVER}:7070" in asked and f"CONNECT {SERVER}:7071" in asked
