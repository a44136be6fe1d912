"""The operator's client, against an OperatorService on a real socket."""

from __future__ import annotations

import asyncio
import hashlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedpeft.adapters.payload import CHUNK_BYTES, chunks
from fedpeft.adapters.spec import AdapterSpec, TensorRole, TensorSpec
from fedpeft.api import operator_client
from fedpeft.api.operator_client import OperatorClient
from fedpeft.config import parse_config
from fedpeft.errors import (
    ChecksumMismatch,
    ConfigInvalid,
    Draining,
    RunFinished,
    RunNotFinished,
    RunNotFound,
    ServerUnreachable,
    StateInvalid,
    TransfersBusy,
    VersionNotFound,
)
from fedpeft.rpc import attempts
from fedpeft.v1 import federation_service_pb2 as federation
from fedpeft.v1 import operator_service_pb2 as pb
from fedpeft.v1 import run_pb2

from ..operator.operator_double import Double, Serving, a_client, a_round, a_run, serving

RUN = "run-0123456789ab"
COMPLETED = run_pb2.RUN_STATE_COMPLETED


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serving]:
    monkeypatch.setattr(operator_client, "PAUSE_S", 0.01)
    with serving(Double()) as answer:
        yield answer


def config() -> operator_client.RunConfig:
    return parse_config({"model": {"name": "vit_tiny", "classes": ["cat", "dog"]}, "peft": {"method": "bias"}})


async def test_run_is_created_with_every_chunk_and_without_local_tensors(served: Serving) -> None:
    size = CHUNK_BYTES // 4 + 5
    spec = AdapterSpec.of(
        "bias", [TensorSpec("a", (size,)), TensorSpec("b", (3,), (TensorRole.LOCAL,)), TensorSpec("c", (2,))]
    )
    tensors = {"a": np.arange(size, dtype=np.float32), "b": np.ones(3, np.float32), "c": np.full(2, 7, np.float32)}
    seen: list[tuple[int, int]] = []
    async with OperatorClient(served.address) as client:
        run = await client.create_run(
            config(), spec, "ab" * 32, tensors, 1000, progress=lambda done, total: seen.append((done, total))
        )
    (header, data), total = next(iter(served.double.created.values())), 4 * (size + 2)
    assert data == tensors["a"].tobytes() + tensors["c"].tobytes()
    assert [e.name for e in header.manifest.tensors] == ["a", "c"]
    assert [t.name for t in header.spec.tensors] == ["a", "b", "c"]
    assert header.backbone_fingerprint == "ab" * 32
    assert run.model_parameters == 1000
    assert seen == [(0, total)] + [(offset + length, total) for offset, length in chunks(0, total)]


async def test_creation_is_repeated_under_one_request_id(served: Serving) -> None:
    served.double.failures["CreateRun"] = [Draining("the server is shutting down")] * 2
    spec = AdapterSpec.of("bias", [TensorSpec("a", (4,))])
    async with OperatorClient(served.address) as client:
        await client.create_run(config(), spec, "ab" * 32, {"a": np.zeros(4, np.float32)}, 10)
    assert served.double.asked == ["CreateRun"] * 3
    assert len(served.double.created) == 1


async def test_a_creation_that_is_asked_to_wait_for_its_turn_uses_up_no_attempt(served: Serving) -> None:
    busy = operator_client.ATTEMPTS + 2
    served.double.failures["CreateRun"] = [TransfersBusy("8 are under way")] * busy
    spec = AdapterSpec.of("bias", [TensorSpec("a", (4,))])
    async with OperatorClient(served.address) as client:
        await client.create_run(config(), spec, "ab" * 32, {"a": np.zeros(4, np.float32)}, 10)
    assert served.double.asked == ["CreateRun"] * (busy + 1)


async def test_a_server_that_asks_for_ever_to_be_called_again_is_given_up_and_the_wait_is_said(
    served: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempts, "BUSY_S", 0.3)
    monkeypatch.setattr(attempts, "SAY_S", 0.1)
    served.double.failures["ListRuns"] = [TransfersBusy("8 are under way")] * 10_000
    said: list[str] = []
    async with OperatorClient(served.address, say=said.append) as client, asyncio.timeout(20):
        with pytest.raises(TransfersBusy, match="under way"):
            await client.runs()
    assert said == ["the server asks to be called again, for 0.3 s at most: 8 are under way"]


