"""Enrolment and renewal from the calling side, against an AccessService on real TLS sockets."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fedpeft.api.operator_client import OperatorClient
from fedpeft.errors import (
    Draining,
    IdentityInvalid,
    Internal,
    ServerUnreachable,
    StateInvalid,
    TokenExpired,
    TokenUnknown,
    TokenUsed,
)
from fedpeft.identity import authority as authority_module
from fedpeft.identity import folder, keys, lock
from fedpeft.identity.authority import Authority
from fedpeft.identity.folder import Identity
from fedpeft.identity.subject import Role, Subject
from fedpeft.identity.token import EnrollmentToken
from fedpeft.rpc import enrolment
from fedpeft.rpc.channel import open_channel
from fedpeft.v1 import access_service_pb2_grpc as pb_grpc

from ..operator import access_double
from ..operator.access_double import Double, serving


@pytest.fixture
async def double(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Double]:
    monkeypatch.setattr(enrolment, "PAUSE_S", 0.01)
    async with serving(Double()) as made:
        yield made


async def test_a_token_becomes_an_identity(double: Double, tmp_path: Path) -> None:
    identity = await enrolment.enroll(double.token("ada", Role.OPERATOR), tmp_path / "identity")
    assert identity.chain == Identity.load(tmp_path / "identity").chain
    assert identity.subject == Subject(Role.OPERATOR, "ada")
    assert identity.server == double.server
    assert identity.authority == (double.authority.certificate,)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "identity").iterdir()}
    assert modes == dict.fromkeys(("key.pem", "certificate.pem", "authority.pem", "identity.toml"), 0o600)
    assert stat.S_IMODE((tmp_path / "identity").stat().st_mode) == 0o700


async def test_after_a_lost_answer_the_same_token_works_again(double: Double, tmp_path: Path) -> None:
    token, into = double.token(), tmp_path / "identity"
    double.lose_answers = 1
    with pytest.raises(Internal):
        await enrolment.enroll(token, into)
    assert os.listdir(into) == ["key.pem"]
    key = folder.take_key(into)
    identity = await enrolment.enroll(token, into)
    assert identity.key.private_numbers() == key.private_numbers()
    with pytest.raises(TokenUsed):
        await enrolment.enroll(token, tmp_path / "elsewhere")


async def test_a_server_that_restarts_is_asked_again(double: Double, tmp_path: Path) -> None:
    double.failures = [Draining("the server is shutting down")] * 2
    assert (await enrolment.enroll(double.token(), tmp_path / "identity")).subject.name == "noto"
    assert double.asked == ["Enroll"] * 3


async def test_what_the_server_refuses_is_not_asked_again(double: Double, tmp_path: Path) -> None:
    double.failures = [TokenExpired("the token ended an hour ago; ask the operator for a new one")]
    with pytest.raises(TokenExpired):
        await enrolment.enroll(double.token(), tmp_path / "identity")
    unknown = EnrollmentToken.make(double.server, double.enrollment, double.authority.certificate)
    with pytest.raises(TokenUnknown):
        await enrolment.enroll(unknown, tmp_path / "identity")
    assert double.asked == ["Enroll"] * 2


async def test_somebody_who_is_enrolled_stays(double: Double, tmp_path: Path) -> None:
    into = tmp_path / "identity"
    before = await enrolment.enroll(double.token("first"), into)
    with pytest.raises(IdentityInvalid, match=r"is enrolled already, as client first until .* UTC; --replace"):
        await enrolment.enroll(double.token("second"), into)
    assert Identity.load(into).chain == before.chain


async def test_a_replaced_identity_has_a_new_key(double: Double, tmp_path: Path) -> None:
    into = tmp_path / "identity"
    before = await enrolment.enroll(double.token("first"), into)
    double.lose_answers = 1
    token = double.token("second", Role.EVALUATOR)
    with pytest.raises(Internal):
        await enrolment.enroll(token, into, replace=True)
    assert Identity.load(into).chain == before.chain
    after = await enrolment.enroll(token, into, replace=True)
    assert after.subject == Subject(Role.EVALUATOR, "second")
    assert after.key.public_key() != before.key.public_key()
    assert os.listdir(tmp_path) == ["identity"]


async def test_the_key_of_an_earlier_attempt_is_for_its_own_token(double: Double, tmp_path: Path) -> None:
    into, aside = tmp_path / "identity", tmp_path / "identity.next"
    await enrolment.enroll(double.token("first"), into)
    double.lose_answers = 1
    with pytest.raises(Internal):
        await enrolment.enroll(double.token("second"), into, replace=True)
    left = folder.take_key(aside)
    after = await enrolment.enroll(double.token("third"), into, replace=True)
    assert after.key.public_key() != left.public_key()
    folder.take_key(aside)  # of nobody knows which attempt
    folder.key_path(aside).chmod(0o644)
    assert (await enrolment.enroll(double.token("fourth"), into, replace=True)).subject.name == "fourth"
    assert os.listdir(tmp_path) == ["identity"]


async def test_what_cannot_be_read_can_be_replaced(double: Double, tmp_path: Path) -> None:
    into = tmp_path / "identity"
    await enrolment.enroll(double.token("first"), into)
    folder.certificate_path(into).write_text("no certificate")
    with pytest.raises(IdentityInvalid, match="though not in a way that can be used"):
        await enrolment.enroll(double.token("second"), into)
    assert (await enrolment.enroll(double.token("second"), into, replace=True)).subject.name == "second"


async def test_the_server_is_checked_before_the_secret_leaves(double: Double, tmp_path: Path) -> None:
    token = double.token()
    elsewhere = EnrollmentToken(token.server, token.enrollment, Authority.make("another").certificate, token.secret)
    with pytest.raises(ServerUnreachable, match="shows a certificate of 'CN=a federation', and this side trusts"):
        await enrolment.enroll(elsewhere, tmp_path / "identity")
    assert double.asked == []


async def test_a_closed_port_is_named(double: Double, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        closed = f"127.0.0.1:{probe.getsockname()[1]}"
        token = EnrollmentToken.make(double.server, closed, double.authority.certificate)
        with pytest.raises(ServerUnreachable, match="nothing listens on port"):
            await enrolment.enroll(token, tmp_path / "identity")


async def test_a_port_that_wants_a_certificate_is_named(double: Double, tmp_path: Path) -> None:
    token = EnrollmentToken.make(double.server, double.server, double.authority.certificate)
    with pytest.raises(ServerUnreachable, match="not the port where devices enroll"):
        await enrolment.enroll(token, tmp_path / "identity")


async def test_a_token_with_an_address_that_is_none(double: Double, tmp_path: Path) -> None:
    token = EnrollmentToken.make(double.server, "nowhere", double.authority.certificate)
    with pytest.raises(IdentityInvalid, match="gives an invalid address: 'nowhere' is not HOST:PORT"):
        await enrolment.enroll(token, tmp_path / "identity")


async def test_a_clock_that_is_behind_is_told(double: Double, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(authority_module, "SKEW", timedelta(hours=-3))
    double.life = timedelta(hours=9)
    with pytest.raises(IdentityInvalid, match=r"begins at .* and this machine's clock says .*; set the clock"):
        await enrolment.enroll(double.token(), tmp_path / "identity")
    assert not folder.exists(tmp_path / "identity")


@pytest.mark.skipif(os.geteuid() != 0 or not Path("/proc").is_dir(), reason="needs a folder that root cannot write")
async def test_a_folder_that_cannot_be_written(double: Double) -> None:
    with pytest.raises(StateInvalid, match=r"writing /proc/nowhere/key\.pem failed"):
        await enrolment.enroll(double.token(), Path("/proc/nowhere"))


async def test_a_certificate_is_renewed_for_the_same_key(double: Double, tmp_path: Path) -> None:
    double.life = timedelta(minutes=1)
    old = double.enrolled(tmp_path / "identity")
    double.life = timedelta(hours=2)
    async with open_channel(double.server, old) as channel:
        new = await enrolment.renewed(old, pb_grpc.AccessServiceStub(channel).Renew)
    assert new.chain == Identity.load(tmp_path / "identity").chain != old.chain
    assert new.key.private_numbers() == old.key.private_numbers()
    assert new.subject == old.subject
    assert new.certificate.not_valid_after_utc > datetime.now(UTC) + timedelta(hours=1)


async def test_those_who_renew_one_identity_at_once_renew_it_once(double: Double, tmp_path: Path) -> None:
    double.life = timedelta(minutes=1)
    old = double.enrolled(tmp_path / "identity")
    double.life = timedelta(hours=2)

    async def command() -> Identity | None:
        async with OperatorClient(double.server, old) as client:
            return client._identity

    used = await asyncio.gather(*(command() for _ in range(8)))
    assert double.asked == ["Renew"]
    new = Identity.load(tmp_path / "identity")
    assert new.chain != old.chain
    assert all(identity is not None and identity.chain == new.chain for identity in used)


async def test_one_who_renews_for_too_long_is_not_waited_for(
    double: Double, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(enrolment, "ANSWER_S", 0.1)
    identity = double.enrolled(tmp_path / "identity")
    async with lock.held(identity.folder, 1), open_channel(double.server, identity) as channel:
        with pytest.raises(StateInvalid, match=r"another process has held .*identity for 0\.1 s"):
            await enrolment.renewed(identity, pb_grpc.AccessServiceStub(channel).Renew)
    assert double.asked == []


async def test_the_certificate_of_a_key_that_was_replaced_is_not_renewed(double: Double, tmp_path: Path) -> None:
    old = double.enrolled(tmp_path / "identity")
    folder.key_path(old.folder).write_bytes(keys.to_pem(keys.make()))
    async with open_channel(double.server, old) as channel:
        with pytest.raises(IdentityInvalid, match=r"key\.pem is another key by now"):
            await enrolment.renewed(old, pb_grpc.AccessServiceStub(channel).Renew)
    assert double.asked == []


async def test_a_renewal_for_another_is_not_written(
    double: Double, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = double.enrolled(tmp_path / "identity")
    monkeypatch.setattr(access_double, "caller", other)
    async with open_channel(double.server, old) as channel:
        with pytest.raises(Internal, match="renewed the certificate of client noto for another"):
            await enrolment.renewed(old, pb_grpc.AccessServiceStub(channel).Renew)
    assert Identity.load(tmp_path / "identity").chain == old.chain


def other(_: object) -> Subject:
    return Subject(Role.OPERATOR, "mallory")
