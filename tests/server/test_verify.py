"""Promise 9: anyone can check a run, and fold it again to the same bits; whatever was changed is found."""

from __future__ import annotations

import asyncio
import hashlib
import json
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedpeft.adapters import payload
from fedpeft.adapters.sections import with_sections
from fedpeft.adapters.spec import AdapterSpec, Section, TensorRole, TensorSpec
from fedpeft.config import RunConfig
from fedpeft.errors import BlobCorrupt, FedpeftError, StateInvalid
from fedpeft.privacy.events import Adapted, Clipped, Event, Noised
from fedpeft.rounds import record
from fedpeft.v1 import tensor_pb2
from fedpeft_operator.cli.run.verify import verified
from fedpeft_operator.cli.session import Session

from .conftest import SPEC, Arrays, Daemon, StartDaemon, config, header

pytestmark = pytest.mark.usefixtures("preloaded")

ROUNDS = {"rounds": {"count": 3, "clients": 2, "seed": 3}}
FREEZING = AdapterSpec.of(
    "bias",
    [
        TensorSpec("even", (40,), (TensorRole.SENT, TensorRole.FROZEN)),
        TensorSpec("head.weight", (3, 50)),
        TensorSpec("odd", (2, 9), (TensorRole.FROZEN, TensorRole.SENT)),
    ],
)
NOISE: dict[str, object] = {"mechanism": "central", "noise_multiplier": 20.0, "delta": 1e-5}
CASES: dict[str, tuple[dict[str, dict[str, object]], AdapterSpec]] = {
    "dense": ({}, SPEC),
    "float16": ({"codec": {"up": "float16", "down": "bfloat16"}}, SPEC),
    "sparse": ({"codec": {"up": "sparse", "density": 0.3, "values": "bfloat16"}}, SPEC),
    "fedadam": ({"aggregation": {"strategy": "fedadam", "server_learning_rate": 0.05, "beta1": 0.8}}, SPEC),
    "feddyn, tensors that take turns": (
        {
            "aggregation": {"strategy": "feddyn", "population": 5},
            "training": {"algorithm": {"name": "feddyn"}},
            "codec": {"error_feedback": False},
        },
        FREEZING,
    ),
    "fedexp": ({"aggregation": {"strategy": "fedexp", "epsilon": 1e-6}}, SPEC),
    "sparse, fedyogi, tensors that take turns": (
        {"codec": {"up": "sparse"}, "aggregation": {"strategy": "fedyogi"}, "peft": {"method": "bias"}},
        FREEZING,
    ),
    "float16, clipped": ({"codec": {"up": "float16"}, "privacy": {"clip_norm": 30.0}}, SPEC),
    "fedadam, noise": ({"aggregation": {"strategy": "fedadam"}, "privacy": {"clip_norm": 30.0, **NOISE}}, SPEC),
    "float16, noise, a bound that adapts": (
        {"codec": {"up": "float16"}, "privacy": {"clip_norm": 2.0, "quantile": 0.5, **NOISE}},
        SPEC,
    ),
    "updates that clients hide": ({"privacy": {**NOISE, "mechanism": "local", "clip_norm": 0.1}}, SPEC),
    "examples that clients hide": (
        {"privacy": {"mechanism": "example", "clip_norm": 0.1, "target_epsilon": 3.0, "delta": 1e-5}},
        SPEC,
    ),
    "sparse, fedadam, a section": (
        {"codec": {"up": "sparse"}, "aggregation": {"strategy": "fedadam"}},
        with_sections(FREEZING, [Section("control", 7.0, "float32")]),
    ),
}


def changes(spec: AdapterSpec, number: int, seed: int, *, sparse: bool) -> Arrays:
    generator = np.random.default_rng([number, seed])
    arrays = {t.name: generator.normal(size=t.shape).astype(np.float32) for t in spec.sent(number)}
    return {name: np.where(values > 0.5, values, 0) if sparse else values for name, values in arrays.items()}


async def finished(daemon: Daemon, run_file: RunConfig, spec: AdapterSpec = SPEC) -> str:
    """Holds a run of two clients to its end; returns its id."""
    run = await daemon.create(run_file, spec)
    clients = await daemon.clients("alice", "bob")
    for number in range(1, run_file.rounds.count + 1):
        tasks = await asyncio.gather(*(client.task() for client in clients))
        for seed, (client, task) in enumerate(zip(clients, tasks, strict=True)):
            arrays = changes(spec, number, seed, sparse=run_file.codec.up == "sparse")
            manifest, data = payload.encode(arrays, spec.sent(number), run_file.codec.encoding)
            await client.push_raw(header(task.ticket, manifest, 10 + 7 * seed, loss=0.5), [(0, data)])
        await daemon.until(run.id, lambda r, n=number: r.version == n)
    return run.id


