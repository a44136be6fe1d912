"""A revocation ends what its subject does, outlives the server, and is undone by a new token; renewal."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from structlog.testing import capture_logs

from fedpeft.errors import DatabaseUnavailable, DiskFull, FedpeftError
from fedpeft.identity import certificates, keys, requests
from fedpeft.identity.roles import TO_PROTO
from fedpeft.identity.subject import Role, Subject
from fedpeft.rpc.status import from_rpc_error
from fedpeft.v1 import access_service_pb2 as access
from fedpeft.v1 import federation_service_pb2 as fed
from fedpeft.v1 import operator_service_pb2 as op

from ..conftest import RawClient, config, filled, refused
from ..secured import HOUR, Federation, federation, held, outcome


async def test_a_revocation_ends_what_its_owner_waits_for_and_frees_the_round(secured: Federation) -> None:
    run, clients, tasks = await held(secured, "a", "b")
    waiting = asyncio.create_task(clients["a"].look())
    await clients["b"].push(tasks["b"].ticket, filled(1.0))
    await asyncio.sleep(0.1)
    assert not waiting.done() or waiting.result().HasField("training")
    shown = await secured.revoke(Role.CLIENT, "a")
    assert shown.HasField("revoked_at") and shown.reason == "lost"
    again = await secured.revoke(Role.CLIENT, "a", "still lost")
    assert (again.revoked_at, again.reason) == (shown.revoked_at, "lost"), "the first counts"
    assert await refused(clients["a"].look()) == "CERTIFICATE_REVOKED"
    operator = secured.daemon(secured.operators())
    (round_,) = await operator.rounds(run)
    assert {t.client: t.reason for t in round_.tickets}["a"] == "its certificate was revoked"
    assert [e.actor for e in await secured.audit() if e.action == "ticket.withdrawn"] == ["operator ada"]


async def test_a_stream_that_waits_for_news_is_ended_at_once(secured: Federation) -> None:
    run, _, _ = await held(secured, "a")
    viewer = secured.daemon(secured.certificate(Role.VIEWER, "eve"))
    watch = viewer.operator.WatchRun(op.WatchRunRequest(run=run))
    assert isinstance(await watch.read(), op.WatchRunResponse)
    await secured.revoke(Role.VIEWER, "eve")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async with asyncio.timeout(5):
            while await watch.read() is not grpc.aio.EOF:
                continue
    assert from_rpc_error(caught.value).reason == "CERTIFICATE_REVOKED"


@asynccontextmanager
async def slow_database(secured: Federation) -> AsyncIterator[None]:
    """Holds the database's one thread for as long as the block lasts."""
    go_on = threading.Event()
    held = asyncio.create_task(secured.server.store.transact(go_on.wait))
    try:
        yield
    finally:
        go_on.set()
        await held


async def test_a_revocation_holds_at_once_and_though_its_operator_goes_away(secured: Federation) -> None:
    run, clients, _ = await held(secured, "a", "b")
    async with slow_database(secured):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            request = access.RevokeIdentityRequest(role=TO_PROTO[Role.CLIENT], name="a")
            await secured.access().RevokeIdentity(request, timeout=0.3)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        early = asyncio.create_task(refused(clients["a"].look()))
        await asyncio.sleep(0.2)  # it is refused already, and waits for its line in the audit log
    assert await early == "CERTIFICATE_REVOKED", "before the revocation was written"
    assert await refused(clients["a"].look()) == "CERTIFICATE_REVOKED"
    operator = secured.daemon(secured.operators())
    async with asyncio.timeout(5):
        while (await operator.rounds(run))[0].tickets[0].reason != "its certificate was revoked":
            await asyncio.sleep(0.05)
    (identity,) = [i for i in await identities(secured) if i.name == "a"]
    assert identity.HasField("revoked_at")


