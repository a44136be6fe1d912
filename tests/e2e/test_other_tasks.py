"""The worked example of docs/extending.md: a text classifier, installed as a package, in a real federation."""

from __future__ import annotations

import os
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import fedpeft
from fedpeft.models.tasks import tasks
from fedpeft.simulation import clients_of, simulate

from ..outside_package import looked_up_anew
from ..ports import free_port
from .conftest import WAIT_S, Process, wait_for

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"^```\w+\n# (\S+)\n(.*?)^```$", PAGE, re.M | re.S))
CLASSES = {
    "prose": sorted((ROOT / "docs").glob("*.md")),
    "protocol": sorted((ROOT / "protos" / "fedpeft" / "v1").glob("*.proto")),
    "python": [Path(sysconfig.get_path("stdlib"), name) for name in ("ast.py", "enum.py", "pathlib.py", "typing.py")],
}
SITES = ("library", "workshop", "held-out")


def write_sites(folder: Path) -> None:
    """Deals each class's text out to the sites in turns of 4 KiB: real text, and nobody has another's."""
    for name, files in CLASSES.items():
        text = b"".join(file.read_bytes() for file in files)[: 3 * 12 * 1024]
        for k, site in enumerate(SITES):
            place = folder / site / name if site == "held-out" else folder / "texts" / site / name
            place.mkdir(parents=True)
            turns = [text[at : at + 4096] for at in range(k * 4096, len(text), 4096 * len(SITES))]
            (place / "text").write_bytes(b"".join(turns))


def install(folder: Path) -> None:
    """Puts the package where Python looks, as pip leaves it: the module, and what its project says of itself."""
    about = folder / "fedpeft_text-1.0.dist-info"
    about.mkdir(parents=True)
    (folder / "fedpeft_text.py").write_text(BLOCKS["fedpeft_text.py"], encoding="utf-8")
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: fedpeft-text\nVersion: 1.0\n")
    (point,) = re.findall(r'^\[project\.entry-points\."(.+)"\]\n(.+) = "(.+)"$', BLOCKS["pyproject.toml"], re.M)
    (about / "entry_points.txt").write_text("[{}]\n{} = {}\n".format(*point))


class World:
    """A daemon, and processes with or without the package."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.started: list[Process] = []
        install(folder / "packages")
        write_sites(folder)
        (folder / "run.toml").write_text(BLOCKS["run.toml"], encoding="utf-8")
        flags = ["--data-dir", str(folder / "server"), "--listen", f"127.0.0.1:{self.port}", "--metrics", ""]
        server = self._start("fedpeft_server", "server", *flags)
        wait_for(lambda: server.events("serving") or server.process.poll() is not None, "the daemon")

    def _start(self, module: str, name: str, *flags: str) -> Process:
        self.started.append(Process(module, self.folder / f"{name}.log", *flags))
        return self.started[-1]

    def client(self, name: str, data: str, *flags: str) -> Process:
        where = ["--server", f"127.0.0.1:{self.port}", "--name", name, "--data", data, "--threads", "1", "--once"]
        return self._start("fedpeft_client", name, *where, "--state-dir", str(self.folder / f"state-{name}"), *flags)

    def text_client(self, name: str, *flags: str) -> Process:
        place = self.folder if "--evaluate" in flags else self.folder / "texts"
        return self.client(name, f"text:{place / name}", *flags)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    for process in made.started:
        process.kill()


def ended(process: Process, code: int) -> None:
    assert process.process.wait(WAIT_S) == code, process.log.read_text()[-3000:]


@pytest.mark.usefixtures("preloaded")
def test_a_text_classifier_learns_in_a_federation(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(world.folder / "packages"))
    path = [str(world.folder / "packages"), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    with looked_up_anew(tasks):
        clients = [
            world.text_client("held-out", "--evaluate"),
            world.text_client("library"),
            world.text_client("workshop"),
        ]
        run = fedpeft.connect(f"127.0.0.1:{world.port}").create(world.folder / "run.toml")
        for client in clients:
            ended(client, 0)

        run.refresh()
        assert run.state == "completed"
        assert [sorted(each.clients) for each in run.rounds] == [["library", "workshop"]] * 3
        last = run.rounds[-1].metrics
        assert last["accuracy"] > 0.8 > 0.5 > run.initial_metrics["accuracy"], run.rounds
        assert last["accuracy/python"] > 0.5
        assert run.to_dict()["rounds"][-1]["tickets"][0]["metrics"]["images_per_second"] > 0

        config = fedpeft.load_run_file(world.folder / "run.toml")
        sites, _ = clients_of(Path(f"text:{world.folder / 'texts'}"), config)
        alone = simulate(config, sites, world.folder / "out", evaluate=world.folder / "held-out")
        assert alone["rounds"][-1]["metrics"]["accuracy"] == last["accuracy"]
        here, there = run.adapter(), load_file(world.folder / "out" / "adapter.safetensors")
        assert all(np.array_equal(here[name], there[name]) for name in here | there), "the same bits in one process"
        assert set(run.load().state()) == set(here)