async def test_a_download_that_moves_on_is_never_given_up(
    served: Serving, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    data = np.random.default_rng(0).bytes(40_000)
    served.double.runs = {RUN: a_run(version=2)}
    served.double.files = {(RUN, 2): data}
    served.double.break_download_after = list(range(1000, 40_000, 1000))
    monkeypatch.setattr(operator_client, "PAUSE_S", 0.02)
    monkeypatch.setattr(attempts, "BUSY_S", 0.3)
    served.double.break_with = TransfersBusy("others wait")
    begin = time.monotonic()
    async with OperatorClient(served.address) as client:
        await client.download(RUN, tmp_path / "file")
    assert time.monotonic() - begin > 2 * attempts.BUSY_S
    assert (tmp_path / "file").read_bytes() == data


async def test_refused_creation_raises_the_servers_error_once(served: Serving) -> None:
    served.double.failures["CreateRun"] = [ConfigInvalid("rounds.count: too many", (("rounds.count", "too many"),))]
    spec = AdapterSpec.of("bias", [TensorSpec("a", (4,))])
    async with OperatorClient(served.address) as client:
        with pytest.raises(ConfigInvalid, match=r"rounds\.count") as caught:
            await client.create_run(config(), spec, "ab" * 32, {"a": np.zeros(4, np.float32)}, 10)
    assert caught.value.fields == (("rounds.count", "too many"),)
    assert served.double.asked == ["CreateRun"]


async def test_runs_rounds_and_clients(served: Serving) -> None:
    served.double.runs = {RUN: a_run(), "run-b": a_run("run-b")}
    served.double.rounds = {RUN: [a_round(1), a_round(2, committed=False)]}
    served.double.clients = [a_client("noto", federation.CLIENT_ROLE_TRAINER)]
    async with OperatorClient(served.address) as client:
        assert [r.id for r in await client.runs()] == [RUN, "run-b"]
        run, current = await client.run(RUN)
        assert (run.id, current and current.number) == (RUN, 2)
        assert (await client.run("run-b"))[1] is None
        assert [r.number for r in await client.rounds(RUN)] == [1, 2]
        assert [r.number for r in await client.rounds(RUN, after=1)] == [2]
        assert [c.id for c in await client.clients()] == ["noto"]
        with pytest.raises(RunNotFound, match="run-c"):
            await client.run("run-c")


async def test_steering(served: Serving) -> None:
    served.double.runs = {RUN: a_run(), "run-b": a_run("run-b", state=COMPLETED)}
    async with OperatorClient(served.address) as client:
        assert (await client.pause(RUN, "lunch")).reason == "lunch"
        assert (await client.resume(RUN)).state == run_pb2.RUN_STATE_RUNNING
        with pytest.raises(RunNotFinished):
            await client.delete(RUN)
        assert (await client.stop(RUN)).state == run_pb2.RUN_STATE_STOPPED
        await client.delete(RUN)
        with pytest.raises(RunFinished):
            await client.stop("run-b")
    assert list(served.double.runs) == ["run-b"]


async def test_nobody_there_is_said_with_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operator_client, "PAUSE_S", 0.01)
    async with OperatorClient("127.0.0.1:1") as client:
        with pytest.raises(ServerUnreachable, match=r"127\.0\.0\.1:1; start fedpeft-server"):
            await client.runs()


async def test_watch_ends_with_the_run(served: Serving) -> None:
    served.double.runs = {RUN: a_run()}
    served.double.script = [
        pb.WatchRunResponse(run=a_run(version=1), rounds=[a_round(1)]),
        pb.WatchRunResponse(run=a_run(version=2, state=COMPLETED), rounds=[a_round(2)]),
    ]
    async with OperatorClient(served.address) as client:
        assert [c.run.version async for c in client.watch(RUN)] == [1, 2]


async def test_watch_that_ends_before_the_run_is_a_lost_server(served: Serving) -> None:
    served.double.runs = {RUN: a_run()}
    served.double.script = [pb.WatchRunResponse(run=a_run())]
    async with OperatorClient(served.address) as client:
        with pytest.raises(ServerUnreachable, match="before the run ended"):
            assert len([change async for change in client.watch(RUN)]) == 1


async def test_silent_watch_asks_whether_the_server_lives_and_goes_on(
    served: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operator_client, "RESPONSE_TIMEOUT_S", 0.3)
    served.double.runs = {RUN: a_run()}
    served.double.script = [
        pb.WatchRunResponse(run=a_run(version=1)),
        1.0,
        pb.WatchRunResponse(run=a_run(version=2, state=COMPLETED)),
    ]
    async with OperatorClient(served.address) as client:
        assert [c.run.version async for c in client.watch(RUN)] == [1, 2]
    assert served.double.asked[:2] == ["WatchRun", "GetRun"]
    assert served.double.asked.count("WatchRun") == 1


async def test_watch_of_a_server_that_fell_silent_for_good_ends(
    served: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operator_client, "RESPONSE_TIMEOUT_S", 0.3)
    served.double.runs = {RUN: a_run()}
    served.double.script = [pb.WatchRunResponse(run=a_run()), 30.0]
    served.double.failures["GetRun"] = [Draining("the server is shutting down")] * 4
    async with OperatorClient(served.address, attempts=1) as client:
        with pytest.raises(Draining):
            assert len([change async for change in client.watch(RUN)]) == 1


