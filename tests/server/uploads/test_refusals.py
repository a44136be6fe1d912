"""Promise 5 on the wire: what a bad client sends is refused with a status and a reason, and the round goes on."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace

import grpc
import numpy as np
import pytest

from fedpeft.adapters import payload
from fedpeft.adapters.payload import CHUNK_BYTES, Manifest
from fedpeft.rpc.status import from_rpc_error
from fedpeft.v1 import federation_service_pb2 as fed
from fedpeft.v1 import run_pb2, tensor_pb2
from fedpeft_server.store.queries.runs import MAX_SPLITS

from ..conftest import SPEC, Daemon, RawClient, StartDaemon, config, fault, filled, header, refused


@dataclass
class Bad:
    """A client with a ticket, about to send something wrong."""

    client: RawClient
    ticket: str
    manifest: Manifest
    data: bytes

    def send(self, **changes: object) -> Awaitable[object]:
        """Sends the update with a changed manifest."""
        first = header(self.ticket, replace(self.manifest, **changes))  # type: ignore[arg-type]
        return self.client.push_raw(first, [(0, self.data)])

    def entry(self, **changes: object) -> Awaitable[object]:
        """Sends the update with a changed first entry."""
        entries = (replace(self.manifest.entries[0], **changes), *self.manifest.entries[1:])  # type: ignore[arg-type]
        return self.send(entries=entries)

    def values(self, values: float) -> Awaitable[object]:
        return self.client.push(self.ticket, filled(values))

    def head(self, examples: int = 10, **metrics: float) -> Awaitable[object]:
        return self.client.push_raw(header(self.ticket, self.manifest, examples, **metrics), [(0, self.data)])


WRONG_HEADERS: dict[str, tuple[Callable[[Bad], Awaitable[object]], str]] = {
    "unknown tensor": (lambda b: b.entry(name="blocks.9.bias"), "MANIFEST_INVALID"),
    "missing tensor": (lambda b: b.send(entries=b.manifest.entries[1:]), "MANIFEST_INVALID"),
    "tensor twice": (lambda b: b.send(entries=b.manifest.entries[:1] * 2), "MANIFEST_INVALID"),
    "wrong order": (lambda b: b.send(entries=b.manifest.entries[::-1]), "MANIFEST_INVALID"),
    "wrong shape": (lambda b: b.entry(shape=(7, 1)), "MANIFEST_INVALID"),
    "wrong encoding": (lambda b: b.entry(encoding="float16"), "MANIFEST_INVALID"),
    "encoding there is not": (lambda b: b.entry(encoding="pickle"), "MANIFEST_INVALID"),
    "gap": (lambda b: b.entry(offset=4), "MANIFEST_INVALID"),
    "length of another shape": (lambda b: b.entry(length=24), "MANIFEST_INVALID"),
    "payload_bytes that lies": (lambda b: b.send(payload_bytes=2**40), "MANIFEST_INVALID"),
    "short digest": (lambda b: b.send(sha256=b"short"), "MANIFEST_INVALID"),
    "no examples": (lambda b: b.head(examples=0), "EXAMPLES_INVALID"),
    "too many examples": (lambda b: b.head(examples=10**9 + 1), "EXAMPLES_INVALID"),
    "a loss that is not finite": (lambda b: b.head(loss=float("nan")), "METRICS_INVALID"),
    "too many figures": (lambda b: b.head(**{f"m{i}": 1.0 for i in range(65)}), "METRICS_INVALID"),
    "a figure with a long name": (lambda b: b.head(**{"m" * 129: 1.0}), "METRICS_INVALID"),
}
REFUSED_FOR_GOOD: dict[str, tuple[Callable[[Bad], Awaitable[object]], str]] = {
    "not a number": (lambda b: b.values(np.nan), "PAYLOAD_INVALID"),
    "infinity": (lambda b: b.values(np.inf), "PAYLOAD_INVALID"),
}


async def bad_and_good(daemon: Daemon) -> tuple[Bad, RawClient, str, run_pb2.Run]:
    """Opens a round of two clients with a quorum of one."""
    run = await daemon.create(config(rounds={"count": 1, "clients": 2, "quorum": 1}))
    a, b = await daemon.clients("bad", "good")
    tasks = await asyncio.gather(a.task(), b.task())
    manifest, data = payload.encode(filled(1.0), SPEC.sent(1), "float32")
    return Bad(a, tasks[0].ticket, manifest, data), b, tasks[1].ticket, run


@pytest.mark.parametrize("case", REFUSED_FOR_GOOD)
async def test_a_wrong_update_closes_its_ticket_and_the_round_goes_on(daemon: Daemon, case: str) -> None:
    send, reason = REFUSED_FOR_GOOD[case]
    bad, good, ticket, run = await bad_and_good(daemon)
    assert await refused(send(bad)) == reason
    assert await refused(bad.values(1.0)) == "TICKET_CLOSED"
    await good.push(ticket, filled(3.0))
    await daemon.until(run.id, lambda r: r.version == 1)
    (done,) = await daemon.rounds(run.id)
    states = {t.client: (t.state, t.reason.partition(":")[0]) for t in done.tickets}
    assert states["bad"] == (run_pb2.TICKET_STATE_REFUSED, reason)
    assert all((x == 3.0).all() for x in (await daemon.adapter(run.id, 1)).values())
    held = await bad.client.upload(bad.ticket)
    assert held.state == run_pb2.TICKET_STATE_REFUSED
    assert held.reason.startswith(f"{reason}: update of {bad.ticket}: tensor blocks.0.bias: value 0 is not finite")


@pytest.mark.parametrize("case", WRONG_HEADERS)
async def test_a_wrong_header_costs_no_ticket(daemon: Daemon, case: str) -> None:
    send, reason = WRONG_HEADERS[case]
    bad, good, ticket, run = await bad_and_good(daemon)
    error = await fault(send(bad))
    assert error.reason == reason
    assert error.fields and all(field.startswith("header.") for field, _ in error.fields)
    held = await bad.client.upload(bad.ticket, bad.manifest.sha256)
    assert (held.state, held.committed_bytes) == (run_pb2.TICKET_STATE_ISSUED, 0)
    await bad.values(1.0)
    await good.push(ticket, filled(3.0))
    await daemon.until(run.id, lambda r: r.version == 1)
    assert all((x == 2.0).all() for x in (await daemon.adapter(run.id, 1)).values())


async def test_an_update_over_the_limit_costs_no_ticket(start: StartDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    daemon = await start()
    bad, *_ = await bad_and_good(daemon)
    monkeypatch.setattr(daemon.server.uploads._receiver, "_max_bytes", 8)
    error = await fault(bad.values(1.0))
    assert (error.reason, error.fields[0][0]) == ("UPDATE_TOO_LARGE", "header.manifest.payload_bytes")
    assert (await bad.client.upload(bad.ticket)).state == run_pb2.TICKET_STATE_ISSUED


@pytest.mark.parametrize("length", [1, 31, 33, 64])
async def test_a_digest_of_another_length_is_refused(daemon: Daemon, length: int) -> None:
    bad, _, _, run = await bad_and_good(daemon)
    for call, field in (
        (bad.client.upload(bad.ticket, bytes(length)), "sha256"),
        (bad.client.pull(run.id, 0, have=bytes(length)), "have_sha256"),
    ):
        error = await fault(call)
        assert (error.reason, error.fields[0][0]) == ("DIGEST_INVALID", field)
    assert len((await bad.client.upload(bad.ticket, bytes(32))).receipt.sha256) == 0


async def test_why_a_ticket_was_closed_can_be_read(daemon: Daemon) -> None:
    run = await daemon.create(config(rounds={"count": 2, "clients": 2, "quorum": 1, "over_selection": 0.5}))
    clients = await daemon.clients("a", "b", "c")
    tickets = [task.ticket for task in await asyncio.gather(*(c.task() for c in clients))]
    await clients[0].withdraw(tickets[0], "no power")
    held = await clients[0].upload(tickets[0])
    assert (held.state, held.reason) == (run_pb2.TICKET_STATE_WITHDRAWN, "no power")
    await clients[1].answer(run.id, "the data went")
    held = await clients[1].upload(tickets[1])
    assert (held.state, held.reason) == (run_pb2.TICKET_STATE_WITHDRAWN, "the data went")
    assert (await clients[2].upload(tickets[2])).reason == ""


def chunks(bad: Bad, offset: int, data: bytes) -> Awaitable[object]:
    return bad.client.push_raw(header(bad.ticket, bad.manifest), [(offset, data)])


async def headless(bad: Bad) -> object:
    async def requests() -> AsyncIterator[fed.PushUpdateRequest]:
        yield fed.PushUpdateRequest(chunk=tensor_pb2.Chunk(offset=0, data=bad.data))

    return await bad.client.send(requests())


TRY_AGAIN: dict[str, tuple[Callable[[Bad], Awaitable[object]], str]] = {
    "stream that ends early": (
        lambda b: chunks(b, 0, b.data[:9]),
        "UPLOAD_INCOMPLETE",
    ),
    "stream without a chunk": (lambda b: b.client.push_raw(header(b.ticket, b.manifest), []), "UPLOAD_INCOMPLETE"),
    "empty chunk": (lambda b: chunks(b, 0, b""), "CHUNK_INVALID"),
    "chunk beyond the end": (
        lambda b: chunks(b, 0, b.data + b"x"),
        "CHUNK_INVALID",
    ),
    "chunk over 1 MiB": (
        lambda b: chunks(b, 0, bytes(CHUNK_BYTES + 1)),
        "CHUNK_INVALID",
    ),
    "wrong offset": (
        lambda b: chunks(b, 8, b.data[8:]),
        "OFFSET_OUT_OF_RANGE",
    ),
    "wrong digest": (lambda b: b.send(sha256=hashlib.sha256(b"other").digest()), "CHECKSUM_MISMATCH"),
    "no header": (headless, "CHUNK_INVALID"),
    "empty header": (lambda b: b.client.push_raw(fed.UpdateHeader(), [(0, b.data)]), "TICKET_NOT_FOUND"),
    "ticket there is not": (lambda b: b.client.push("ticket-0000", filled(1.0)), "TICKET_NOT_FOUND"),
}


@pytest.mark.parametrize("case", TRY_AGAIN)
async def test_a_broken_upload_leaves_the_ticket_good(daemon: Daemon, case: str) -> None:
    send, reason = TRY_AGAIN[case]
    bad, good, ticket, run = await bad_and_good(daemon)
    assert await refused(send(bad)) == reason
    held = await bad.client.upload(bad.ticket, bad.manifest.sha256)
    assert held.state == run_pb2.TICKET_STATE_ISSUED
    rest = [(held.committed_bytes, bad.data[held.committed_bytes :])]
    await bad.client.push_raw(header(bad.ticket, bad.manifest), rest)
    await good.push(ticket, filled(3.0))
    await daemon.until(run.id, lambda r: r.version == 1)
    assert all((x == 2.0).all() for x in (await daemon.adapter(run.id, 1)).values())


async def test_a_repeated_update_counts_once_and_another_one_is_refused(daemon: Daemon) -> None:
    bad, good, ticket, run = await bad_and_good(daemon)
    first = await bad.values(1.0)
    assert await bad.values(1.0) == first
    assert await refused(bad.values(2.0)) == "UPDATE_DIFFERS"
    await good.push(ticket, filled(3.0))
    await daemon.until(run.id, lambda r: r.version == 1)
    assert await bad.values(1.0) == first
    held = await bad.client.upload(bad.ticket, bad.manifest.sha256)
    assert (held.state, held.committed_bytes) == (run_pb2.TICKET_STATE_RECEIVED, len(bad.data))
    assert held.receipt == first


async def test_a_ticket_belongs_to_its_client(daemon: Daemon) -> None:
    bad, good, ticket, _ = await bad_and_good(daemon)
    assert await refused(bad.client.push(ticket, filled(1.0))) == "TICKET_OF_ANOTHER"
    assert await refused(bad.client.upload(ticket)) == "TICKET_OF_ANOTHER"
    assert await refused(bad.client.withdraw(ticket)) == "TICKET_OF_ANOTHER"
    assert (await good.upload(ticket)).state == run_pb2.TICKET_STATE_ISSUED


async def test_an_update_after_the_round_is_late(daemon: Daemon) -> None:
    run = await daemon.create(config(rounds={"count": 2, "clients": 1, "over_selection": 1.0}))
    a, b = await daemon.clients("a", "b")
    tasks = await asyncio.gather(a.task(), b.task())
    await a.push(tasks[0].ticket, filled(1.0))
    await daemon.until(run.id, lambda r: r.version == 1)
    assert await refused(b.push(tasks[1].ticket, filled(1.0))) == "ROUND_CLOSED"
    assert (await b.upload(tasks[1].ticket)).state == run_pb2.TICKET_STATE_LATE


async def test_a_payload_over_the_limit_is_refused_before_it_is_taken(start: StartDaemon) -> None:
    daemon = await start(max_update_bytes=1024)
    spec = type(SPEC).of("bias", [replace(SPEC.tensors[0], shape=(300,))])
    assert await refused(daemon.create(spec=spec)) == "UPDATE_TOO_LARGE"


CALLERS = {
    "no metadata": (),
    "bad id": (("fedpeft-client", "a/b"), ("fedpeft-instance", "0" * 32)),
    "this folder": (("fedpeft-client", "."), ("fedpeft-instance", "0" * 32)),
    "folder above": (("fedpeft-client", ".."), ("fedpeft-instance", "0" * 32)),
    "long id": (("fedpeft-client", "a" * 65), ("fedpeft-instance", "0" * 32)),
    "no instance": (("fedpeft-client", "a"),),
    "bad instance": (("fedpeft-client", "a"), ("fedpeft-instance", "zz")),
}


@pytest.mark.parametrize("case", CALLERS)
async def test_a_caller_must_say_who_it_is(daemon: Daemon, case: str) -> None:
    client = daemon.client("a")
    client.metadata = CALLERS[case]  # type: ignore[assignment]
    assert await refused(client.register()) == "CLIENT_ID_INVALID"


async def test_a_second_instance_of_a_live_client_is_refused(daemon: Daemon) -> None:
    (first,) = await daemon.clients("a")
    second = daemon.client("a", instance="f" * 32)
    assert await refused(second.register()) == "CLIENT_ID_IN_USE"
    assert len((await first.register()).runs) == 0


async def test_register_comes_first_and_protocols_must_meet(daemon: Daemon) -> None:
    client = daemon.client("a")
    assert await refused(client.wait()) == "NOT_REGISTERED"
    for low, high, side in ((0, 0, "client"), (2, 3, "server")):
        request = fed.RegisterRequest(min_protocol=low, max_protocol=high, role=fed.CLIENT_ROLE_TRAINER)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.stub.Register(request, metadata=client.metadata)
        error = from_rpc_error(caught.value)
        assert error.reason == "PROTOCOL_MISMATCH"
        assert f"upgrade the {side}" in error.message
    assert await refused(client.register(role=fed.CLIENT_ROLE_UNSPECIFIED)) == "CAPABILITIES_INVALID"
    assert await refused(client.register(run="run-none")) == "RUN_NOT_FOUND"


async def test_no_more_clients_than_the_limit(start: StartDaemon) -> None:
    daemon = await start(max_clients=1)
    await daemon.clients("a", "a")
    assert await refused(daemon.client("b").register()) == "TOO_MANY_CLIENTS"


async def test_pulls_beyond_what_there_is(daemon: Daemon) -> None:
    run = await daemon.create()
    (client,) = await daemon.clients("a")
    assert await refused(client.pull("run-none", 0)) == "RUN_NOT_FOUND"
    assert await refused(client.pull(run.id, 1)) == "VERSION_NOT_FOUND"
    assert await refused(client.pull(run.id, 0, offset=10**6)) == "OFFSET_OUT_OF_RANGE"


async def test_a_pull_resumes_and_sends_nothing_that_is_held(daemon: Daemon) -> None:
    run = await daemon.create()
    (client,) = await daemon.clients("a")
    head, data = await client.pull(run.id, 0)
    assert hashlib.sha256(data).digest() == head.manifest.sha256
    assert (await client.pull(run.id, 0, offset=40))[1] == data[40:]
    again, nothing = await client.pull(run.id, 0, have=head.manifest.sha256)
    assert (again.up_to_date, nothing) == (True, b"")


async def test_figures_of_an_evaluation_are_checked(daemon: Daemon) -> None:
    run = await daemon.create()
    client = daemon.client("judge")
    await client.register(fed.CLIENT_ROLE_EVALUATOR)

    def push(version: int = 0, split: str = "", **metrics: float) -> Awaitable[object]:
        request = fed.PushEvaluationRequest(run=run.id, version=version, metrics=metrics, split=split)
        return client.stub.PushEvaluation(request, metadata=client.metadata)

    assert await refused(push(accuracy=float("inf"))) == "METRICS_INVALID"
    assert await refused(push(version=3, accuracy=0.5)) == "VERSION_NOT_FOUND"
    assert await refused(push(split="Not A Name", accuracy=0.5)) == "METRICS_INVALID"
    assert await refused(push(split="x" * 65, accuracy=0.5)) == "METRICS_INVALID"
    assert await refused(push()) == "METRICS_INVALID"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await push(accuracy=7.0)
    error = from_rpc_error(caught.value)
    assert (error.reason, error.fields[0][0]) == ("METRICS_INVALID", "metrics[accuracy]")
    assert (await client.wait()).evaluation.version == 0
    await push(accuracy=0.25)
    assert dict((await daemon.run(run.id)).initial_metrics) == {"accuracy": 0.25}


async def test_an_evaluator_cannot_invent_splits_without_end(daemon: Daemon) -> None:
    run = await daemon.create()
    judge, other = daemon.client("judge"), daemon.client("other")
    for each in (judge, other):
        await each.register(fed.CLIENT_ROLE_EVALUATOR)

    def push(client: RawClient, split: str) -> Awaitable[object]:
        request = fed.PushEvaluationRequest(run=run.id, version=0, metrics={"accuracy": 0.5}, split=split)
        return client.stub.PushEvaluation(request, metadata=client.metadata)

    for number in range(MAX_SPLITS):
        await push(judge, f"split-{number:02}")
    for client in (judge, other):
        assert await refused(push(client, "one-more")) == "METRICS_INVALID"
        await push(client, "split-03")  # those that there are stay open to everybody
    series = daemon.server.metrics.registry.get_sample_value
    assert series("fedpeft_accuracy", {"run": run.id, "split": "split-15"}) == 0.5
    assert series("fedpeft_accuracy", {"run": run.id, "split": "one-more"}) is None


async def test_ids_that_never_register_cost_no_memory(daemon: Daemon) -> None:
    strangers = [daemon.client(f"stranger-{i}") for i in range(20)]
    assert {await refused(s.upload("ticket-none")) for s in strangers} == {"TICKET_NOT_FOUND"}
    (known,) = await daemon.clients("known")
    async with asyncio.timeout(5):
        while len(daemon.server.sessions._sessions) > 1:
            await asyncio.sleep(0.01)
    assert (await known.register()).protocol == 1
