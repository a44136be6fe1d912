"""The operators' calls."""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import replace

import grpc
import numpy as np
import pytest
from safetensors.numpy import load

from fedpeft.adapters import payload
from fedpeft.adapters.spec import TensorRole, TensorSpec
from fedpeft.rpc import wire
from fedpeft.rpc.status import from_rpc_error
from fedpeft.v1 import federation_service_pb2 as fed
from fedpeft.v1 import operator_service_pb2 as op
from fedpeft.v1 import run_pb2
from fedpeft_server.runs.scoring import EvaluatorProgress
from fedpeft_server.store.rows import RunRow

from ..conftest import SPEC, Daemon, StartDaemon, config, fault, filled, header, refused, zeros


async def download(daemon: Daemon, run: str, offset: int = 0, **version: int) -> tuple[op.DownloadHeader, bytes]:
    head, data = None, b""
    async for part in daemon.operator.DownloadAdapter(op.DownloadAdapterRequest(run=run, offset=offset, **version)):
        if part.HasField("header"):
            head = part.header
        data += part.chunk.data
    assert head is not None
    return head, data


async def test_creating_twice_with_one_request_id_makes_one_run(daemon: Daemon) -> None:
    first = await daemon.create(request_id="same")
    assert (await daemon.create(request_id="same")).id == first.id
    assert await refused(daemon.create(config(rounds={"count": 9}), request_id="same")) == "REQUEST_ID_REUSED"
    assert [r.id for r in (await daemon.operator.ListRuns(op.ListRunsRequest())).runs] == [first.id]


async def test_a_run_whose_budget_needs_more_noise_than_is_taken_is_refused_and_the_others_stay_readable(
    daemon: Daemon,
) -> None:
    there = await daemon.create()
    private = {"clip_norm": 1.0, "mechanism": "local", "target_epsilon": 0.05, "delta": 1e-6}
    asked = config(rounds={"count": 10_000, "clients": 2}, privacy=private)
    assert await refused(daemon.create(asked, request_id="private")) == "CONFIG_INVALID"
    assert [r.id for r in (await daemon.operator.ListRuns(op.ListRunsRequest())).runs] == [there.id]


def blobs(daemon: Daemon) -> list[str]:
    return [path.parts[-3] for path in (daemon.server.settings.data_dir / "blobs").rglob("*.safetensors")]


async def test_one_request_twice_at_once_makes_one_run_and_both_are_told_of_it(daemon: Daemon) -> None:
    runs = await asyncio.gather(*(daemon.create(request_id="same") for _ in range(4)))
    assert len({run.id for run in runs}) == 1
    assert runs == [runs[0]] * 4, "the second answer equals the first"
    assert blobs(daemon) == [runs[0].id], "no adapter of a run that was never made is left"
    assert not list((daemon.server.settings.data_dir / "spool").iterdir())


async def test_two_runs_under_one_request_at_once_are_one_and_a_refusal(daemon: Daemon) -> None:
    different = (config(), config(rounds={"count": 9}))
    ended = await asyncio.gather(*(daemon.create(c, request_id="same") for c in different), return_exceptions=True)
    (made,) = [run for run in ended if isinstance(run, run_pb2.Run)]
    (error,) = [e for e in ended if isinstance(e, grpc.aio.AioRpcError)]
    assert from_rpc_error(error).reason == "REQUEST_ID_REUSED"
    assert blobs(daemon) == [made.id]


