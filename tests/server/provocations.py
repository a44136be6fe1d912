"""One way to provoke each reason of the first table of docs/errors.md."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable
from dataclasses import replace

import grpc

from fedpeft.adapters import payload
from fedpeft.identity import keys, requests
from fedpeft.identity.subject import Role
from fedpeft.rpc import wire
from fedpeft.v1 import access_service_pb2 as access
from fedpeft.v1 import access_service_pb2_grpc as access_grpc
from fedpeft.v1 import federation_service_pb2 as fed
from fedpeft.v1 import operator_service_pb2 as op
from fedpeft.v1 import run_pb2
from fedpeft_server.access import bounds
from fedpeft_server.rpc import interceptors
from fedpeft_server.timing import TIMING

from ..ports import free_port
from .conftest import SPEC, RawClient, config, filled, zeros
from .provoked_world import World
from .relayed_calls import RUN, make, sum_of, supply
from .secured import Federation, federation
from .secured_provocations import (
    evaluator_of_a_clients_name,
    odd_signing_request,
    old_token,
    printer,
    revoked_viewer,
    too_many_certificates,
    unknown_token,
    used_token,
    viewer_who_creates,
    viewer_who_outlives_a_certificate,
)
from .upload_provocations import (
    another_update,
    busy_server,
    excluded_update,
    full_disk,
    large_update,
    lost_spool,
    silent_client,
    slow_disk,
    slow_upload,
    ticket_of_another,
    update,
    withdrawn_ticket,
)
from .uploads.test_refusals import CALLERS


def creation(**changes: object) -> op.CreateRunHeader:
    manifest, _ = payload.encode(zeros(), SPEC.shared, "float32")
    good = {
        "config": wire.config_to_proto(config()),
        "spec": wire.spec_to_proto(SPEC),
        "backbone_fingerprint": "ab" * 32,
        "manifest": wire.manifest_to_proto(manifest),
        "request_id": "r",
    }
    return op.CreateRunHeader(**{**good, **changes})  # type: ignore[arg-type]


async def wrong_config(world: World) -> object:
    wrong = wire.config_to_proto(config())
    wrong.rounds.count = 0
    return await (await world.start()).create_raw(creation(config=wrong), [])


async def unsorted_spec(world: World) -> object:
    wrong = wire.spec_to_proto(SPEC)
    wrong.tensors.reverse()
    return await (await world.start()).create_raw(creation(spec=wrong), [])


async def no_run(world: World) -> object:
    return await (await world.start()).run("run-none")


async def no_client(world: World) -> object:
    return await (await world.start()).operator.ReadmitClient(op.ReadmitClientRequest(client="nobody"))


async def no_version(world: World) -> object:
    _, run, (client,) = await world.run()
    return await client.pull(run, 1)


async def removed_version(world: World) -> object:
    daemon = await world.start(keep_versions=2)
    run = (await daemon.create(config(rounds={"count": 3, "clients": 1}))).id
    (client,) = await daemon.clients("a")
    for number in (1, 2, 3):
        await client.push((await client.task()).ticket, filled(1.0))
        await daemon.until(run, lambda found, wanted=number: found.version == wanted)  # type: ignore[misc]
    removed = daemon.server.store.db.retention.all_removed
    while not await daemon.server.store.transact(removed):
        await asyncio.sleep(0.01)
    return await client.pull(run, 1)


async def copy_left_behind(world: World) -> None:
    daemon = await world.start()
    client = daemon.client("a")

    async def begin(process: str, *earlier: str) -> None:
        request = fed.RegisterRequest(
            min_protocol=1, max_protocol=1, role=fed.CLIENT_ROLE_TRAINER, earlier_processes=earlier
        )
        await client.stub.Register(request, metadata=(*client.metadata, (wire.PROCESS_KEY, process)))

    first, moved, back = (digit * 32 for digit in "123")
    await begin(first)
    await begin(moved, first)
    await begin(back, first)


async def second_instance(world: World) -> object:
    daemon, _, _ = await world.run()
    return await daemon.client("a", instance="f" * 32).register()


async def request_id_again(world: World) -> object:
    daemon = await world.start()
    await daemon.create()
    return await daemon.create(config(rounds={"count": 9}))


async def old_protocol(world: World) -> object:
    client = (await world.start()).client("a")
    request = fed.RegisterRequest(min_protocol=0, max_protocol=0, role=fed.CLIENT_ROLE_TRAINER)
    return await client.stub.Register(request, metadata=client.metadata)


async def unregistered(world: World) -> object:
    return await (await world.start()).client("a").wait()


async def stopped_run(world: World) -> object:
    daemon, run, (client,) = await world.run()
    task = await client.task()
    await daemon.operator.StopRun(op.StopRunRequest(run=run))
    return await client.push(task.ticket, filled(1.0))


async def paused_after_its_end(world: World) -> object:
    daemon, run, _ = await world.run()
    await daemon.operator.StopRun(op.StopRunRequest(run=run))
    return await daemon.operator.PauseRun(op.PauseRunRequest(run=run))


async def deleted_too_early(world: World) -> object:
    daemon, run, _ = await world.run()
    return await daemon.operator.DeleteRun(op.DeleteRunRequest(run=run))


async def figures_of_a_trainer(world: World) -> object:
    _, run, (client,) = await world.run()
    request = fed.PushEvaluationRequest(run=run, version=0, metrics={"accuracy": 1.0})
    return await client.stub.PushEvaluation(request, metadata=client.metadata)


async def nameless(world: World) -> object:
    client = (await world.start()).client("a")
    client.metadata = CALLERS["bad id"]  # type: ignore[assignment]
    return await client.register()


async def crowd(world: World) -> object:
    most = bounds.CALLERS[Role.CLIENT].under_way
    _, _, (client,) = await world.run(max_transfers=most + 1)  # with fewer, one that waits ends the silent ones
    streams = [client.stub.PushUpdate(metadata=client.metadata) for _ in range(most + 1)]
    async with asyncio.timeout(10):
        while not any(stream.done() for stream in streams):
            await asyncio.sleep(0.01)
    try:
        return await client.upload("ticket-none")
    finally:
        for stream in streams:
            stream.cancel()


async def malformed_message(world: World) -> object:
    daemon = await world.start()
    return await daemon.channel.unary_unary("/fedpeft.v1.OperatorService/GetRun")(b"\x0a\xff")


async def long_withdrawal(world: World) -> object:
    _, _, (client,) = await world.run()
    most = bounds.CALLS["/fedpeft.v1.FederationService/Withdraw"].message_bytes
    return await client.withdraw("ticket-none", "x" * most)


async def too_many(world: World) -> object:
    daemon = await world.start(max_clients=1)
    return await daemon.clients("a", "b")


async def questions(world: World) -> object:
    _, run, (client,) = await world.run()
    return await client.stub.CheckRuns(fed.CheckRunsRequest(runs=[run] * 33), metadata=client.metadata)


async def long_answer(world: World) -> object:
    daemon, run, _ = await world.run()
    world.monkeypatch.setattr(interceptors, "MESSAGE_LIMIT_BYTES", 100)
    return await daemon.run(run)


async def damaged_blob(world: World) -> object:
    daemon, run, (client,) = await world.run()
    (blob,) = (daemon.server.settings.data_dir / "blobs").rglob("*.safetensors")
    blob.write_bytes(blob.read_bytes()[:-1] + b"\x01")
    return await client.pull(run, 0)


async def version_that_cannot_be_made(world: World) -> object:
    daemon = await world.start()
    rounds = {"count": 2, "clients": 1, "policy": "buffered", "concurrency": 2, "min_available": 2}
    run = (await daemon.create(config(rounds=rounds))).id
    a, b = await daemon.clients("a", "b")
    first, second = await asyncio.gather(a.task(run), b.task(run))

    async def broken(*_: object) -> None:
        raise RuntimeError("no room")

    world.monkeypatch.setattr(daemon.server.store, "fold", broken)
    await a.push(first.ticket, filled(1.0))
    await daemon.until(run, lambda found: found.state == run_pb2.RUN_STATE_PAUSED)
    return await b.push(second.ticket, filled(2.0))


async def ending_server(world: World) -> object:
    daemon = await world.start()
    (client,) = await daemon.clients("a")
    waiting = asyncio.create_task(client.wait())
    async with asyncio.timeout(10):
        while not daemon.server.runs.lobby.is_waiting("a"):
            await asyncio.sleep(0.01)
    ending = asyncio.create_task(daemon.end())
    try:
        return await waiting
    finally:
        await ending


async def locked_database(world: World) -> object:
    daemon = await world.start(timing=replace(TIMING, database_busy_s=0.2))
    other = sqlite3.connect(daemon.server.settings.data_dir / "fedpeft.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    try:
        return await daemon.client("a").register()
    finally:
        other.close()


async def read_only_database(world: World) -> object:
    daemon = await world.start()

    def forbid_writing() -> None:
        with daemon.server.store.db.transactions.engine.connect() as raw:
            raw.exec_driver_sql("PRAGMA query_only = ON")

    await daemon.server.store.transact(forbid_writing)  # the connection is that of the database's thread
    return await daemon.client("a").register()


async def no_server(world: World) -> object:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{free_port()}") as channel:
        return await RawClient(channel, "a").register()


async def lost_table(world: World) -> object:
    """A statement of the server that fails is its operator's business: it crosses the network as INTERNAL only."""
    daemon, _, (client,) = await world.run()
    task = await client.task()

    def lose() -> None:
        with daemon.server.store.db.transactions.engine.begin() as raw:
            raw.exec_driver_sql("DROP TABLE updates")

    await daemon.server.store.transact(lose)
    return await client.push(task.ticket, filled(1.0))


