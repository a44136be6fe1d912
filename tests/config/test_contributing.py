"""The worked examples of CONTRIBUTING.md work: each file, put where the page says, is found and passes its test."""

import re
from pathlib import Path

import pytest

from ..programs import run_program

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "CONTRIBUTING.md"
BLOCKS = dict(re.findall(r"^```python\n# (\S+)\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S))
FILES = sorted(path for path in BLOCKS if path.startswith("common/"))

RUN_PYTEST = """
import os, sys, pytest

os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # one of the others is imported already, and cannot be rewritten
sys.exit(pytest.main(sys.argv[1:]))
"""
CONFTEST = """
import importlib

from hypothesis import HealthCheck, settings

settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")
package = importlib.import_module({package!r})
package.__path__.append({folder!r})  # as if the new file lay in the package
"""


def test_every_kind_of_extension_has_an_example() -> None:
    assert [path.split("/")[2] for path in FILES] == ["aggregation", "algorithms", "codecs", "peft"]


@pytest.mark.parametrize("path", FILES)
def test_example(path: str, tmp_path: Path) -> None:
    """Runs in a process of its own: what registers itself here must not be seen by other tests."""
    package = Path(path).parent.relative_to("common")
    folder = tmp_path / "new"
    folder.mkdir()
    (folder / Path(path).name).write_text(BLOCKS[path], encoding="utf-8")
    (tmp_path / "conftest.py").write_text(
        CONFTEST.format(package=".".join(package.parts), folder=str(folder)), encoding="utf-8"
    )
    test = BLOCKS[f"tests/{package.name}/test_{Path(path).name}"]
    (tmp_path / "test_example.py").write_text(test, encoding="utf-8")
    plugins = ["-p", "no:cacheprovider", "-p", "pytest_asyncio.plugin", "-p", "pytest_timeout"]
    flags = ["-q", *plugins, "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(tmp_path)]
    done = run_program(tmp_path, RUN_PYTEST, *flags, str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
