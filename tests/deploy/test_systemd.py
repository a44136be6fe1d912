"""The systemd units: systemd itself finds no fault in them, and what they forbid is not needed."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import ROOT

UNITS = ROOT / "deploy" / "systemd"
EXPOSURE = 20
"""Highest figure of `systemd-analyze security`, times ten; it calls less than 2.5 OK, and no unit at all 9.6."""
PR_SET_MDWE = 65
"""The kernel call that MemoryDenyWriteExecute makes, since Linux 6.3."""


@pytest.fixture
def analyze(tmp_path: Path) -> Path:
    """The units as they would be installed, with the commands of this environment."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed: apt-get install systemd")
    for unit in UNITS.glob("*.service"):
        text = unit.read_text().replace("/opt/fedpeft/bin", str(Path(sys.executable).parent))
        (tmp_path / unit.name.replace("@", "@site")).write_text(text)
    return tmp_path


def test_systemd_takes_the_units(analyze: Path) -> None:
    units = sorted(str(unit) for unit in analyze.glob("*.service"))
    assert len(units) == 2
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", *units], capture_output=True, text=True, timeout=60)
    said = [line for line in done.stderr.splitlines() if "fedpeft" in line]
    assert done.returncode == 0 and not said, done.stderr


@pytest.mark.parametrize("name", ["fedpeft-server.service", "fedpeft-client@site.service"])
def test_little_is_exposed(analyze: Path, name: str) -> None:
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager", f"--threshold={EXPOSURE}"]
    done = subprocess.run([*command, str(analyze / name)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "Overall exposure level" in done.stdout, done.stdout + done.stderr


def test_the_server_writes_no_memory_that_it_executes(tmp_path: Path) -> None:
    libc = ctypes.CDLL(None)
    probe = f"import ctypes, sys; sys.exit(ctypes.CDLL(None).prctl({PR_SET_MDWE}, 1, 0, 0, 0) != 0)"
    if subprocess.run([sys.executable, "-c", probe], timeout=30).returncode:
        pytest.skip("this kernel cannot forbid writable executable memory: Linux 6.3 or newer is needed")
    assert "MemoryDenyWriteExecute=yes" in (UNITS / "fedpeft-server.service").read_text()
    command = [sys.executable, "-m", "fedpeft_server", "--data-dir", str(tmp_path / "data"), "--log-format", "json"]
    server = subprocess.Popen(
        [*command, "--listen", "127.0.0.1:0", "--metrics", ""],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: libc.prctl(PR_SET_MDWE, 1, 0, 0, 0),
    )
    assert server.stderr is not None
    try:
        first = server.stderr.readline()
        assert '"event": "serving"' in first, first
        server.terminate()
        assert server.wait(60) == 0
    finally:
        server.kill()
        server.wait()
        server.stderr.close()