async def test_pages_are_put_together(served: Serving) -> None:
    served.double.page = 2
    served.double.runs = {f"run-{i}": a_run(f"run-{i}") for i in range(5)} | {RUN: a_run()}
    served.double.rounds = {RUN: [a_round(i + 1) for i in range(5)]}
    served.double.clients = [a_client(f"c{i}", federation.CLIENT_ROLE_TRAINER) for i in range(5)]
    async with OperatorClient(served.address) as client:
        assert [r.id for r in await client.runs()] == list(served.double.runs)
        assert await client.rounds(RUN) == served.double.rounds[RUN], "a round that was cut is whole again"
        assert await client.rounds(RUN, after=3) == served.double.rounds[RUN][3:]
        assert await client.clients() == served.double.clients
    assert served.double.asked.count("ListRounds") > 5


async def test_an_answer_in_several_messages_is_one_change(served: Serving) -> None:
    served.double.runs = {RUN: a_run()}
    whole, finished = a_round(2), a_run(version=2, state=COMPLETED)
    first, second = a_round(2), a_round(2)
    del first.tickets[1:], second.tickets[:1]
    second.record = ""
    served.double.script = [
        pb.WatchRunResponse(run=finished, rounds=[a_round(1), first], more=True),
        pb.WatchRunResponse(run=finished, rounds=[second]),
    ]
    async with OperatorClient(served.address) as client:
        (change,) = [change async for change in client.watch(RUN)]
    assert list(change.rounds) == [a_round(1), whole]


async def test_download_is_whole_and_newest_by_default(served: Serving, tmp_path: Path) -> None:
    data = np.random.default_rng(0).bytes(10_500)
    served.double.runs = {RUN: a_run(version=2)}
    served.double.files = {(RUN, 2): data, (RUN, 1): b"old"}
    async with OperatorClient(served.address) as client:
        header = await client.download(RUN, tmp_path / "new")
        await client.download(RUN, tmp_path / "old", version=1)
        with pytest.raises(VersionNotFound):
            await client.download(RUN, tmp_path / "none", version=3)
    assert (tmp_path / "new").read_bytes() == data
    assert (tmp_path / "old").read_bytes() == b"old"
    assert (header.version, header.sha256) == (2, hashlib.sha256(data).digest())
    assert sorted(os.listdir(tmp_path)) == ["new", "old"]


async def test_broken_download_goes_on_with_the_same_version(served: Serving, tmp_path: Path) -> None:
    data = np.random.default_rng(0).bytes(10_500)
    served.double.runs = {RUN: a_run(version=2)}
    served.double.files = {(RUN, 2): data, (RUN, 3): bytes(10_500)}
    served.double.break_download_after = [3000, 7000]
    offsets: list[int] = []

    def note(done: int, total: int) -> None:
        offsets.append(done)
        served.double.runs[RUN].version = 3

    async with OperatorClient(served.address) as client:
        header = await client.download(RUN, tmp_path / "file", progress=note)
    assert (tmp_path / "file").read_bytes() == data
    assert header.version == 2
    assert offsets == [*range(1000, 10_001, 1000), 10_500]  # no byte twice


async def test_a_download_leaves_its_event_loop_to_others(
    served: Serving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: dict[str, int] = {}
    digest, sync = hashlib.file_digest, os.fsync

    def digested(*given: Any) -> Any:
        threads["digest"] = threading.get_ident()
        return digest(*given)

    def synced(descriptor: int) -> None:
        threads.setdefault("sync", threading.get_ident())
        sync(descriptor)

    monkeypatch.setattr(hashlib, "file_digest", digested)
    monkeypatch.setattr(os, "fsync", synced)
    served.double.runs = {RUN: a_run(version=2)}
    served.double.files = {(RUN, 2): b"some bytes"}
    async with OperatorClient(served.address) as client:
        await client.download(RUN, tmp_path / "file")
    assert set(threads) == {"digest", "sync"} and threading.get_ident() not in threads.values()


async def test_corrupt_download_leaves_no_file(served: Serving, tmp_path: Path) -> None:
    served.double.runs = {RUN: a_run(version=2)}
    served.double.files = {(RUN, 2): b"some bytes"}
    served.double.corrupt = True
    async with OperatorClient(served.address) as client:
        with pytest.raises(ChecksumMismatch, match="version 2"):
            await client.download(RUN, tmp_path / "file")
        with pytest.raises(StateInvalid, match="No such file"):
            await client.download(RUN, tmp_path / "absent" / "file")
    assert not os.listdir(tmp_path)


async def test_server_that_is_silent_is_given_up(served: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operator_client, "RESPONSE_TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as listening:  # accepts connections and says nothing
        server = f"127.0.0.1:{listening.getsockname()[1]}"
        async with OperatorClient(server, attempts=1) as client:
            with pytest.raises(ServerUnreachable):
                await client.runs()
            with pytest.raises(ServerUnreachable):
                await anext(client.watch(RUN))