async def verify(daemon: Daemon, run: str, *, replay: bool = True) -> list[str]:
    lines: list[str] = []
    spool = daemon.server.settings.data_dir / "spool" if replay else None
    found = await verified(Session(daemon.server.settings.listen), run, spool, lines.append)
    assert [row["replayed"] for row in found["rounds"]] == [replay] * len(lines)
    return lines


@pytest.mark.parametrize("case", CASES)
async def test_a_good_run_is_folded_again_to_the_same_bits(start: StartDaemon, case: str) -> None:
    sections, spec = CASES[case]
    daemon = await start(keep_updates=True)
    run = await finished(daemon, config(**{**ROUNDS, **sections}), spec)
    noise = ", up to the noise, which nobody can draw again" if "noise" in case else ""
    wanted = [f"round {n}: record, version and replay agree{noise}" for n in (1, 2, 3)]
    assert await verify(daemon, run) == wanted
    await daemon.end()
    again = await start(keep_updates=True)
    assert await verify(again, run) == wanted
    assert await verify(again, run, replay=False) == [f"round {n}: record and version agree" for n in (1, 2, 3)]


async def test_the_command_says_it_a_line_a_round_and_as_json(start: StartDaemon, tmp_path: Path) -> None:
    daemon = await start(keep_updates=True)
    run = await finished(daemon, config(rounds={"count": 2, "clients": 2}))
    spool = str(daemon.server.settings.data_dir / "spool")

    async def fedpeft(*arguments: str) -> tuple[int, str, str]:
        command = [
            sys.executable,
            "-m",
            "fedpeft_operator.app",
            "--server",
            daemon.server.settings.listen,
            "run",
            "verify",
        ]
        done = await asyncio.to_thread(
            subprocess.run, [*command, *arguments], capture_output=True, text=True, timeout=60
        )
        return done.returncode, done.stdout, done.stderr

    last = (await daemon.rounds(run))[-1].record_sha256
    code, out, err = await fedpeft(run, "--spool", spool)
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "round 1: record, version and replay agree",
        "round 2: record, version and replay agree",
        f"{run} agrees with its records; the last one has sha256 {last}",
    ]
    code, out, _ = await fedpeft(run, "--json")
    found = json.loads(out)
    assert (code, found["run"], found["last_record_sha256"]) == (0, run, last)
    assert [(r["round"], r["clients"], r["replayed"]) for r in found["rounds"]] == [
        (n, ["alice", "bob"], False) for n in (1, 2)
    ]
    next((daemon.server.settings.data_dir / "spool").glob("*.update")).unlink()
    code, _, err = await fedpeft(run, "--spool", spool)
    assert code == 1
    assert "--keep-updates" in err and "Traceback" not in err
    assert (await fedpeft(run, "--spool", str(tmp_path / "nowhere")))[0] == 2
    assert (await fedpeft("run-none"))[0] == 4
    fresh = await daemon.create(request_id="fresh")
    code, out, _ = await fedpeft(fresh.id)
    assert (code, out) == (0, f"{fresh.id} has no committed round yet: there is nothing to verify\n")


class Forger:
    """Changes a finished run behind the server's back."""

    def __init__(self, folder: Path, run: str) -> None:
        self.folder = folder
        self.run = run

    def execute(self, statement: str, *values: object) -> None:
        with sqlite3.connect(self.folder / "fedpeft.db") as database:
            assert database.execute(statement, (*values, self.run)).rowcount > 0
        database.close()

    def rewrite(self, number: int, *, digest: bool, **values: object) -> None:
        """Changes a record, and its digest with it if asked."""
        with sqlite3.connect(self.folder / "fedpeft.db") as database:
            query = "select record from rounds where number = ? and run = ?"
            (text,) = database.execute(query, (number, self.run)).fetchone()
        database.close()
        new = replace(record.parse(text), **values).to_json()  # type: ignore[arg-type]
        self.execute(f"update rounds set record = ? where number = {number} and run = ?", new)
        if digest:
            statement = f"update rounds set record_sha256 = ? where number = {number} and run = ?"
            self.execute(statement, record.digest(new))

    def lighter(self, number: int) -> None:
        """Makes a round's record say that somebody's update weighed less."""
        with sqlite3.connect(self.folder / "fedpeft.db") as database:
            query = "select record from rounds where number = ? and run = ?"
            counted = record.parse(database.execute(query, (number, self.run)).fetchone()[0]).contributions
        database.close()
        self.rewrite(number, digest=True, contributions=(replace(counted[0], weight=1.0), *counted[1:]))

    def blob(self, number: int, *, digest: bool) -> None:
        """Changes one bit of a version, and the digest that the server keeps of it if asked."""
        (path,) = (self.folder / "blobs").rglob(f"versions/{number:06}.safetensors")
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        if digest:
            sha256 = hashlib.sha256(data).hexdigest()
            self.execute(f"update versions set sha256 = ? where version = {number} and run = ?", sha256)

    def kept(self, kind: str) -> Path:
        return sorted((self.folder / "spool").glob(f"*.{kind}"))[-1]

    def update(self) -> None:
        path = self.kept("update")
        path.write_bytes(path.read_bytes()[:-1] + b"\x01")

    def manifest(self, **changes: Any) -> None:
        path = self.kept("manifest")
        message = tensor_pb2.Manifest.FromString(path.read_bytes())
        for name, value in changes.items():
            setattr(message.tensors[0], name, value)
        path.write_bytes(message.SerializeToString())


