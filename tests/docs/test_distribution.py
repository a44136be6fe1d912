"""Contents of a release: all that runs, its licences, and nothing that is only for developers."""

import email
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from pathlib import Path

import pytest
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {
    "fedpeft": ROOT / "common" / "fedpeft",
    "fedpeft_server": ROOT / "server" / "fedpeft_server",
    "fedpeft_client": ROOT / "client" / "fedpeft_client",
    "fedpeft_operator": ROOT / "operator" / "fedpeft_operator",
}
GENERATED = ("tensor", "run", "federation_service", "operator_service")

pytestmark = pytest.mark.xdist_group("dist")  # what they look at is made once


@pytest.fixture(scope="session")
def in_wheel(wheel: Path) -> list[str]:
    return zipfile.ZipFile(wheel).namelist()


@pytest.fixture(scope="session")
def in_sdist(sdist: Path) -> list[str]:
    """Paths in the sdist, without the folder that all of them are in."""
    with tarfile.open(sdist) as archive:
        return [m.name.partition("/")[2] for m in archive.getmembers() if m.isfile()]


@pytest.fixture(scope="session")
def metadata(wheel: Path, in_wheel: list[str]) -> Message:
    (path,) = [name for name in in_wheel if name.endswith(".dist-info/METADATA")]
    return email.message_from_bytes(zipfile.ZipFile(wheel).read(path))


def tracked(folder: Path) -> list[str]:
    """Files of a package in this checkout, relative to the package's parent; build and cache leavings excepted."""
    files = (p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    return [p.relative_to(folder.parent).as_posix() for p in files]


def test_the_wheel_has_every_file_of_the_three_packages(in_wheel: list[str]) -> None:
    for folder in PACKAGES.values():
        assert set(tracked(folder)) <= set(in_wheel)


def test_what_is_no_python_module_is_there_too(in_wheel: list[str]) -> None:
    for package in PACKAGES:
        assert f"{package}/py.typed" in in_wheel
    for name in GENERATED:
        assert {f"fedpeft/v1/{name}_pb2.py", f"fedpeft/v1/{name}_pb2.pyi"} <= set(in_wheel)
    migrations = [n for n in in_wheel if n.startswith("fedpeft_server/store/migrations/versions/0")]
    assert len(migrations) >= 2


def test_the_wheel_has_nothing_else(in_wheel: list[str]) -> None:
    tops = {name.split("/")[0] for name in in_wheel}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(PACKAGES)
    assert not [name for name in in_wheel if "__pycache__" in name or name.endswith((".parquet", ".safetensors"))]


def test_the_sdist_builds_the_wheel_and_has_no_tests_and_no_data(in_sdist: list[str]) -> None:
    tops = {name.split("/")[0] for name in in_sdist}
    extra = {"PKG-INFO", "LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml", ".gitignore"}
    assert tops == {"protos", "common", "server", "client", "operator", *extra}
    assert not [name for name in in_sdist if name.endswith((".parquet", ".safetensors", ".pyc"))]


def test_licences_lie_beside_what_they_are_for(metadata: Message, in_wheel: list[str]) -> None:
    named = set(metadata.get_all("License-File", []))
    vendored = {path.relative_to(ROOT).as_posix() for path in PACKAGES["fedpeft_operator"].glob("**/vendor/*/LICENSE")}
    assert named == {"LICENSE", *vendored}
    assert all(any(path.endswith(f".dist-info/licenses/{name}") for path in in_wheel) for name in named)
    assert metadata["License-Expression"].startswith("Apache-2.0 AND")


def test_the_console_comes_with_its_pages(in_wheel: list[str]) -> None:
    for folder, kind in (("templates", ".html"), ("static", ".css"), ("static/vendor", ".js")):
        assert [n for n in in_wheel if n.startswith(f"fedpeft_operator/console/{folder}/") and n.endswith(kind)], folder


def test_the_version_is_one_that_pip_can_order(metadata: Message, sdist: Path) -> None:
    version = Version(metadata["Version"])
    assert version >= Version("0.1.0.dev0")
    assert sdist.name == f"fedpeft-{version}.tar.gz"


def test_extras_and_commands_are_those_promised(metadata: Message, wheel: Path, in_wheel: list[str]) -> None:
    assert {"server", "client", "train", "demo", "postgres"} <= set(metadata.get_all("Provides-Extra", []))
    (path,) = [name for name in in_wheel if name.endswith(".dist-info/entry_points.txt")]
    text = zipfile.ZipFile(wheel).read(path).decode()
    assert all(f"{command} = " in text for command in ("fedpeft", "fedpeft-server", "fedpeft-client"))


def test_torch_comes_with_training_only(metadata: Message) -> None:
    lines = [line for line in metadata.get_all("Requires-Dist", []) if line.startswith(("torch", "timm", "peft"))]
    extras = {line.partition("extra == ")[2].strip("'") for line in lines}
    assert extras == {"train", "client", "demo", "ray", "study", "dev"}


def test_pypi_would_take_both(wheel: Path, sdist: Path) -> None:
    command = [sys.executable, "-m", "twine", "check", "--strict", str(wheel), str(sdist)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
