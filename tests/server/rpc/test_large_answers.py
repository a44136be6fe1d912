"""Every answer fits into a message, however much there is to tell; what would not is refused in words."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc
import pytest

from fedpeft.adapters import payload
from fedpeft.adapters.spec import AdapterSpec, TensorSpec
from fedpeft.api.operator_client import OperatorClient
from fedpeft.config import RunConfig
from fedpeft.errors import AnswerTooLarge, ConfigInvalid
from fedpeft.rpc import wire
from fedpeft.rpc.status import from_rpc_error
from fedpeft.rpc.wire import MESSAGE_LIMIT_BYTES
from fedpeft.v1 import federation_service_pb2 as fed
from fedpeft.v1 import operator_service_pb2 as op
from fedpeft.v1 import run_pb2
from fedpeft_server.rpc import interceptors

from ..conftest import Daemon, RawClient, config, refused, zeros

CLASSES = {"2.6 MB": 10_300, "3.4 MB": 13_500}
"""Number of class names of some 250 bytes that make a run of that size."""


def large(size: str) -> RunConfig:
    names = [f"{i:05}-{'x' * 244}" for i in range(CLASSES[size])]
    return config(model={"name": "vit_tiny_patch16_224", "classes": names})


async def pages(client: RawClient, **asked: object) -> AsyncIterator[fed.RegisterResponse]:
    request = fed.RegisterRequest(
        min_protocol=1,
        max_protocol=1,
        role=fed.CLIENT_ROLE_TRAINER,
        dry_run=True,
        **asked,  # type: ignore[arg-type]
    )
    while True:
        answer = await client.stub.Register(request, metadata=client.metadata)
        yield answer
        if not answer.next_page_token:
            return
        request.page_token = answer.next_page_token


async def test_clients_register_and_take_part_beside_two_large_runs(daemon: Daemon) -> None:
    runs = [(await daemon.create(large("2.6 MB"), request_id=str(i))).id for i in range(2)]
    (client,) = await daemon.clients("a")
    assert len((await client.register()).runs) == 1
    offered = []
    for _ in runs:
        answer = await client.look()
        offered.append(answer.offer.run.id)
        await client.answer(answer.offer.run.id)
    assert offered == runs
    seen = [[run.id for run in page.runs] async for page in pages(client)]
    assert seen == [[runs[0]], [runs[1]]], "a page holds what fits, and the next one the rest"
    async with OperatorClient(daemon.server.settings.listen) as operator:
        assert [run.id for run in await operator.runs()] == runs
        async for change in operator.watch(runs[0]):
            assert change.run.ByteSize() > 2_500_000
            break


async def test_a_run_that_no_answer_could_show_is_refused_when_it_is_created(daemon: Daemon) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await daemon.create(large("3.4 MB"))
    error = from_rpc_error(caught.value)
    assert isinstance(error, ConfigInvalid)
    assert error.fields[0][0] == "config" and "3,145,728" in error.message


async def test_hundreds_of_runs_are_listed_in_pages_to_a_dry_run_and_cut_for_others(daemon: Daemon) -> None:
    ids = [(await daemon.create(request_id=str(i))).id for i in range(40)]
    await daemon.operator.StopRun(op.StopRunRequest(run=ids[3]))
    active = [run for run in ids if run != ids[3]]
    client = daemon.client("a")
    answer = await client.register()
    assert ([run.id for run in answer.runs], answer.next_page_token) == (active[:16], "")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("fedpeft_server.rpc.pages.MOST", 15)
        found = [[run.id for run in page.runs] async for page in pages(client)]
    assert found == [active[:15], active[15:30], active[30:]]
    assert [[run.id for run in page.runs] async for page in pages(client, run=ids[3])] == [[ids[3]]]
    idle = await client.look(ids[3], until_finished=True)
    assert idle.idle.finished


async def test_a_page_is_for_a_dry_run_and_of_its_own_list(daemon: Daemon) -> None:
    client = daemon.client("a")
    asked = fed.RegisterRequest(min_protocol=1, max_protocol=1, role=fed.CLIENT_ROLE_TRAINER)
    for dry_run, token in ((True, "nonsense"), (False, "WyJhIl0")):
        asked.dry_run, asked.page_token = dry_run, token
        assert await refused(client.stub.Register(asked, metadata=client.metadata)) == "PAGE_INVALID"


async def test_the_wait_for_very_many_runs_is_explained_in_a_few_sentences(daemon: Daemon) -> None:
    ids = [(await daemon.create(request_id=str(i))).id for i in range(30)]
    (client,) = await daemon.clients("a")
    for run in ids:
        await client.answer(run)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("fedpeft_server.rpc.federation.HOLD_S", 0.01)
        reason = (await client.look()).idle.reason
    assert reason.endswith("; and 22 more runs") and reason.count("waits for clients") == 8


async def test_a_client_with_very_many_long_answers_is_listed(daemon: Daemon) -> None:
    ids = [(await daemon.create(request_id=str(i))).id for i in range(80)]
    (client,) = await daemon.clients("a")
    words = ["\N{GREEK SMALL LETTER ALPHA}" * 512] * 8
    for run in ids:
        await client.answer(run, *words)
    (listed,) = (await daemon.operator.ListClients(op.ListClientsRequest())).clients
    assert 10 < len(listed.answers) < 80 and listed.ByteSize() < MESSAGE_LIMIT_BYTES
    assert [answer.run for answer in listed.answers] == ids[: len(listed.answers)], "the oldest first"


@pytest.mark.parametrize("call", ["unary", "stream"])
async def test_what_does_not_fit_is_a_status_of_the_tree_and_counted(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    run = (await daemon.create()).id
    monkeypatch.setattr(interceptors, "MESSAGE_LIMIT_BYTES", 100)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        if call == "unary":
            await daemon.run(run)
        else:
            async for _ in daemon.operator.WatchRun(op.WatchRunRequest(run=run)):
                pass
    error = from_rpc_error(caught.value)
    assert isinstance(error, AnswerTooLarge) and "100 is the most" in error.message
    method = "GetRun" if call == "unary" else "WatchRun"
    counted = daemon.server.metrics.registry.get_sample_value(
        "fedpeft_grpc_requests_total", {"method": f"/fedpeft.v1.OperatorService/{method}", "code": "RESOURCE_EXHAUSTED"}
    )
    assert counted == 1


def test_the_largest_run_leaves_room_for_what_goes_beside_it() -> None:
    from fedpeft_server.rpc import messages

    metrics = {f"accuracy/{i:04}{'x' * 114}": 0.5 for i in range(2048)}
    beside = run_pb2.Run(reason="x" * 4096, initial_metrics=metrics).ByteSize() + messages.DECLINES_BYTES
    one_round = run_pb2.Round(metrics=metrics).ByteSize()
    assert messages.RUN_BYTES + beside + one_round < MESSAGE_LIMIT_BYTES - 16 * 1024


def test_a_manifest_of_the_largest_spec_fits_into_the_header_of_a_pull() -> None:
    spec = AdapterSpec.of("bias", [TensorSpec(f"{i:04}" + "x" * 252, (1,) * 8) for i in range(4096)])
    manifest, _ = payload.encode(zeros(spec), spec.shared, "bfloat16")
    header = fed.PullHeader(manifest=wire.manifest_to_proto(manifest))
    assert header.ByteSize() < MESSAGE_LIMIT_BYTES