FORGERIES: dict[str, tuple[Callable[[Forger], object], type[FedpeftError], str]] = {
    "a record": (lambda f: f.rewrite(1, digest=False, adapter_sha256="0" * 64), BlobCorrupt, "round 1: the record has"),
    "a record with its digest": (
        lambda f: f.rewrite(1, digest=True, adapter_sha256="0" * 64),
        BlobCorrupt,
        "record 2 of 2: its previous_sha256",
    ),
    "the last record with its digest": (
        lambda f: f.rewrite(2, digest=True, adapter_sha256="0" * 64),
        BlobCorrupt,
        "round 2: version 2 of .* the record says 0000",
    ),
    "a weight": (lambda f: f.lighter(2), BlobCorrupt, r"round 2: the strategy gives .* alice weight 10\.0; 1\.0 is"),
    "the strategy": (lambda f: f.rewrite(2, digest=True, strategy="fedavgm"), BlobCorrupt, "its strategy is 'fedavg'"),
    "an event": (
        lambda f: f.rewrite(2, digest=True, events=(Clipped(1.0, 2),)),
        BlobCorrupt,
        r"round 2: folded again, its events is \(\); .*'bound': 1\.0",
    ),
    "an event of other updates": (
        lambda f: f.rewrite(2, digest=True, events=(Clipped(1.0, 3),)),
        BlobCorrupt,
        "record 2 of 2: an event is of other updates than were folded",
    ),
    "a section": (
        lambda f: f.rewrite(2, digest=True, sections=(Section("control", 2.0, "float32"),)),
        BlobCorrupt,
        r"its sections is \(\)",
    ),
    "a version": (
        lambda f: f.blob(1, digest=False),
        BlobCorrupt,
        r"versions/000001.safetensors has sha256 .* is recorded",
    ),
    "a version with its digest": (lambda f: f.blob(1, digest=True), BlobCorrupt, "round 1: version 1 of"),
    "version 0 with its digest": (lambda f: f.blob(0, digest=True), BlobCorrupt, "round 1: version 0 of"),
    "an update": (Forger.update, BlobCorrupt, "round [12]: the update of .* in ticket.* has sha256"),
    "a manifest": (lambda f: f.manifest(length=24), BlobCorrupt, "round [12]: the update of .* is not what"),
    "a missing update": (lambda f: f.kept("update").unlink(), StateInvalid, "there is no .*--keep-updates"),
    "a missing manifest": (lambda f: f.kept("manifest").unlink(), StateInvalid, "there is no .*--keep-updates"),
}


@pytest.mark.parametrize("case", FORGERIES)
async def test_what_was_changed_is_found(start: StartDaemon, case: str) -> None:
    forge, error, says = FORGERIES[case]
    daemon = await start(keep_updates=True)
    run = await finished(daemon, config(rounds={"count": 2, "clients": 2}))
    forger = Forger(daemon.server.settings.data_dir, run)
    await asyncio.to_thread(forge, forger)
    with pytest.raises(error, match=says):
        await verify(daemon, run)


@pytest.mark.parametrize(
    ("quantile", "events", "says"),
    [
        ({}, (Clipped(30.0, 2), Noised(30.0, 40.0, 2, 2)), "its events is .* 'noise_multiplier': 40.0"),
        ({"quantile": 0.5}, (Noised(30.0, 20.0, 2, 2), Adapted(9.0, 0.5, 2)), "round 1: the next bound is 9.0; 30"),
    ],
)
async def test_what_was_changed_of_a_round_with_noise_is_found(
    start: StartDaemon, quantile: dict[str, object], events: tuple[Event, ...], says: str
) -> None:
    daemon = await start(keep_updates=True)
    privacy = {"clip_norm": 30.0, **NOISE, **quantile}
    run = await finished(daemon, config(rounds={"count": 1, "clients": 2}, privacy=privacy))
    forger = Forger(daemon.server.settings.data_dir, run)
    await asyncio.to_thread(forger.rewrite, 1, digest=True, events=events)
    with pytest.raises(BlobCorrupt, match=says):
        await verify(daemon, run)