async def test_a_wrong_run_is_refused_with_the_field(daemon: Daemon) -> None:
    manifest, data = payload.encode(zeros(), SPEC.shared, "float32")
    good = op.CreateRunHeader(
        config=wire.config_to_proto(config()),
        spec=wire.spec_to_proto(SPEC),
        backbone_fingerprint="ab" * 32,
        manifest=wire.manifest_to_proto(manifest),
        request_id="r",
    )

    async def reason(**changes: object) -> str:
        first = op.CreateRunHeader()
        first.CopyFrom(good)
        for name, value in changes.items():
            first.ClearField(name)  # type: ignore[arg-type]
            if isinstance(value, str):
                setattr(first, name, value)
            else:
                getattr(first, name).CopyFrom(value)
        return await refused(daemon.create_raw(first, [(0, data)]))

    bad_config = wire.config_to_proto(config())
    bad_config.rounds.count = 0
    assert await reason(config=bad_config) == "CONFIG_INVALID"
    other = wire.config_to_proto(config(peft={"method": "lora"}))
    assert await reason(config=other) == "SPEC_INVALID"
    assert await reason(backbone_fingerprint="short") == "CONFIG_INVALID"
    assert await reason(request_id="") == "CONFIG_INVALID"
    unsorted = wire.spec_to_proto(SPEC)
    unsorted.tensors.reverse()
    assert await reason(spec=unsorted) == "SPEC_INVALID"
    no_role = wire.spec_to_proto(SPEC)
    del no_role.tensors[0].roles[:]
    assert await reason(spec=no_role) == "SPEC_INVALID"
    wrong = wire.manifest_to_proto(replace(manifest, sha256=hashlib.sha256(b"x").digest()))
    assert await reason(manifest=wrong) == "CHECKSUM_MISMATCH"
    nan, _ = payload.encode({k: v * np.nan for k, v in zeros().items()}, SPEC.shared, "float32")
    wrong = await fault(daemon.create(arrays={k: v * np.nan for k, v in zeros().items()}))
    assert (wrong.reason, wrong.fields[0][0]) == ("PAYLOAD_INVALID", "header.manifest.tensors[0]")
    assert nan.payload_bytes == manifest.payload_bytes
    assert list((await daemon.operator.ListRuns(op.ListRunsRequest())).runs) == []


async def test_pause_keeps_the_open_round_and_opens_no_other(daemon: Daemon) -> None:
    run = await daemon.create()
    a, b = await daemon.clients("a", "b")
    tasks = await asyncio.gather(a.task(), b.task())
    paused = (await daemon.operator.PauseRun(op.PauseRunRequest(run=run.id, reason="lunch"))).run
    assert (paused.state, paused.reason) == (run_pb2.RUN_STATE_PAUSED, "lunch")
    await asyncio.gather(a.push(tasks[0].ticket, filled(1.0)), b.push(tasks[1].ticket, filled(1.0)))
    await daemon.until(run.id, lambda r: r.version == 1)
    waiting = [asyncio.create_task(a.task()), asyncio.create_task(b.task())]
    _, pending = await asyncio.wait(waiting, timeout=0.3)
    assert len(pending) == 2
    await daemon.operator.ResumeRun(op.ResumeRunRequest(run=run.id))
    assert {t.round for t in await asyncio.gather(*waiting)} == {2}


async def test_the_reason_of_a_pause_and_of_a_stop_is_bounded_and_harmless_to_a_terminal(daemon: Daemon) -> None:
    run = await daemon.create()
    said, kept = "lunch\x1b[2J" + "x" * 5000, "lunch [2J" + "x" * 1015
    paused = await daemon.operator.PauseRun(op.PauseRunRequest(run=run.id, reason=said))
    assert paused.run.reason == kept
    stopped = await daemon.operator.StopRun(op.StopRunRequest(run=run.id, reason=said))
    assert stopped.run.reason == kept


async def test_stop_ends_a_run_and_only_then_it_can_be_deleted(daemon: Daemon) -> None:
    run = await daemon.create()
    a, b = await daemon.clients("a", "b")
    tasks = await asyncio.gather(a.task(), b.task())
    assert await refused(daemon.operator.DeleteRun(op.DeleteRunRequest(run=run.id))) == "RUN_NOT_FINISHED"
    stopped = (await daemon.operator.StopRun(op.StopRunRequest(run=run.id, reason="enough"))).run
    assert (stopped.state, stopped.reason) == (run_pb2.RUN_STATE_STOPPED, "enough")
    again = (await daemon.operator.StopRun(op.StopRunRequest(run=run.id, reason="other"))).run
    assert again.reason == "enough"
    assert await refused(a.push(tasks[0].ticket, filled(1.0))) == "ROUND_CLOSED"
    assert await refused(daemon.operator.ResumeRun(op.ResumeRunRequest(run=run.id))) == "RUN_FINISHED"
    await daemon.operator.DeleteRun(op.DeleteRunRequest(run=run.id))
    assert await refused(daemon.operator.GetRun(op.GetRunRequest(run=run.id))) == "RUN_NOT_FOUND"
    assert not list((daemon.server.settings.data_dir / "blobs").rglob("*.safetensors"))