async def too_much_said(world: World) -> object:
    client = (await world.start()).client("a")
    said = fed.Capabilities(device="x" * 1000)
    request = fed.RegisterRequest(min_protocol=1, max_protocol=1, role=fed.CLIENT_ROLE_TRAINER, capabilities=said)
    return await client.stub.Register(request, metadata=client.metadata)


async def token_of_another_list(world: World) -> object:
    daemon = await world.start()
    await daemon.clients("a", "b")
    token = (await daemon.operator.ListClients(op.ListClientsRequest(page_size=1))).next_page_token
    return await daemon.operator.ListRuns(op.ListRunsRequest(page_token=token))


async def decline_without_a_reason(world: World) -> object:
    _, run, (client,) = await world.run()
    answer = fed.AnswerOfferRequest(run=run, answer=fed.ANSWER_DECLINED)
    return await client.stub.AnswerOffer(answer, metadata=client.metadata)


async def short_digest(world: World) -> object:
    _, run, (client,) = await world.run()
    return await client.pull(run, 0, have=b"short")


async def more_steps_than_there_are(world: World) -> object:
    _, _, (client,) = await world.run()
    request = fed.GetUploadRequest(ticket=(await client.task()).ticket, step=9, steps=8)
    return await client.stub.GetUpload(request, metadata=client.metadata)


