"""A daemon folds fixed updates to the bits that it gave, and opens the data folder of a released one."""

from __future__ import annotations

import asyncio
import hashlib
import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedpeft.v1 import federation_service_pb2 as fed
from fedpeft.v1 import operator_service_pb2 as op
from fedpeft.v1 import run_pb2

from ..server.conftest import SPEC, Arrays, Daemon, StartDaemon, config
from ..server.conftest import start as start
from .conftest import Golden

ARCHIVE = Path(__file__).with_name("data-dir.tar.gz")
CODECS = ("float32", "float16", "bfloat16", "sparse+float32", "sparse+float16")
STRATEGIES = ("fedavg", "fedavgm", "fedadagrad", "fedadam", "fedyogi")


def update(client: int, number: int) -> Arrays:
    """Returns a fixed update; a third of its values are zero."""
    draw = np.random.default_rng([client, number])
    found = {}
    for tensor in SPEC.sent(1):
        values = draw.standard_normal(tensor.shape, np.float32)
        found[tensor.name] = np.where(draw.random(tensor.shape) < 1 / 3, np.float32(0), values)
    return found


def digest(arrays: Arrays) -> str:
    """Returns the sha256 over the values of all tensors in order of their names."""
    return hashlib.sha256(b"".join(arrays[name].astype("<f4").tobytes() for name in sorted(arrays))).hexdigest()


async def committed(daemon: Daemon, encoding: str, **sections: Any) -> dict[str, Any]:
    """Holds a run of two rounds with fixed updates of two clients and returns what came of it."""
    name, _, values = encoding.partition("+")
    codec = {"up": name, "values": values} if values else {"up": name}
    created = await daemon.create(config(codec=codec, **sections))
    clients = await daemon.clients("a", "b")
    for number in (1, 2):
        tasks = await asyncio.gather(*(client.task(created.id) for client in clients))
        for index, (client, task) in enumerate(zip(clients, tasks, strict=True)):
            await client.push(task.ticket, update(index, number), 10 * (index + 1), encoding)
        await daemon.until(created.id, lambda run, version=number: run.version == version)  # type: ignore[misc]
    rounds = await daemon.rounds(created.id)
    return {
        "versions": [digest(await daemon.adapter(created.id, version)) for version in (0, 1, 2)],
        "payload_bytes_up": [each.payload_bytes_up for each in rounds],
        "updates": [
            [[t.client, t.examples, t.weight, t.update_norm, t.payload_sha256] for t in each.tickets] for each in rounds
        ],
    }


@pytest.mark.parametrize("encoding", CODECS)
async def test_updates_in_every_encoding_fold_to_the_bits_that_they_gave(
    start: StartDaemon, golden: Golden, encoding: str
) -> None:
    assert golden.holds(f"daemon: {encoding}", await committed(await start(), encoding))


@pytest.mark.parametrize("strategy", STRATEGIES)
async def test_every_strategy_folds_to_the_bits_that_it_gave(start: StartDaemon, golden: Golden, strategy: str) -> None:
    found = await committed(await start(), "float32", aggregation={"strategy": strategy})
    assert golden.holds(f"daemon: {strategy}", found)


async def record(start: StartDaemon, folder: Path) -> dict[str, Any]:
    """Writes the archive: a finished run, and one with an update received, one half uploaded and a version scored."""
    daemon = await start(folder)
    await committed(daemon, "float32")
    (finished,) = (await daemon.operator.ListRuns(op.ListRunsRequest())).runs
    open_run = await daemon.create(config(rounds={"count": 2, "clients": 2, "quorum": 2}), request_id="open")
    clients = await daemon.clients("a", "b")
    tasks = await asyncio.gather(*(client.task(open_run.id) for client in clients))
    await clients[0].push(tasks[0].ticket, update(0, 1))
    judge = daemon.client("judge")
    await judge.register(fed.CLIENT_ROLE_EVALUATOR)
    evaluation = (await judge.wait(open_run.id)).evaluation
    await judge.stub.PushEvaluation(
        fed.PushEvaluationRequest(run=open_run.id, version=evaluation.version, metrics={"accuracy": 0.5}),
        metadata=judge.metadata,
    )
    await daemon.end()
    with tarfile.open(ARCHIVE, "w:gz") as archive:
        archive.add(folder, "data")
    return {"finished": finished.id, "open": open_run.id, "ticket": tasks[1].ticket}


def verified(daemon: Daemon, run: str) -> dict[str, Any]:
    command = [str(Path(sys.executable).with_name("fedpeft")), "--server", daemon.server.settings.listen]
    done = subprocess.run([*command, "run", "verify", run, "--json"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


async def test_the_data_folder_of_a_released_daemon_is_opened_and_its_round_goes_on(
    start: StartDaemon, golden: Golden, tmp_path: Path
) -> None:
    if golden.record:
        golden.kept["data folder"] = await record(start, tmp_path / "recorded")
    kept = golden.kept["data folder"]
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    daemon = await start(tmp_path / "data")
    runs = {run.id: run for run in (await daemon.operator.ListRuns(op.ListRunsRequest())).runs}
    assert {run: runs[run].version for run in runs} == {kept["finished"]: 2, kept["open"]: 0}
    assert runs[kept["finished"]].state == run_pb2.RUN_STATE_COMPLETED
    assert runs[kept["open"]].initial_metrics["accuracy"] == 0.5
    (current,) = await daemon.rounds(kept["open"])
    assert {ticket.client: ticket.state for ticket in current.tickets} == {
        "a": run_pb2.TICKET_STATE_RECEIVED,
        "b": run_pb2.TICKET_STATE_ISSUED,
    }
    b = daemon.client("b")
    await b.register()
    await b.push(kept["ticket"], update(1, 1), 20)
    await daemon.until(kept["open"], lambda run: run.version == 1)
    versions = golden.kept["daemon: float32"]["versions"]
    assert [digest(await daemon.adapter(kept["finished"], version)) for version in (0, 1, 2)] == versions
    assert digest(await daemon.adapter(kept["open"], 1)) == versions[1]
    found = await asyncio.to_thread(verified, daemon, kept["finished"])
    assert golden.holds("verified", found), found
