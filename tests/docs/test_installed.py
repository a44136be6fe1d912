"""The wheel, installed with `[server]` as a user would: no torch comes with it, and the three commands answer.

Slow, and the package index must be reached: `make test-dist`.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ("fedpeft", "fedpeft-server", "fedpeft-client")
NOT_OURS = {"pip", "setuptools", "pkg_resources", "_distutils_hack"}

pytestmark = pytest.mark.slow


def run(*command: str | Path) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def bin_(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of a fresh environment with the wheel and `[server]`."""
    folder = tmp_path_factory.mktemp("fresh")
    run(sys.executable, "-m", "venv", folder)
    pip = (folder / "bin" / "pip", "install", "--quiet", "--disable-pip-version-check")
    run(*pip, "--constraint", ROOT / "constraints.txt", f"{wheel}[server]")
    return folder / "bin"


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_says_its_version_and_its_help(bin_: Path, wheel: Path, command: str) -> None:
    version = wheel.name.split("-")[1]
    assert run(bin_ / command, "--version").strip() == f"{command} {version}"
    assert "--help" in run(bin_ / command, "--help")


def test_no_torch_came_with_it(bin_: Path) -> None:
    names = {line.split("==")[0].lower() for line in run(bin_ / "pip", "freeze").splitlines()}
    assert not names & {"torch", "torchvision", "timm", "peft", "pyarrow", "pillow", "matplotlib"}


def test_what_it_weighs(bin_: Path) -> None:
    """Prints what weighs most, which `pytest -s` shows; the bound is there so that nobody adds a heavy part unseen."""
    (site,) = (bin_.parent / "lib").glob("python*/site-packages")
    sizes: dict[str, int] = {}
    for path in site.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            top = re.split(r"[/\\-]|\.dist|\.libs", path.relative_to(site).as_posix())[0]
            sizes[top] = sizes.get(top, 0) + path.stat().st_size
    ours = {name: size for name, size in sizes.items() if name not in NOT_OURS}
    for name, size in sorted(ours.items(), key=lambda item: -item[1])[:15]:
        print(f"{size / 1e6:8.1f} MB  {name}")
    print(f"{sum(ours.values()) / 1e6:8.1f} MB  in all, without pip")
    assert sum(ours.values()) < 180e6