async def test_runs_are_listed_though_one_is_deleted_meanwhile(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [(await daemon.create(request_id=str(number))).id for number in range(3)]
    await daemon.operator.StopRun(op.StopRunRequest(run=ids[1]))
    runs, scoring = daemon.server.runs, daemon.server.runs.scoring
    looked_at, go_on, real = asyncio.Event(), asyncio.Event(), scoring.progress_of_all

    async def slow(run: RunRow) -> list[EvaluatorProgress]:
        looked_at.set()
        await go_on.wait()
        return await real(run)

    monkeypatch.setattr(scoring, "progress_of_all", slow)
    listing = daemon.operator.ListRuns(op.ListRunsRequest())
    await looked_at.wait()
    await runs.delete(ids[1], "a test")
    go_on.set()
    assert [run.id for run in (await listing).runs] == [ids[0], ids[2]]


async def test_the_adapter_downloads_as_a_safetensors_file_and_resumes(daemon: Daemon) -> None:
    arrays = {t.name: np.arange(t.size, dtype=np.float32).reshape(t.shape) for t in SPEC.shared}
    run = await daemon.create(arrays=arrays)
    head, data = await download(daemon, run.id)
    assert (head.version, head.size_bytes, head.sha256) == (0, len(data), hashlib.sha256(data).digest())
    loaded = load(data)
    assert all(np.array_equal(loaded[name], arrays[name]) for name in arrays)
    assert (await download(daemon, run.id, offset=100))[1] == data[100:]
    assert await refused(download(daemon, run.id, version=5)) == "VERSION_NOT_FOUND"
    assert await refused(download(daemon, run.id, offset=len(data) + 1)) == "OFFSET_OUT_OF_RANGE"


async def test_a_corrupt_blob_is_found_and_said(start: StartDaemon) -> None:
    daemon = await start()
    run = await daemon.create()
    (blob,) = (daemon.server.settings.data_dir / "blobs").rglob("*.safetensors")
    blob.write_bytes(blob.read_bytes()[:-1] + b"\x01")
    assert await refused(download(daemon, run.id)) == "BLOB_CORRUPT"
    (client,) = await daemon.clients("a")
    assert await refused(client.pull(run.id, 0)) == "BLOB_CORRUPT"


async def test_clients_are_listed_with_what_they_do(daemon: Daemon) -> None:
    run = await daemon.create(config(rounds={"count": 1, "clients": 1}))
    (a,) = await daemon.clients("a")
    await daemon.clients("b")
    task = await a.task()

    async def activities() -> dict[str, str]:
        listed = await daemon.operator.ListClients(op.ListClientsRequest())
        return {c.id: c.activity for c in listed.clients}

    assert await activities() == {"a": "training", "b": "away"}
    await a.push(task.ticket, filled(1.0))
    await daemon.until(run.id, lambda r: r.version == 1)
    listed = await daemon.operator.ListClients(op.ListClientsRequest())
    assert [(c.id, c.updates) for c in listed.clients] == [("a", 1), ("b", 0)]


async def test_an_evaluator_is_scoring_from_its_task_to_its_figures(daemon: Daemon) -> None:
    run = await daemon.create(config(rounds={"count": 1, "clients": 1}))
    judge = daemon.client("judge")
    await judge.register(fed.CLIENT_ROLE_EVALUATOR)

    async def activity() -> str:
        (listed,) = (await daemon.operator.ListClients(op.ListClientsRequest())).clients
        return listed.activity

    async def push(version: int) -> None:
        request = fed.PushEvaluationRequest(run=run.id, version=version, metrics={"accuracy": 0.5})
        await judge.stub.PushEvaluation(request, metadata=judge.metadata)

    assert await activity() == "away"
    assert (await judge.wait()).evaluation.version == 0
    assert await activity() == "scoring"
    await push(0)
    assert await activity() == "away"
    waiting = asyncio.create_task(judge.wait())
    async with asyncio.timeout(10):
        while await activity() != "waiting":
            await asyncio.sleep(0.01)
    (a,) = await daemon.clients("a")
    await a.push((await a.task()).ticket, filled(1.0))
    assert (await waiting).evaluation.version == 1
    await push(0)
    judging = {c.id: c.activity for c in (await daemon.operator.ListClients(op.ListClientsRequest())).clients}
    assert judging["judge"] == "scoring", "figures of another version are not those of the one it has"
    await judge.register(fed.CLIENT_ROLE_EVALUATOR)
    judging = {c.id: c.activity for c in (await daemon.operator.ListClients(op.ListClientsRequest())).clients}
    assert judging["judge"] == "away", "one that starts anew has forgotten its task"


async def test_a_local_tensor_is_in_no_payload(daemon: Daemon) -> None:
    spec = type(SPEC).of("bias", [*SPEC.tensors, TensorSpec("private", (4,), (TensorRole.LOCAL,))])
    run = await daemon.create(config(rounds={"count": 1, "clients": 1}), spec=spec)
    (a,) = await daemon.clients("a")
    task = await a.task()
    head, _ = await a.pull(run.id, 0)
    assert [t.name for t in head.manifest.tensors] == [t.name for t in SPEC.tensors]
    await a.push(task.ticket, filled(1.0), spec=spec)
    await daemon.until(run.id, lambda r: r.version == 1)
    assert set(load((await download(daemon, run.id))[1])) == {t.name for t in SPEC.tensors}


async def test_roles_that_change_with_the_round_are_kept(daemon: Daemon) -> None:
    spec = type(SPEC).of(
        "bias",
        [
            TensorSpec("even", (2,), (TensorRole.SENT, TensorRole.FROZEN)),
            TensorSpec("odd", (2,), (TensorRole.FROZEN, TensorRole.SENT)),
        ],
    )
    run = await daemon.create(config(rounds={"count": 2, "clients": 1}), spec=spec)
    (a,) = await daemon.clients("a")
    for number, name in ((1, "even"), (2, "odd")):
        task = await a.task()
        manifest, data = payload.encode({name: np.ones(2, np.float32)}, spec.sent(number), "float32")
        await a.push_raw(header(task.ticket, manifest), [(0, data)])
        await daemon.until(run.id, lambda r, n=number: r.version == n)
    adapter = await daemon.adapter(run.id, 2)
    assert {k: v.tolist() for k, v in adapter.items()} == {"even": [1, 1], "odd": [1, 1]}
    first = await daemon.adapter(run.id, 1)
    assert first["odd"].tolist() == [0, 0]


async def test_a_deleted_run_leaves_no_update_behind(start: StartDaemon) -> None:
    daemon = await start(keep_updates=True)
    run = await daemon.create(config(rounds={"count": 1, "clients": 1}))
    (a,) = await daemon.clients("a")
    await a.push((await a.task()).ticket, filled(1.0))
    await daemon.until(run.id, lambda r: r.state == run_pb2.RUN_STATE_COMPLETED)
    spool = daemon.server.settings.data_dir / "spool"
    assert list(spool.glob("*.update"))
    await daemon.operator.DeleteRun(op.DeleteRunRequest(run=run.id))
    assert not list(spool.iterdir())


async def test_a_strategy_that_cannot_fold_the_adapter_is_refused(daemon: Daemon) -> None:
    assert await refused(daemon.create(config(aggregation={"strategy": "lora_fair"}))) == "CONFIG_INVALID"
