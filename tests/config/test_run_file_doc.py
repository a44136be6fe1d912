"""The claims of docs/run-file.md are true: its example is valid, and spoiling it gives the error shown."""

import re
from pathlib import Path

import pytest

from fedpeft.aggregation import strategies
from fedpeft.algorithms import algorithms
from fedpeft.config import load_run_file
from fedpeft.errors import ConfigInvalid
from fedpeft.registry import Registry

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "run-file.md").read_text(encoding="utf-8")
EXAMPLE = re.findall(r"^```toml\n(.*?)^```$", PAGE, re.M | re.S)[0]
ERROR = re.findall(r"^```\n(.*?)\n```$", PAGE, re.M | re.S)[0]


def test_the_example_is_valid(tmp_path: Path) -> None:
    file = tmp_path / "emoji.toml"
    file.write_text(EXAMPLE, encoding="utf-8")
    config = load_run_file(file)
    assert (config.rounds.quorum, config.codec.encoding) == (4, "sparse+float32")


@pytest.mark.parametrize(("heading", "registry"), [("Local algorithms", algorithms), ("Strategies", strategies)])
def test_every_part_has_its_line(heading: str, registry: Registry[type]) -> None:
    section = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    built_in = {name for name in registry.names() if registry.get(name).__module__.startswith("fedpeft.")}
    assert built_in - set(re.findall(r"`(\w+)`", section)) == set()


def test_the_error_is_real(tmp_path: Path) -> None:
    file = tmp_path / "emoji.toml"
    file.write_text(EXAMPLE.replace("quorum = 4", "quorum = 9"), encoding="utf-8")
    with pytest.raises(ConfigInvalid) as caught:
        load_run_file(file)
    assert str(caught.value).replace(f"{tmp_path}/", "") == ERROR
