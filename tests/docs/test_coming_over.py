"""The worked examples of docs/from-flower.md and docs/from-openfl.md are done as they stand, FedPEFT's half of them."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from .walkthrough import Walkthrough, blocks

ROOT = Path(__file__).resolve().parents[2]
NETWORK = {"from-flower": "### On machines", "from-openfl": "### On machines"}
"""Headings from which on a page starts servers and clients; what stands before is quick."""

pytestmark = pytest.mark.e2e


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Walkthrough]:
    made = Walkthrough(tmp_path, ROOT)
    yield made
    made.close()


def page(name: str) -> str:
    return (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")


def install(text: str, folder: Path) -> None:
    """Installs the package of a page, as its `pip install` does: modules and entry points on Python's path."""
    files = {block.title: block.text for block in blocks(text) if block.title}
    (place,) = (Path(title).parent for title in files if title.endswith("pyproject.toml"))
    assert f"pip install ./{place}" in text
    project = tomllib.loads(files[f"{place}/pyproject.toml"])
    for file in project["tool"]["hatch"]["build"]["targets"]["wheel"]["include"]:
        folder.mkdir(exist_ok=True)
        (folder / file).write_text(files[f"{place}/{file}"], encoding="utf-8")
    name, version = project["project"]["name"], project["project"]["version"]
    about = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8")
    points = [
        f"[{group}]\n" + "".join(f"{point} = {thing}\n" for point, thing in named.items())
        for group, named in project["project"]["entry-points"].items()
    ]
    (about / "entry_points.txt").write_text("".join(points), encoding="utf-8")


@pytest.mark.parametrize("name", NETWORK)
def test_a_page_does_what_it_says_on_one_machine(name: str, reader: Walkthrough) -> None:
    text = page(name)
    before, heading, _ = text.partition(NETWORK[name])
    assert heading
    install(text, reader.folder / "common")
    assert reader.follow(before) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORK)
def test_a_page_does_what_it_says_to_its_end(name: str, reader: Walkthrough) -> None:
    text = page(name)
    install(text, reader.folder / "common")
    assert reader.follow(text) >= 8
    (exported,) = reader.folder.glob("*.safetensors")
    simulated, real = load_file(reader.folder / "simulated" / "adapter.safetensors"), load_file(exported)
    assert simulated.keys() == real.keys()
    assert all(np.array_equal(simulated[key], real[key]) for key in real), "the page says: the same bits"


@pytest.mark.parametrize("name", NETWORK)
def test_every_command_of_a_page_is_done(name: str) -> None:
    """FedPEFT's commands stand in blocks that are done; those of the other framework in blocks that are not."""
    for block in blocks(page(name)):
        if block.language != "console" and not block.title:
            assert "fedpeft-" not in block.text.replace("fedpeft[", ""), block.text
            assert "$ fedpeft" not in block.text


@pytest.mark.parametrize("name", [*NETWORK, "why"])
def test_commands_and_settings_named_in_a_sentence_are_there(name: str) -> None:
    """Commands are headings of the references, flags stand in their tables, and keys of the run file in its page."""
    commands, settings, run_file = (page(each) for each in ("commands", "settings", "run-file"))
    headings = set(re.findall(r"^#+ `([^`]+)`$", commands + settings, re.M))
    prose = re.sub(r"^```.*?^```$", "", page(name), flags=re.M | re.S)
    for code in re.findall(r"`(fedpeft[^`]*)`", prose):
        words, _, flags = code.partition(" --")
        command = re.sub(r"( [A-Z]+)+$", "", words)
        assert command in headings, code
        where = settings if command in ("fedpeft-server", "fedpeft-client") else commands
        assert all(f"`{flag}" in where for flag in re.findall(r"--[a-z-]+", f"--{flags}" if flags else "")), code
    for section, keys in re.findall(r"`\[(?!tool)([\w.]+)\] ?(\w*)", prose):
        part = run_file.partition(f"## `[{section}]`")[2].partition("\n## ")[0]
        assert part, section
        assert not keys or f"`{keys}`" in part, (section, keys)
