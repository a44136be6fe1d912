"""Walks what docs/errors.md says of bad input on this machine: each row is done, and really prints that sentence."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from PIL import Image
from pydantic import BaseModel

from fedpeft.adapters.payload import Manifest
from fedpeft.api.operator_client import OperatorClient
from fedpeft.config import ModelConfig, RunConfig, TrainingConfig, load_run_file, parse_config
from fedpeft.data.dataset import open_dataset
from fedpeft.data.sources.opening import open_source
from fedpeft.data.transforms import Preprocessing
from fedpeft.errors import ConfigInvalid, LocalError, SettingsInvalid, tree
from fedpeft.identity import audit, keys
from fedpeft.identity import folder as identity_folder
from fedpeft.identity.authority import Authority
from fedpeft.identity.subject import Role, Subject
from fedpeft.identity.token import EnrollmentToken
from fedpeft.models.backbones import build, fingerprint
from fedpeft.models.tasks import task_of
from fedpeft.peft import tune
from fedpeft.process import locks
from fedpeft.rounds.local_job import LocalJob, Version
from fedpeft.training.local_budget import LocalBudget
from fedpeft.training.loop import train
from fedpeft.v1 import federation_service_pb2 as pb
from fedpeft.v1 import run_pb2
from fedpeft_client.eligibility.rules import reasons_against_ticket
from fedpeft_client.owner.policy import Policy
from fedpeft_client.settings import Settings as ClientSettings
from fedpeft_client.state.runs import KnownRun
from fedpeft_client.state.state_dir import StateDirectory
from fedpeft_operator.cli.run.export import Format, exported
from fedpeft_operator.cli.session import Session
from fedpeft_server import app
from fedpeft_server.settings import Settings as ServerSettings
from fedpeft_server.timing import TIMING

from ..conftest import mounted_mib
from ..ports import free_port
from ..run_files import TINY_MODEL
from .conftest import Process, wait_for, write_site

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("preloaded")]

PAGE = (Path(__file__).parents[2] / "docs" / "errors.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| (.+?) \| `(.+)` \| (\d) \|$", PAGE.partition("## What bad input gets")[2], re.M)
LOCAL = set(re.findall(r"^\| `([A-Z_]+)` \|", PAGE.partition("## On this machine only")[2], re.M))

RUN_FILE = f"""
{TINY_MODEL}
[peft]
method = "bias"
[rounds]
count = 1
clients = 2
[training]
steps = 2
batch_size = 4
"""


class World:
    """A daemon with two runs: one that fits the data here, one whose backbone is another."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = write_site(folder / "site" / "data.parquet", 0)
        self.port = free_port()
        self.run_file = folder / "run.toml"
        self.run_file.write_text(RUN_FILE)
        flags = ["--data-dir", str(folder / "server"), "--listen", f"127.0.0.1:{self.port}", "--metrics", ""]
        self.daemon = Process("fedpeft_server", folder / "server.log", *flags)
        wait_for(lambda: self.daemon.events("serving") or self.daemon.process.poll() is not None, "the daemon")
        self.run, self.other_run = asyncio.run(self._create())

    async def _create(self) -> tuple[str, str]:
        config = load_run_file(self.run_file)
        backbone = build(config.model, 0)
        tuned = tune(backbone, config.peft.method, config.peft.options, 0)
        async with OperatorClient(f"127.0.0.1:{self.port}") as server:
            made = [
                await server.create_run(config, tuned.spec, proof, tuned.state(), 1000)
                for proof in (fingerprint(backbone, tuned.spec), "ab" * 32)
            ]
        return made[0].id, made[1].id

    def command(self, module: str, *flags: object, **variables: str) -> tuple[int, str]:
        """Runs a command to its end; returns its exit code and what it wrote for people."""
        done = subprocess.run(
            [sys.executable, "-m", module, *map(str, flags)],
            capture_output=True,
            text=True,
            timeout=150,
            cwd=self.folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "1000", "NO_COLOR": "1", **variables},
        )
        return done.returncode, done.stderr

    def server(self, *flags: object, data: object = "fresh", **variables: str) -> tuple[int, str]:
        given = ["--metrics", ""] if "--metrics" not in flags else []
        given += ["--listen", f"127.0.0.1:{free_port()}"] if "--listen" not in flags else []
        return self.command("fedpeft_server", "--data-dir", self.folder / str(data), *given, *flags, **variables)

    def client(self, *flags: object, name: str = "probe", data: object = None) -> tuple[int, str]:
        where = ["--server", f"127.0.0.1:{self.port}"] if "--server" not in flags else []
        state = ["--state-dir", self.folder / f"state-{name}"] if "--state-dir" not in flags else []
        what = ["--name", name, "--data", data or self.data, "--device", "cpu", "--threads", "1", "--dry-run"]
        run = ["--run", self.run] if "--run" not in flags else []
        return self.command("fedpeft_client", *where, *state, *what, *run, *flags)

    def fedpeft(self, *arguments: object) -> tuple[int, str]:
        return self.command("fedpeft_operator.app", "--server", f"127.0.0.1:{self.port}", *arguments)

    def check(self, *changes: tuple[str, str]) -> tuple[int, str]:
        """Checks the run file with some of its text replaced."""
        text = RUN_FILE
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        (self.folder / "wrong.toml").write_text(text)
        return self.fedpeft("run", "create", "wrong.toml", "--check")

    def created(self, old: str, new: str) -> tuple[int, str]:
        """Creates a run from the run file with some of its text replaced."""
        (self.folder / "wrong.toml").write_text(RUN_FILE.replace(old, new))
        return self.fedpeft("run", "create", "wrong.toml")

    def simulated(self, data: Path, old: str = "steps", new: str = "steps") -> tuple[int, str]:
        simulation = '\n[simulation]\nclients = 2\npartition = "iid"\n'
        text = RUN_FILE.replace(old, new).replace('"bias"', '"full"')
        (self.folder / "simulation.toml").write_text(text + simulation)
        shutil.rmtree(self.folder / "simulated", ignore_errors=True)
        return self.fedpeft("simulate", "simulation.toml", "--data", data, "--out", "simulated")

    def second_simulation(self) -> tuple[int, str]:
        """Simulates into a folder that this process holds, as a simulation does."""
        self.simulated(self.images(2))  # leaves the run file, and ends at the images before it trains
        out = self.folder / "out"
        out.mkdir()
        with locks.results(out, "simulation"):
            return self.fedpeft("simulate", "simulation.toml", "--data", self.images(0), "--out", out)

    def images(self, broken: int) -> Path:
        """Writes 20 images as class folders, some of which are none."""
        root = self.folder / f"images-{broken}"
        if not root.exists():
            generator = np.random.default_rng(0)
            for number in range(20):
                path = root / ("cat", "dog")[number % 2] / f"{number:02}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(generator.integers(0, 256, (32, 32, 3), np.uint8)).save(path)
                if number < broken:
                    path.write_bytes(b"no image")
        return root

    def foxes(self) -> Path:
        """Writes images of a class that the run has not."""
        root = self.folder / "foxes"
        shutil.copytree(self.images(0), root)
        (root / "dog").rename(root / "fox")
        return root

    def empty(self) -> Path:
        (self.folder / "empty").mkdir(exist_ok=True)
        return self.folder / "empty"

    def file(self, name: str, data: bytes | str) -> Path:
        path = self.folder / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
        return path

    def corrupt_blob(self) -> tuple[int, str]:
        (blob,) = (self.folder / "server" / "blobs").rglob(f"{self.other_run}/versions/*.safetensors")
        kept = blob.read_bytes()
        blob.write_bytes(kept[:-1] + b"\x01")
        try:
            return self.fedpeft("run", "export", self.other_run, "--out", "adapter.safetensors")
        finally:
            blob.write_bytes(kept)

    def full_disk(self) -> tuple[int, str]:
        with mounted_mib(self.folder / "small") as disk:
            ballast = disk / "ballast"
            with ballast.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
                while True:
                    file.write(bytes(4096))
            try:
                return self.server(data="small/data")
            finally:
                ballast.unlink()

    @contextmanager
    def waiting_client(self) -> Iterator[None]:
        """Runs a client that waits for another one."""
        where = [
            "--server",
            f"127.0.0.1:{self.port}",
            "--run",
            self.run,
            "--state-dir",
            str(self.folder / "state-held"),
        ]
        what = ["--name", "held", "--data", str(self.data), "--device", "cpu", "--threads", "1"]
        before = len(self.registered("held"))
        client = Process("fedpeft_client", self.folder / "held.log", *where, *what)
        try:
            wait_for(lambda: len(self.registered("held")) > before, "the client to register")
            yield
        finally:
            client.kill()

    def registered(self, name: str) -> list[dict[str, Any]]:
        return [line for line in self.daemon.events("client registered") if line["client"] == name]

    def token(self) -> str:
        """Returns a token of a server that is not there."""
        address = f"127.0.0.1:{free_port()}"
        return EnrollmentToken.make(address, address, Authority.make("nowhere").certificate).encode()

    def enroll(self, token: str) -> tuple[int, str]:
        where = self.file("token", token)
        return self.command("fedpeft_client", "enroll", f"@{where}", "--state-dir", self.folder / "state-token")

    def enrolled(self, *flags: object, life: timedelta = timedelta(1), mode: int = 0o600) -> tuple[int, str]:
        """Starts a client that was enrolled, though with no server that is there."""
        state = Path(tempfile.mkdtemp(dir=self.folder))
        key, authority = identity_folder.take_key(state / "identity"), Authority.make("nowhere")
        certificate = authority.issue(Subject(Role.CLIENT, "site-a"), key.public_key(), life)
        identity_folder.write(state / "identity", "127.0.0.1:1", [authority.certificate], [certificate])
        identity_folder.key_path(state / "identity").chmod(mode)
        return self.command("fedpeft_client", "--state-dir", state, "--data", self.data, "--dry-run", *flags)

    def second_client(self, *flags: object, name: str) -> tuple[int, str]:
        with self.waiting_client():
            return self.client(*flags, name=name)


