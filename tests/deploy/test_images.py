"""Contents of the images: their needs, their files, their user, and the server's health check."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from .conftest import ROOT

DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text()
IMAGES = ROOT / "deploy" / "images"
HEALTHY = [sys.executable, str(IMAGES / "healthy.py")]
_spec = importlib.util.spec_from_file_location("requirements", IMAGES / "requirements.py")
assert _spec is not None and _spec.loader is not None
requirements = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(requirements)
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def stages() -> dict[str, str]:
    """Returns the text of every stage by its name."""
    parts = re.split(r"^FROM \S+ AS (\S+)$", DOCKERFILE, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_an_image_needs_what_its_extras_do_and_not_itself() -> None:
    def needs(*extras: str) -> list[str]:
        return requirements.needed(ROOT / "pyproject.toml", [*extras])

    assert needs() == sorted(PYPROJECT["dependencies"])
    optional = PYPROJECT["optional-dependencies"]
    client = set(PYPROJECT["dependencies"]) | set(optional["train"]) | set(optional["client"])
    assert needs("client") == sorted(line for line in client if not line.startswith("fedpeft["))
    assert not any(re.match("torch|timm", line) for line in needs("server", "postgres", "console", "top"))


def test_the_gigabytes_have_a_layer_that_depends_on_their_own_pins_alone() -> None:
    pins = ["numpy==2.4.6", "nvidia-cublas==13.4", "nvidia-ml-py==13.6", "timm==1.0", "torch==2.15.0+cpu", "triton==3"]
    files = requirements.split(pins)
    assert files["heavy.txt"] == ["nvidia-cublas==13.4", "torch==2.15.0+cpu", "triton==3"]
    assert files["light.txt"] == ["numpy==2.4.6", "nvidia-ml-py==13.6", "timm==1.0"]
    steps = [line for line in stages()["client-library"].splitlines() if line.startswith(("COPY", "RUN", "     "))]
    assert [re.findall(r"heavy\.txt|light\.txt", step) for step in steps] == [
        *(["heavy.txt"], [], ["heavy.txt"]),
        *(["light.txt"], [], ["light.txt"]),
    ]


def wheel(folder: Path, name: str, version: str, *requires: str) -> None:
    """Writes a wheel of nothing but what it needs."""
    info = f"{name}-{version}.dist-info"
    lines = [
        "Metadata-Version: 2.1",
        f"Name: {name}",
        f"Version: {version}",
        *(f"Requires-Dist: {r}" for r in requires),
    ]
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{info}/METADATA", "\n".join(lines) + "\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")


def test_a_pin_of_what_an_image_has_not_leaves_its_files_as_they_were(tmp_path: Path) -> None:
    for name, version, *requires in (("torch", "1.0", "alpha"), ("alpha", "1.0"), ("alpha", "2.0"), ("beta", "1.0")):
        wheel(tmp_path, name, version, *requires)
    (tmp_path / "pyproject.toml").write_text(
        '[project]\ndependencies = ["alpha"]\n[project.optional-dependencies]\ntrain = ["torch"]\nother = ["beta"]\n'
    )

    def written(*constraints: str) -> list[str]:
        (tmp_path / "constraints.txt").write_text("".join(f"{line}\n" for line in constraints))
        command = [sys.executable, str(IMAGES / "requirements.py"), "pyproject.toml", "constraints.txt", "train"]
        command += ["--out", "needs", "--pip=--no-index --find-links ."]
        subprocess.run(command, cwd=tmp_path, check=True, timeout=60)
        return [(tmp_path / "needs" / name).read_text() for name in ("heavy.txt", "light.txt")]

    assert written("alpha==1.0", "beta==1.0", "torch==1.0") == ["torch==1.0\n", "alpha==1.0\n"]
    assert written("alpha==1.0", "beta==2.0", "torch==1.0") == ["torch==1.0\n", "alpha==1.0\n"]
    assert written("alpha==2.0", "beta==1.0", "torch==1.0") == ["torch==1.0\n", "alpha==2.0\n"]


@pytest.mark.parametrize("target", ["server", "operator", "client", "demo"])
def test_an_image_runs_as_nobody_in_particular_and_ends_by_sigterm(target: str) -> None:
    stage = stages()[target]
    assert re.findall(r"^USER (\S+)$", stage, re.MULTILINE)[-1] == "10001:10001"
    assert re.search(r"^ENTRYPOINT \[", stage, re.MULTILINE), "a shell would keep signals to itself"
    if target in ("server", "client"):
        assert "STOPSIGNAL SIGTERM" in stage and "HEALTHCHECK" in stage


def test_what_is_installed_was_resolved_under_the_constraints() -> None:
    """And nothing beside it: each install takes the files of versions as they stand, and follows no dependency."""
    for stage in ("library", "server", "operator", "client-library"):
        installs = re.findall(r"^RUN (?:.*?\bpip --python).*?(?<!\\)$", stages()[stage], re.MULTILINE | re.DOTALL)
        assert installs
        for install in installs:
            assert "--no-deps" in install and set(re.findall(r"\w+\.txt", install)) <= {"heavy.txt", "light.txt"}
    resolved = re.findall(r"^RUN \S+python requirements\.py (.+?) --out", DOCKERFILE, re.MULTILINE)
    assert resolved == ["pyproject.toml constraints.txt"] * 4


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