async def version_of_its_own(world: World) -> object:
    daemon, run, _ = await world.run()
    return await supply(daemon, 1, zeros(), run)


async def rollback_at_an_edge(world: World) -> object:
    daemon = await world.start()
    await make(daemon, 0, zeros())
    return await daemon.operator.RollbackRun(op.RollbackRunRequest(run=RUN, version=0))


async def late_version(world: World) -> object:
    daemon = await world.start()
    await make(daemon, 2, zeros())
    return await supply(daemon, 1, zeros())


async def version_made_again(world: World) -> object:
    daemon = await world.start()
    await make(daemon, 2, zeros())
    return await supply(daemon, 2, {name: values + 1 for name, values in zeros().items()})


async def second_agent(world: World) -> object:
    daemon = await world.start()
    await make(daemon, 2, zeros())
    return await supply(daemon, 3, zeros(), client="another")


async def sum_of_a_round_to_come(world: World) -> object:
    daemon = await world.start()
    await make(daemon, 0, zeros())
    return await sum_of(daemon, 1)


Provocation = Callable[[Federation], Awaitable[object]]


def over_tls(provoke: Provocation) -> Callable[[World], Awaitable[object]]:
    async def provocation(world: World) -> object:
        async with federation(world.request.getfixturevalue("tmp_path")) as secured:
            return await provoke(secured)

    return provocation


async def plain_renewal(world: World) -> object:
    stub = access_grpc.AccessServiceStub((await world.start()).channel)
    return await stub.Renew(access.RenewRequest(signing_request=requests.make(keys.make())))


