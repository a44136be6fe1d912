"""What goes into the images: their needs, their files, their user, and the server's health check."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from .conftest import ROOT

DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text()
IMAGES = ROOT / "deploy" / "images"
HEALTHY = [sys.executable, str(IMAGES / "healthy.py")]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def stages() -> dict[str, str]:
    """Returns the text of every stage by its name."""
    parts = re.split(r"^FROM \S+ AS (\S+)$", DOCKERFILE, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def needs(*extras: str) -> list[str]:
    command = [sys.executable, str(IMAGES / "requirements.py"), str(ROOT / "pyproject.toml"), *extras]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.splitlines()


def test_an_image_needs_what_its_extras_do_and_not_itself() -> None:
    assert needs() == sorted(PYPROJECT["dependencies"])
    optional = PYPROJECT["optional-dependencies"]
    client = set(PYPROJECT["dependencies"]) | set(optional["train"]) | set(optional["client"])
    assert needs("client") == sorted(line for line in client if not line.startswith("fedpeft["))
    assert not any(re.match("torch|timm", line) for line in needs("server", "postgres", "console", "top"))


@pytest.mark.parametrize("target", ["server", "operator", "client", "demo"])
def test_an_image_runs_as_nobody_in_particular_and_ends_by_sigterm(target: str) -> None:
    stage = stages()[target]
    assert re.findall(r"^USER (\S+)$", stage, re.MULTILINE)[-1] == "10001:10001"
    assert re.search(r"^ENTRYPOINT \[", stage, re.MULTILINE), "a shell would keep signals to itself"
    if target in ("server", "client"):
        assert "STOPSIGNAL SIGTERM" in stage and "HEALTHCHECK" in stage


def test_what_is_installed_is_pinned() -> None:
    for stage in ("library", "server", "operator", "client-needs"):
        (install,) = re.findall(r"^RUN pip .*?(?<!\\)$", stages()[stage], re.MULTILINE | re.DOTALL)
        assert "--constraint /opt/fedpeft/constraints.txt" in install


def test_what_is_copied_is_there_and_let_in() -> None:
    let_in = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    sources = [
        source
        for line in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.MULTILINE)
        for source in line.split()[:-1]
    ]
    assert len(sources) > 8
    for source in sources:
        assert (ROOT / source).exists()
        assert any(Path(source).is_relative_to(allowed) for allowed in let_in), source


@pytest.mark.parametrize("secured", [True, False], ids=["TLS", "plain text"])
def test_the_health_check_passes_while_the_server_serves(tmp_path: Path, secured: bool) -> None:
    data = tmp_path / "data"
    environment = {**os.environ, "FEDPEFT_SERVER_DATA_DIR": str(data), "FEDPEFT_SERVER_METRICS": "127.0.0.1:0"}
    if secured:
        made = ["init", "--operator-identity", str(tmp_path / "operator")]
        command = [sys.executable, "-m", "fedpeft_server", *made]
        subprocess.run(command, env=environment, check=True, capture_output=True, timeout=60)
    flags = ["--listen", "127.0.0.1:0", "--enroll", "127.0.0.1:0", "--log-format", "json"]
    server = subprocess.Popen(
        [sys.executable, "-m", "fedpeft_server", *flags], env=environment, stderr=subprocess.PIPE, text=True
    )
    assert server.stderr is not None
    try:
        said = server.stderr.readline()
        ports = dict(re.findall(r'"(listen|enroll)": "127\.0\.0\.1:(\d+)"', said))
        environment["FEDPEFT_SERVER_LISTEN"] = f"0.0.0.0:{ports['listen']}"
        environment["FEDPEFT_SERVER_ENROLL"] = f"0.0.0.0:{ports.get('enroll', '1')}"
        asked = subprocess.run(HEALTHY, env=environment, capture_output=True, text=True, timeout=60)
        assert asked.returncode == 0, asked.stderr
        server.terminate()
        server.wait(60)
        asked = subprocess.run(HEALTHY, env=environment, capture_output=True, text=True, timeout=60)
        assert asked.returncode == 1 and asked.stderr.startswith("the server does not answer")
    finally:
        server.kill()
        server.wait()
        server.stderr.close()