async def test_who_could_not_be_written_down_is_not_let_in_and_can_be_revoked_later(
    secured: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    stranger, call = secured.certificate(Role.VIEWER, "eve"), "/fedpeft.v1.OperatorService/ListRuns"

    def full(subject: Subject) -> None:
        raise DiskFull("no room")

    with monkeypatch.context() as patch:
        patch.setattr(secured.server.store.db.identities, "seen", full)
        assert [await outcome(stranger, call) for _ in range(2)] == ["DISK_FULL"] * 2
    assert await refused(secured.revoke(Role.VIEWER, "eve")) == "IDENTITY_NOT_FOUND"
    assert await outcome(stranger, call) == "OK", "nobody was revoked"
    await secured.revoke(Role.VIEWER, "eve")
    assert await outcome(stranger, call) == "CERTIFICATE_REVOKED"


@pytest.mark.parametrize(
    ("fault", "then"), [(DiskFull("no room"), "OK"), (DatabaseUnavailable("broken off"), "CERTIFICATE_REVOKED")]
)
async def test_who_could_not_be_revoked_is_refused_only_if_that_may_be_written(
    secured: Federation, monkeypatch: pytest.MonkeyPatch, fault: FedpeftError, then: str
) -> None:
    viewer, call = secured.certificate(Role.VIEWER, "eve"), "/fedpeft.v1.OperatorService/ListRuns"
    assert await outcome(viewer, call) == "OK"

    def failing(*args: object, **kwargs: object) -> None:
        raise fault

    with monkeypatch.context() as patch, capture_logs() as logs:
        patch.setattr(secured.server.store.db.identities, "revoke", failing)
        assert await refused(secured.revoke(Role.VIEWER, "eve")) == fault.reason
    assert await outcome(viewer, call) == then
    assert any("is unknown" in entry["event"] for entry in logs) is (then != "OK")
    await secured.revoke(Role.VIEWER, "eve")
    with monkeypatch.context() as patch:
        patch.setattr(secured.server.store.db.identities, "revoke", failing)
        assert await refused(secured.revoke(Role.VIEWER, "eve", "again")) == fault.reason
    assert await outcome(viewer, call) == "CERTIFICATE_REVOKED", "the first revocation stands"


@pytest.mark.parametrize("revoked", [True, False], ids=["revoked", "left"])
async def test_no_figures_are_awaited_of_an_evaluator_that_is_gone(secured: Federation, revoked: bool) -> None:
    operator = secured.daemon(secured.operators())
    run = (await operator.create(config(rounds={"count": 1, "clients": 1}))).id
    channel = secured.certificate(Role.EVALUATOR, "judge")
    judge = RawClient(channel, "judge")
    await judge.register(fed.CLIENT_ROLE_EVALUATOR)
    assert (await judge.wait()).evaluation.version == 0
    secured.server.runs.show_backlog(secured.server.runs.get(run))
    backlog = secured.server.metrics.evaluation_backlog.labels(run)
    assert ([e.evaluator for e in (await operator.run(run)).evaluators], backlog._value.get()) == (["judge"], 1)
    if revoked:
        await secured.revoke(Role.EVALUATOR, "judge")
    else:
        await secured.access(channel).Leave(access.LeaveRequest())
    assert ([*(await operator.run(run)).evaluators], backlog._value.get()) == ([], 0)


async def test_who_enrolled_is_not_told_to_be_a_stranger(secured: Federation) -> None:
    token, key = await secured.token("a"), keys.make()
    request = access.EnrollRequest(secret=token.secret, signing_request=requests.make(key))
    assert await outcome(secured.nobody(), "/grpc.health.v1.Health/Check") == "OK"  # the process there has begun
    async with slow_database(secured):
        with pytest.raises(grpc.aio.AioRpcError):
            await secured.access(secured.nobody()).Enroll(request, timeout=0.3)
    assert await outcome(secured.certificate(Role.CLIENT, "a"), "/grpc.health.v1.Health/Check") == "OK"
    told = [entry.action for entry in await secured.audit() if entry.object == "client a"]
    assert told == ["token.created", "identity.enrolled"]


async def test_an_upload_under_way_is_ended_by_a_revocation(secured: Federation) -> None:
    from fedpeft.adapters import payload

    from ..conftest import SPEC, header

    _, clients, tasks = await held(secured, "a")
    manifest, _ = payload.encode(filled(1.0), SPEC.sent(1), "float32")

    async def messages() -> AsyncIterator[fed.PushUpdateRequest]:
        yield fed.PushUpdateRequest(header=header(tasks["a"].ticket, manifest))
        await asyncio.sleep(30)

    pushing = asyncio.ensure_future(collect(clients["a"].stub.PushUpdate(messages(), metadata=clients["a"].metadata)))
    await asyncio.sleep(0.2)
    await secured.revoke(Role.CLIENT, "a")
    async with asyncio.timeout(5):
        assert await refused(pushing) == "CERTIFICATE_REVOKED"


async def collect(call: Any) -> Any:
    return await call


async def test_a_new_token_enrolls_the_revoked_again_and_the_old_certificate_stays_refused(secured: Federation) -> None:
    old = await secured.enroll(await secured.token("a"))
    unused = await secured.token("a")
    await secured.revoke(Role.CLIENT, "a")
    assert await refused(secured.enroll(unused)) == "TOKEN_UNKNOWN", "its tokens went with it"
    new = await secured.enroll(await secured.token("a"))
    assert await outcome(new, "/fedpeft.v1.FederationService/AwaitRound") == "CLIENT_ID_INVALID"
    assert await outcome(old, "/fedpeft.v1.FederationService/AwaitRound") == "CERTIFICATE_REVOKED"
    (identity,) = [i for i in await identities(secured) if i.name == "a"]
    assert not identity.HasField("revoked_at")


LIST = "/fedpeft.v1.OperatorService/ListRuns"


async def test_a_revoked_name_does_not_come_back_with_another_certificate(secured: Federation) -> None:
    assert await outcome(secured.certificate(Role.VIEWER, "eve"), LIST) == "OK"
    await secured.revoke(Role.VIEWER, "eve")
    assert await outcome(await secured.next_certificate(Role.VIEWER, "eve"), LIST) == "CERTIFICATE_REVOKED"


async def test_a_name_that_is_restored_comes_back_with_a_certificate_that_begins_afterwards(
    secured: Federation,
) -> None:
    before = secured.certificate(Role.VIEWER, "eve")
    assert await outcome(before, LIST) == "OK"
    await secured.revoke(Role.VIEWER, "eve")
    meanwhile = await secured.next_certificate(Role.VIEWER, "eve")
    shown = await secured.restore(Role.VIEWER, "eve")
    assert not shown.HasField("revoked_at") and shown.HasField("restored_at")
    afterwards = await secured.next_certificate(Role.VIEWER, "eve")
    found = [await outcome(channel, LIST) for channel in (before, meanwhile, afterwards)]
    assert found == ["CERTIFICATE_REVOKED", "CERTIFICATE_REVOKED", "OK"]
    await secured.revoke(Role.VIEWER, "eve")
    assert await outcome(afterwards, LIST) == "CERTIFICATE_REVOKED", "a second time"
    told = [(e.actor, e.action) for e in await secured.audit() if e.object == "viewer eve" and "re" in e.action]
    assert told == [("operator ada", f"identity.{deed}") for deed in ("revoked", "restored", "revoked")]


async def test_a_name_is_revoked_that_nobody_has_called_by_if_that_is_meant(secured: Federation) -> None:
    assert await refused(secured.revoke(Role.OPERATOR, "bo")) == "IDENTITY_NOT_FOUND", "a slip in the name, perhaps"
    await secured.revoke(Role.OPERATOR, "bo", unseen=True)
    assert await outcome(secured.certificate(Role.OPERATOR, "bo"), LIST) == "CERTIFICATE_REVOKED"
    await secured.restore(Role.OPERATOR, "bo")
    assert await outcome(await secured.next_certificate(Role.OPERATOR, "bo"), LIST) == "OK"


async def test_restoring_the_unknown_is_an_error_and_the_unrevoked_nothing(secured: Federation) -> None:
    assert await refused(secured.restore(Role.CLIENT, "nobody")) == "IDENTITY_NOT_FOUND"
    shown = await secured.restore(Role.OPERATOR, "ada")
    assert not shown.HasField("restored_at")
    assert "identity.restored" not in [entry.action for entry in await secured.audit()]


async def test_a_restoration_outlives_the_server(tmp_path: Path) -> None:
    async with federation(tmp_path) as before:
        old = before.certificate(Role.VIEWER, "eve")
        assert await outcome(old, LIST) == "OK"
        await before.revoke(Role.VIEWER, "eve")
        await before.restore(Role.VIEWER, "eve")
    async with federation(tmp_path) as after:
        assert await outcome(after.certificate(Role.VIEWER, "eve"), LIST) == "CERTIFICATE_REVOKED", "begins too early"
        assert await outcome(await after.next_certificate(Role.VIEWER, "eve"), LIST) == "OK"


async def test_an_evaluator_cannot_take_a_clients_name_whoever_certified_it(secured: Federation) -> None:
    client = RawClient(secured.certificate(Role.CLIENT, "x"), "x")
    await client.register()
    evaluator = RawClient(secured.certificate(Role.EVALUATOR, "x"), "x")
    assert await refused(evaluator.register(fed.CLIENT_ROLE_EVALUATOR)) == "NAME_IN_USE"
    assert await refused(evaluator.look()) == "NAME_IN_USE"
    await secured.revoke(Role.CLIENT, "x")
    assert await refused(evaluator.look()) == "NOT_REGISTERED", "it is nobody's trainer"
    await evaluator.register(fed.CLIENT_ROLE_EVALUATOR)
    assert await refused(secured.restore(Role.CLIENT, "x")) == "NAME_IN_USE"
    waiting = asyncio.create_task(evaluator.look())
    assert not (await asyncio.wait({waiting}, timeout=0.5))[0], "it may wait for work"
    waiting.cancel()


async def identities(secured: Federation) -> list[access.Identity]:
    return list((await secured.access().ListIdentities(access.ListIdentitiesRequest())).identities)


async def test_a_revocation_outlives_the_server(tmp_path: Path) -> None:
    async with federation(tmp_path) as before:
        key = keys.make()
        await before.enroll(await before.token("a"), key)
        certificate = before.authority.issue(before.operator.subject, key.public_key(), HOUR)
        await before.revoke(Role.CLIENT, "a")
    async with federation(tmp_path) as after:
        stale = after.certificate(Role.CLIENT, "a", at=datetime.now(UTC) - timedelta(seconds=30))
        assert await outcome(stale, "/fedpeft.v1.FederationService/Register") == "CERTIFICATE_REVOKED"
        assert certificate.issuer == after.authority.certificate.subject


async def test_nobody_is_revoked_who_is_unknown_or_asks_for_it(secured: Federation) -> None:
    assert await refused(secured.revoke(Role.CLIENT, "nobody")) == "IDENTITY_NOT_FOUND"
    assert await refused(secured.revoke(Role.OPERATOR, "ada")) == "SELF_REVOCATION"


async def test_a_certificate_is_renewed_for_the_one_who_asks(secured: Federation) -> None:
    key = keys.make()
    channel = await secured.enroll(await secured.token("a"), key)
    answer = await secured.access(channel).Renew(access.RenewRequest(signing_request=requests.make(key)))
    renewed = certificates.parse(answer.certificate)[0]
    assert str(certificates.subject(renewed)) == "client a"
    assert renewed.not_valid_after_utc - datetime.now(UTC) > timedelta(days=6)
    await RawClient(secured.with_certificate(key, renewed), "a").register()
    assert "identity.renewed" in [entry.action for entry in await secured.audit()]


async def test_a_connection_does_not_outlive_its_certificate(secured: Federation) -> None:
    short = secured.certificate(Role.VIEWER, "eve", life=timedelta(seconds=2))
    viewer = secured.daemon(short)
    assert not (await viewer.operator.ListRuns(op.ListRunsRequest())).runs
    await asyncio.sleep(2.1)
    assert await outcome(short, "/fedpeft.v1.OperatorService/ListRuns") == "CERTIFICATE_EXPIRED"


async def test_who_leaves_is_answered_given_back_and_awaited_no_more(secured: Federation) -> None:
    run, clients, tasks = await held(secured, "a", "b")
    leaver = secured.access(secured.certificate(Role.CLIENT, "a"))  # by a connection beside that of its agent
    answer = await leaver.Leave(access.LeaveRequest(reason="the study is over"))
    assert answer.tickets == 1
    assert await refused(clients["a"].look()) == "CERTIFICATE_REVOKED"
    (identity,) = [i for i in await identities(secured) if i.name == "a"]
    assert identity.HasField("revoked_at") and identity.reason == "the study is over"
    operator = secured.daemon(secured.operators())
    (round_,) = await operator.rounds(run)
    assert {t.client: t.reason for t in round_.tickets}["a"] == "it left"
    told = [(e.actor, e.action) for e in await secured.audit() if e.object == "client a"]
    assert told[-1] == ("client a", "identity.left")
    registered = await secured.server.sessions.silences(time.time())
    assert sum(count for (role, _), count in registered.items() if role == "trainer") == 1, "b alone"
    await clients["b"].push(tasks["b"].ticket, filled(1.0))


async def test_an_evaluator_leaves_and_a_person_does_not(secured: Federation) -> None:
    evaluator = secured.certificate(Role.EVALUATOR, "judge")
    assert (await secured.access(evaluator).Leave(access.LeaveRequest())).tickets == 0
    assert await outcome(evaluator, "/grpc.health.v1.Health/Check") == "CERTIFICATE_REVOKED"
    assert await refused(secured.access().Leave(access.LeaveRequest())) == "ROLE_MAY_NOT"


async def test_who_left_is_not_counted_as_silent_after_a_restart_and_comes_back_with_a_token(tmp_path: Path) -> None:
    async with federation(tmp_path) as before:
        channel = await before.enroll(await before.token("a"))
        await RawClient(channel, "a").register()
        await before.access(channel).Leave(access.LeaveRequest())
    async with federation(tmp_path) as after:
        assert not await after.server.sessions.silences(time.time())
        await RawClient(await after.enroll(await after.token("a")), "a").register()
        assert sum((await after.server.sessions.silences(time.time())).values()) == 1