PROVOCATIONS: dict[str, Callable[[World], Awaitable[object]]] = {
    "CONFIG_INVALID": wrong_config,
    "SPEC_INVALID": unsorted_spec,
    "MANIFEST_INVALID": update("wrong shape"),
    "EXAMPLES_INVALID": update("no examples"),
    "CHUNK_INVALID": update("empty chunk"),
    "UPLOAD_INCOMPLETE": update("stream that ends early"),
    "DIGEST_INVALID": short_digest,
    "PROGRESS_INVALID": more_steps_than_there_are,
    "PAYLOAD_INVALID": update("not a number"),
    "METRICS_INVALID": update("a loss that is not finite"),
    "ANSWER_INVALID": decline_without_a_reason,
    "CAPABILITIES_INVALID": too_much_said,
    "PAGE_INVALID": token_of_another_list,
    "MESSAGE_INVALID": malformed_message,
    "MESSAGE_TOO_LARGE": long_withdrawal,
    "OFFSET_OUT_OF_RANGE": update("wrong offset"),
    "RUN_NOT_FOUND": no_run,
    "VERSION_NOT_FOUND": no_version,
    "VERSION_REMOVED": removed_version,
    "TICKET_NOT_FOUND": update("ticket there is not"),
    "CLIENT_NOT_FOUND": no_client,
    "CLIENT_MOVED": copy_left_behind,
    "CLIENT_ID_IN_USE": second_instance,
    "UPDATE_DIFFERS": another_update,
    "REQUEST_ID_REUSED": request_id_again,
    "PROTOCOL_MISMATCH": old_protocol,
    "NOT_REGISTERED": unregistered,
    "ROUND_CLOSED": stopped_run,
    "TICKET_CLOSED": withdrawn_ticket,
    "UPDATE_EXCLUDED": excluded_update,
    "SUM_NOT_FOUND": sum_of_a_round_to_come,
    "RUN_NOT_RELAYED": version_of_its_own,
    "RUN_RELAYED": rollback_at_an_edge,
    "RELAY_DIFFERS": second_agent,
    "VERSION_SUPERSEDED": late_version,
    "VERSION_DIFFERS": version_made_again,
    "RUN_FINISHED": paused_after_its_end,
    "RUN_NOT_FINISHED": deleted_too_early,
    "TICKET_OF_ANOTHER": ticket_of_another,
    "NOT_AN_EVALUATOR": figures_of_a_trainer,
    "CLIENT_ID_INVALID": nameless,
    "UPDATE_TOO_LARGE": large_update,
    "TRANSFERS_BUSY": busy_server,
    "TOO_MANY_CLIENTS": too_many,
    "TOO_MANY_CALLS": crowd,
    "TURN_OVER": slow_upload,
    "BEING_CHECKED": slow_disk,
    "ANSWER_TOO_LARGE": long_answer,
    "RUNS_INVALID": questions,
    "DISK_FULL": full_disk,
    "CHECKSUM_MISMATCH": update("wrong digest"),
    "BLOB_CORRUPT": damaged_blob,
    "DRAINING": ending_server,
    "VERSION_BEING_MADE": version_that_cannot_be_made,
    "DATABASE_LOCKED": locked_database,
    "DATABASE_UNAVAILABLE": read_only_database,
    "TRANSFER_STALLED": silent_client,
    "SERVER_UNREACHABLE": no_server,
    "SUBJECT_INVALID": over_tls(lambda f: f.token("..")),
    "SIGNING_REQUEST_INVALID": over_tls(odd_signing_request),
    "TOKEN_NOT_FOUND": over_tls(lambda f: f.access().DeleteToken(access.DeleteTokenRequest(id="0" * 12))),
    "IDENTITY_NOT_FOUND": over_tls(lambda f: f.revoke(Role.CLIENT, "a")),
    "NAME_IN_USE": over_tls(evaluator_of_a_clients_name),
    "NO_AUTHORITY": plain_renewal,
    "SELF_REVOCATION": over_tls(lambda f: f.revoke(Role.OPERATOR, "ada")),
    "ROLE_MAY_NOT": over_tls(viewer_who_creates),
    "CERTIFICATE_MISSING": over_tls(lambda f: f.daemon(f.nobody()).create()),
    "CERTIFICATE_INVALID": over_tls(printer),
    "CERTIFICATE_EXPIRED": over_tls(viewer_who_outlives_a_certificate),
    "CERTIFICATE_REVOKED": over_tls(revoked_viewer),
    "TOKEN_UNKNOWN": over_tls(unknown_token),
    "TOKEN_EXPIRED": over_tls(old_token),
    "TOKEN_USED": over_tls(used_token),
    "TOO_MANY_CERTIFICATES": over_tls(too_many_certificates),
    "INTERNAL": lost_table,
    "STORE_UNAVAILABLE": lost_spool,
}