Ended = tuple[int, str]
DONE: dict[str, Callable[[World], Ended]] = {
    "a flag of `fedpeft-server`": lambda w: w.server("--max-transfers", 0),
    "a flag of `fedpeft-server` that there is not": lambda w: w.server("--max-transfer", 1),
    "a command of `fedpeft-server` that there is not": lambda w: w.command("fedpeft_server", "chek"),
    "an address beyond this machine": lambda w: w.server("--listen", "0.0.0.0:7070"),
    "a settings file": lambda w: w.server("--config", w.file("server.toml", "max_client = 3\n")),
    "a flag of `fedpeft-client`": lambda w: w.client("--threads", 0),
    "a flag of `fedpeft`": lambda w: w.command("fedpeft_operator.app", "--server", "nowhere", "run", "list"),
    "a TOML field": lambda w: w.check(("count = 1", "count = 0")),
    "a TOML key that there is not": lambda w: w.check(("count = 1", "count = 1\nround = 3")),
    "a run file that is not TOML": lambda w: w.check(("[rounds]", "[rounds")),
    "a strategy that there is not": lambda w: w.check(("[rounds]", '[aggregation]\nstrategy = "fedsum"\n[rounds]')),
    "a PEFT method that there is not": lambda w: w.created('"bias"', '"biases"'),
    "a model that timm has not": lambda w: w.created("vit_tiny_patch16_224", "vit_tiny_patch61_224"),
    "a weights file that is none": lambda w: w.created('"none"', f'"{w.file("weights.safetensors", "no weights")}"'),
    "no data set": lambda w: w.client(data=w.folder / "nowhere"),
    "an empty data set": lambda w: w.client(data=w.empty()),
    "a data set of another kind": lambda w: w.client(data=w.file("notes.parquet", "not parquet")),
    "an unknown class": lambda w: w.client(data=w.foxes()),
    "over 1 % unreadable images": lambda w: w.simulated(w.images(2)),
    "a second simulation in a folder": World.second_simulation,
    "a wrong backbone": lambda w: w.client("--run", w.other_run),
    "a loss that is not finite": lambda w: w.simulated(w.images(0), "steps = 2", "steps = 20\nlearning_rate = 100.0"),
    "a token that was cut short": lambda w: w.enroll(w.token()[:-9]),
    "a token of a server that is not there": lambda w: w.enroll(w.token()),
    "a key that others can read": lambda w: w.enrolled(mode=0o644),
    "another name than the certificate's": lambda w: w.enrolled("--name", "other"),
    "a certificate that has ended": lambda w: w.enrolled(life=timedelta(minutes=-5)),
    "plain text to another machine": lambda w: w.command(
        "fedpeft_operator.app", "--server", "fed.invalid:7070", "run", "list"
    ),
    "no server": lambda w: w.command("fedpeft_operator.app", "--server", f"127.0.0.1:{free_port()}", "run", "list"),
    "a run that there is not": lambda w: w.fedpeft("run", "show", "run-none"),
    "a port in use": lambda w: w.server("--listen", f"127.0.0.1:{w.port}"),
    "a metrics port in use": lambda w: w.server("--metrics", f"127.0.0.1:{w.port}"),
    "a data directory that cannot be written": lambda w: w.server(data="/proc/nowhere"),
    "a full disk": World.full_disk,
    "a corrupt database": lambda w: w.server(data=w.file("torn/fedpeft.db", b"no database" * 999).parent),
    "a corrupt blob": World.corrupt_blob,
    "a place that is no URL": lambda w: w.server("--blobs", "s3:/bkt"),
    "an endpoint without its scheme": lambda w: w.server("--blobs", "s3://bkt/v", AWS_ENDPOINT="127.0.0.1:9000"),
    "a database in memory": lambda w: w.server("--database", "sqlite://"),
    "a port of a database that is no number": lambda w: w.server("--database", "postgresql://user:se@c:ret@host/name"),
    "a second server on a SQLite database": lambda w: w.server("--database", f"sqlite:///{w.folder}/server/fedpeft.db"),
    "a second server on a data directory": lambda w: w.server(data="server"),
    "a state directory that cannot be written": lambda w: w.client("--state-dir", "/proc/nowhere"),
    "a second client on a state directory": lambda w: w.second_client(
        "--state-dir", w.folder / "state-held", name="other"
    ),
    "a second client with an id": lambda w: w.second_client("--state-dir", w.folder / "state-2", name="held"),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = World(tmp_path_factory.mktemp("world"))
    yield made
    made.daemon.kill()


def fits(printed: str, sentence: str) -> bool:
    """Says whether a sentence of the page, shortened with ellipses, is one of the lines that were printed."""
    pattern = ".*".join(re.escape(part) for part in sentence.split("…"))
    return any(re.fullmatch(pattern, line.strip()) for line in printed.splitlines())


def test_every_row_of_the_page_is_done_here() -> None:
    assert sorted(what for what, _, _ in ROWS) == sorted(DONE)


@pytest.mark.parametrize(("what", "sentence", "code"), ROWS, ids=[what for what, _, _ in ROWS])
def test_bad_input_gets_the_sentence_and_the_exit_code_of_the_page(
    world: World, what: str, sentence: str, code: str
) -> None:
    ended, printed = DONE[what](world)
    assert fits(printed, sentence), printed
    assert ended == int(code)
    assert "Traceback" not in printed


def diverging(world: World) -> object:
    backbone = build(load_run_file(world.run_file).model, 0)
    tuned = tune(backbone, "full", {}, 0)
    dataset = open_dataset(world.images(0), ("cat", "dog"), Preprocessing.of(backbone))
    settings = TrainingConfig(steps=20, batch_size=8, learning_rate=100.0)
    return train(task_of(""), tuned, dataset, settings, seed=0, number=1)


def without_budget(world: World) -> object:
    """Has so little noise that the first update would spend more than there is."""
    privacy = {"mechanism": "local", "clip_norm": 1.0, "noise_multiplier": 1.0, "target_epsilon": 4.0, "delta": 1e-5}
    config = parse_config({**load_run_file(world.run_file).model_dump(exclude_none=True), "privacy": privacy})
    job = LocalJob("a", 1, 7, config.training, Version(Manifest((), 0, b""), Path("none")))
    return LocalBudget.of(config, job, 100)


def unreadable(world: World) -> object:
    backbone = build(load_run_file(world.run_file).model, 0)
    dataset = open_dataset(world.images(2), ("cat", "dog"), Preprocessing.of(backbone))
    return train(task_of(""), tune(backbone, "bias", {}, 0), dataset, TrainingConfig(batch_size=8), seed=0, number=1)


def exported_with_another_backbone(world: World) -> object:
    session = Session(f"127.0.0.1:{world.port}")
    return asyncio.run(exported(session, world.other_run, world.folder / "whole", Format.TIMM))


def against_the_policy(world: World) -> object:
    """Is offered a run whose method its owner does not allow, as a client with that policy is."""

    async def offered() -> run_pb2.Run:
        async with OperatorClient(f"127.0.0.1:{world.port}") as server:
            return (await server.run(world.run))[0]

    run = asyncio.run(offered())
    task = pb.TrainingTask(round=1, settings=run.config.training)
    rules = Policy.model_validate({"peft": {"methods": ["lora"]}})
    (reason,) = reasons_against_ticket(rules, KnownRun.of(run), task, 20, 0)
    raise reason.error


def served(world: World, **settings: object) -> object:
    given = {"data_dir": world.folder / "fresh", "listen": f"127.0.0.1:{world.port}", "metrics": "", **settings}
    return asyncio.run(app.run(ServerSettings.model_validate(given), TIMING))


def held_twice(world: World) -> object:
    with StateDirectory(world.folder / "held-twice") as directory:
        return StateDirectory(directory.path)


CALLS: dict[str, tuple[Callable[[World], object], ...]] = {
    "SETTINGS_INVALID": (
        lambda w: ServerSettings.read(["--data-dir", "d", "--max-transfers", "0"]),
        lambda w: ClientSettings.read(["--threads", "0"]),
        lambda w: served(w),
    ),
    "DATA_INVALID": (
        lambda w: open_source(w.folder / "nowhere"),
        lambda w: open_source(w.empty()),
        lambda w: open_dataset(w.images(0), ("cat", "emu"), Preprocessing(32, (0.5,) * 3, (0.5,) * 3)),
        unreadable,
    ),
    "MODEL_INVALID": (lambda w: build(ModelConfig(name="vit_nowhere", classes=("cat", "dog")), 0),),
    "BACKBONE_MISMATCH": (exported_with_another_backbone,),
    "STATE_INVALID": (
        held_twice,
        lambda w: served(w, data_dir=w.folder / "server", listen=f"127.0.0.1:{free_port()}"),
        lambda w: served(w, data_dir=w.file("torn2/fedpeft.db", b"no database" * 999).parent),
    ),
    "IDENTITY_INVALID": (
        lambda w: EnrollmentToken.decode("fedpeft1.cut.short"),
        lambda w: keys.load(w.file("open.pem", keys.to_pem(keys.make()))),
    ),
    "TRAINING_FAILED": (diverging,),
    "BUDGET_EXHAUSTED": (without_budget,),
    "REFUSED_BY_POLICY": (against_the_policy,),
    "AUDIT_BROKEN": (
        lambda w: audit.of_line("{}", "line 1"),
        lambda w: audit.verify([replace(audit.entry(None, 1.0, "server", "a", "", {}), action="b")]),
    ),
}


def test_every_local_reason_has_a_provocation() -> None:
    assert CALLS.keys() == LOCAL, "docs/errors.md and the provocations here differ"


@pytest.mark.parametrize("reason", sorted(LOCAL))
def test_what_the_page_lists_really_happens_here(world: World, reason: str) -> None:
    (cls,) = [each for each in tree(LocalError) if each.reason == reason]
    for call in CALLS[reason]:
        with pytest.raises(cls) as caught:
            call(world)
        assert type(caught.value) is cls
        assert len(caught.value.message.split()) > 4, "a sentence says what, where, and what would be right"


def _section(annotation: Any) -> type[BaseModel]:
    """Returns the model of a section, which may be optional."""
    return next(
        each for each in (annotation, *get_args(annotation)) if isinstance(each, type) and each is not type(None)
    )


FIELDS = [
    (section, field)
    for section, model in RunConfig.model_fields.items()
    for field in ([""] if section == "name" else _section(model.annotation).model_fields)
    if field != "options"  # whatever stands beside the fields of [peft] and [aggregation]
]


@pytest.mark.parametrize(("section", "field"), FIELDS, ids=[".".join(filter(None, f)) for f in FIELDS])
def test_every_field_of_a_run_file_is_named_with_its_line(tmp_path: Path, section: str, field: str) -> None:
    lines = ["", *RUN_FILE.strip().splitlines()]
    wrong = f"{field or section} = {{ wrong = 1 }}"
    if not field:
        number = 0
        lines[0] = wrong
    else:
        lines += [] if f"[{section}]" in lines else [f"[{section}]"]
        end = next(
            (n for n, text in enumerate(lines) if n > lines.index(f"[{section}]") and text[0] == "["), len(lines)
        )
        present = [n for n in range(lines.index(f"[{section}]"), end) if lines[n].startswith(f"{field} =")]
        number = present[0] if present else lines.index(f"[{section}]") + 1
        lines[number : number + len(present)] = [wrong]
    file = tmp_path / "run.toml"
    file.write_text("\n".join(lines))
    with pytest.raises(ConfigInvalid) as caught:
        load_run_file(file)
    path = f"{section}.{field}" if field else section
    assert f"{file}:{number + 1}: {path}" in caught.value.message


FREE = {"data_dir", "blobs", "updates", "data", "state_dir", "identity", "policy", "weights", "label_map"}
FREE |= {"image_column", "label_column", "relay_identity"}
"""Settings that any text may be the value of; what it names is looked for later."""


@pytest.mark.parametrize("field", sorted(ServerSettings.model_fields.keys() - FREE))
def test_every_flag_of_the_server_is_named(field: str) -> None:
    flag = "--" + field.replace("_", "-")
    with pytest.raises(SettingsInvalid, match=flag):
        ServerSettings.read(["--data-dir", "d", f"{flag}=no way"])


@pytest.mark.parametrize("field", sorted(ClientSettings.model_fields.keys() - FREE))
def test_every_flag_of_the_client_is_named(field: str) -> None:
    flag = "--" + field.replace("_", "-")
    given = {"--server": "127.0.0.1:1", "--name": "a", "--data": "d", "--state-dir": "s"}
    with pytest.raises(SettingsInvalid, match=f"{flag}: |'no way'|file no way"):
        ClientSettings.read([f"{name}={value}" for name, value in {**given, flag: "no way"}.items()])
