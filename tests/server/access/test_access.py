"""Access: every call x role x credential, enrolment, the transport, the audit log, and `init`."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import ssl
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.x509.oid import NameOID

from fedpeft.errors import DatabaseLocked, IdentityInvalid, SettingsInvalid
from fedpeft.identity import audit, certificates, keys, requests
from fedpeft.identity.audit import AuditEntry
from fedpeft.identity.authority import Authority
from fedpeft.identity.roles import TO_PROTO
from fedpeft.identity.subject import Role, Subject
from fedpeft.rpc import wire
from fedpeft.rpc.status import from_rpc_error
from fedpeft.v1 import access_service_pb2 as access
from fedpeft.v1 import federation_service_pb2 as fed
from fedpeft.v1 import operator_service_pb2 as op
from fedpeft.v1 import run_pb2
from fedpeft_server.access.files import Files
from fedpeft_server.access.rights import RIGHTS
from fedpeft_server.commands import init
from fedpeft_server.settings import Settings
from fedpeft_server.store.identities import Identities, Issue, Issued
from fedpeft_server.store.rows import IdentityRow, TokenRow
from fedpeft_server.timing import TIMING

from ..conftest import RawClient, StartDaemon, config, filled, refused
from ..secured import HOUR, METHODS, Federation, federation, held, outcome

DENIALS = {"ROLE_MAY_NOT", "CERTIFICATE_MISSING", "CERTIFICATE_INVALID", "CERTIFICATE_EXPIRED", "CERTIFICATE_REVOKED"}


def test_the_table_of_rights_has_every_call_that_is_served_and_no_other() -> None:
    assert RIGHTS.keys() == METHODS.keys()


async def test_every_call_by_every_role(secured: Federation) -> None:
    callers: dict[Role | None, grpc.aio.Channel] = {role: secured.certificate(role, f"my-{role}") for role in Role}
    callers[None] = secured.nobody()
    wrong = []
    last = sorted(RIGHTS.items(), key=lambda right: right[0].endswith("/Leave"))  # which ends all other rights
    for method, may in last:
        for role, channel in callers.items():
            found = await outcome(channel, method)
            refusal = "CERTIFICATE_MISSING" if role is None else "ROLE_MAY_NOT"
            if (found in DENIALS) if role in may else (found != refusal):
                wrong.append((method, role, found))
    assert not wrong


async def test_every_call_by_every_role_with_a_bad_credential(secured: Federation) -> None:
    long_ago = datetime.now(UTC) - timedelta(days=2)
    stranger = Authority.make("another federation")
    key = keys.make()
    nameless = secured.with_certificate(key, signed_without_an_id(secured.authority, key))
    wrong = []
    for role in Role:
        gone = secured.certificate(role, "gone", at=long_ago, life=timedelta(days=9))
        await outcome(gone, "/grpc.health.v1.Health/Check")
        await secured.revoke(role, "gone")
        wrong += [(m, role) for m in RIGHTS if await outcome(gone, m) != "CERTIFICATE_REVOKED"]
        # These two do not get through the handshake, whatever they would call.
        late = secured.certificate(role, "late", at=long_ago, life=HOUR)
        foreign = secured.with_certificate(key, stranger.issue(Subject(role, "foreign"), key.public_key(), HOUR))
        for outsider in (late, foreign):
            assert await outcome(outsider, "/fedpeft.v1.OperatorService/ListRuns") == "SERVER_UNREACHABLE"
    wrong += [m for m in RIGHTS if await outcome(nameless, m) != "CERTIFICATE_INVALID"]
    assert not wrong


def signed_without_an_id(authority: Authority, key: keys.PrivateKey) -> x509.Certificate:
    """Returns a certificate that the authority signed for something else, a web server perhaps."""
    now = datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "printer")])
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(authority.certificate.subject)
    builder = builder.public_key(key.public_key()).serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(now - HOUR).not_valid_after(now + HOUR)
    builder = builder.add_extension(
        x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key()), critical=False
    )
    return builder.sign(authority.key, hashes.SHA256())


# Who a client is


async def test_a_ticket_is_worth_nothing_in_anothers_hands(secured: Federation) -> None:
    _, clients, tasks = await held(secured, "a", "b")
    assert await refused(clients["b"].push(tasks["a"].ticket, filled(1.0))) == "TICKET_OF_ANOTHER"
    assert await refused(clients["b"].withdraw(tasks["a"].ticket)) == "TICKET_OF_ANOTHER"
    assert await refused(clients["b"].upload(tasks["a"].ticket)) == "TICKET_OF_ANOTHER"
    assert (await clients["a"].push(tasks["a"].ticket, filled(1.0))).ticket == tasks["a"].ticket


async def test_a_ticket_of_a_deleted_run_is_found_by_nobody(secured: Federation) -> None:
    run, clients, tasks = await held(secured, "a")
    operator = secured.daemon(secured.operators())
    await operator.operator.StopRun(op.StopRunRequest(run=run))
    await operator.operator.DeleteRun(op.DeleteRunRequest(run=run))
    assert await refused(clients["a"].push(tasks["a"].ticket, filled(1.0))) == "TICKET_NOT_FOUND"
    assert await refused(clients["a"].pull(run, 0)) == "RUN_NOT_FOUND"


async def test_the_name_is_the_certificates_whatever_the_metadata_say(secured: Federation) -> None:
    channel = secured.certificate(Role.CLIENT, "a")
    assert await refused(RawClient(channel, "b").register()) == "CLIENT_ID_INVALID"
    unsaid = RawClient(channel, "a")
    unsaid.metadata = ((wire.INSTANCE_KEY, "0" * 32),)
    await unsaid.register()
    assert [row.id for row in await secured.server.store.transact(secured.server.store.db.clients)] == ["a"]


@pytest.mark.parametrize(
    ("role", "registers"), [(Role.CLIENT, fed.CLIENT_ROLE_EVALUATOR), (Role.EVALUATOR, fed.CLIENT_ROLE_TRAINER)]
)
async def test_a_certificate_registers_in_its_own_role_only(secured: Federation, role: Role, registers: int) -> None:
    client = RawClient(secured.certificate(role, "a"), "a")
    assert await refused(client.register(registers)) == "ROLE_MAY_NOT"


# Enrolment


async def test_a_token_enrolls_once_and_the_same_key_as_often_as_its_answer_is_lost(secured: Federation) -> None:
    token, key = await secured.token("site-a"), keys.make()
    await secured.enroll(token, key)
    channel = await secured.enroll(token, key)
    await RawClient(channel, "site-a").register()
    assert await refused(secured.enroll(token)) == "TOKEN_USED"
    with pytest.raises(grpc.aio.AioRpcError):
        await secured.enroll(token)
    actions = [entry.action for entry in await secured.audit()]
    assert actions.count("identity.enrolled") == 2
    assert actions.count("call.refused") == 1, "the same refusal again is not worth another line"


async def test_who_runs_on_a_copied_state_directory_is_told_what_fits_a_certificate(secured: Federation) -> None:
    token, key = await secured.token("site-a"), keys.make()
    one, other = [RawClient(await secured.enroll(token, key), "site-a") for _ in range(2)]
    for client, process in ((one, "1"), (other, "2")):
        client.metadata = (*client.metadata, (wire.PROCESS_KEY, process * 32))
        await client.register()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await one.look()
    said = from_rpc_error(caught.value).message
    assert "give each device a token and a state directory of its own" in said and "--name" not in said


async def test_a_secret_is_kept_nowhere(secured: Federation, tmp_path: Path) -> None:
    token = await secured.token("site-a")
    await secured.enroll(token)
    files = contents(tmp_path)
    assert any(name.startswith("fedpeft.db") for name in files)
    for data in files.values():
        assert token.secret not in data and token.encode().encode() not in data
        assert token.secret.hex().encode() not in data
    shown = (await secured.access().ListTokens(access.ListTokensRequest())).tokens
    assert [(t.name, t.created_by, t.HasField("used_at")) for t in shown] == [("site-a", "operator ada", True)]
    assert token.encode() not in str(shown) and token.encode() not in str(await secured.audit())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


async def test_what_is_wrong_with_a_token_is_said(secured: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    deleted = await secured.token("a")
    await secured.access().DeleteToken(access.DeleteTokenRequest(id=deleted.digest.hex()[:12]))
    assert await refused(secured.enroll(deleted)) == "TOKEN_UNKNOWN"
    late = await secured.token("b", life_s=60)
    now = datetime.now().timestamp()
    monkeypatch.setattr("fedpeft_server.rpc.access.time.time", lambda: now + 61)
    assert await refused(secured.enroll(late)) == "TOKEN_EXPIRED"


async def test_tokens_that_expired_long_ago_are_forgotten_and_the_audit_log_is_not(tmp_path: Path) -> None:
    async with federation(tmp_path) as before:
        long_ago = datetime.now().timestamp() - TIMING.tokens_kept_s
        for name, expires_at in (
            ("old", long_ago - 60),
            ("late", long_ago + 60),
            ("good", long_ago + TIMING.tokens_kept_s + 60),
        ):
            row = TokenRow(name.ljust(64, "0"), Subject(Role.CLIENT, name), long_ago, "operator ada", expires_at)
            await before.server.store.transact(before.server.store.db.identities.add_token, row)
    async with federation(tmp_path) as after:
        shown = (await after.access().ListTokens(access.ListTokensRequest())).tokens
        assert [token.name for token in shown] == ["good", "late"]
        told = [entry.object for entry in await after.audit() if entry.action == "token.created"]
        assert told == ["client old", "client late", "client good"]


@pytest.mark.parametrize(
    "bad", [{"name": ""}, {"name": "../x"}, {"role": 0}, {"role": 9}, {"life_s": 59}, {"life_s": 2**31}]
)
async def test_a_token_is_refused_for_what_cannot_be(secured: Federation, bad: dict[str, Any]) -> None:
    request = access.CreateTokenRequest(**{"name": "a", "role": TO_PROTO[Role.CLIENT], **bad})
    assert await refused(secured.access().CreateToken(request)) == "SUBJECT_INVALID"


async def test_client_and_evaluator_cannot_share_an_id(secured: Federation) -> None:
    both = [await secured.token("a", role) for role in (Role.CLIENT, Role.EVALUATOR)]
    await secured.enroll(both[0])
    assert await refused(secured.token("a", Role.EVALUATOR)) == "NAME_IN_USE"
    assert await refused(secured.enroll(both[1])) == "NAME_IN_USE"
    await secured.revoke(Role.CLIENT, "a")
    await secured.enroll(await secured.token("a", Role.EVALUATOR))


async def test_an_enrolment_whose_transaction_is_repeated_is_one_certificate(
    secured: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, locks = Identities.enroll, [DatabaseLocked("another program holds a lock")] * 3

    def enroll(own: Identities, secret: str, key: str, now: float, issue: Issue) -> tuple[TokenRow, IdentityRow]:
        def undone(subject: Subject, after: float) -> Issued:
            issued = issue(subject, after)
            if locks:
                raise locks.pop()
            return issued

        return real(own, secret, key, now, undone)

    monkeypatch.setattr(Identities, "enroll", enroll)
    token = await secured.token("a")
    request = access.EnrollRequest(secret=token.secret, signing_request=requests.make(keys.make()))
    answer = await secured.access(secured.nobody()).Enroll(request)
    assert not locks and answer.certificate.count(b"BEGIN CERTIFICATE") == 1


async def test_a_signing_request_is_checked(secured: Federation) -> None:
    token = await secured.token("a")
    request = access.EnrollRequest(secret=token.secret, signing_request=b"\x30\x03\x02\x01\x00")
    assert await refused(secured.access(secured.nobody()).Enroll(request)) == "SIGNING_REQUEST_INVALID"


async def test_where_anybody_may_call_a_large_message_is_not_taken_into_memory(secured: Federation) -> None:
    request = access.EnrollRequest(secret=b"x" * 20_000, signing_request=requests.make(keys.make()))
    with pytest.raises(grpc.aio.AioRpcError, match="larger than max") as caught:
        await secured.access(secured.nobody()).Enroll(request)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert await refused(secured.access().Enroll(request)) == "MESSAGE_TOO_LARGE", "on the other port likewise"


async def test_tokens_and_identities_come_in_pages(secured: Federation) -> None:
    names = [f"site-{i}" for i in range(5)]
    for name in names:
        await secured.enroll(await secured.token(name))
    found: list[str] = []
    request = access.ListTokensRequest(page_size=2)
    while True:
        page = await secured.access().ListTokens(request)
        found += [token.name for token in page.tokens]
        if not page.next_page_token:
            break
        request.page_token = page.next_page_token
    assert found == names
    seen: list[str] = []
    asked = access.ListIdentitiesRequest(page_size=2)
    while True:
        part = await secured.access().ListIdentities(asked)
        seen += [identity.name for identity in part.identities]
        if not part.next_page_token:
            break
        asked.page_token = part.next_page_token
    assert seen == [*names, "ada"]


# The transport


def test_nothing_older_than_tls_1_3_is_spoken(tmp_path: Path) -> None:
    """In a process of its own, because gRPC reads what it may speak once."""
    init.main(["--data-dir", str(tmp_path), "--operator-identity", str(tmp_path / "me"), "--operator", "ada"])
    process = subprocess.Popen(
        [sys.executable, "-m", "fedpeft_server", "--data-dir", tmp_path, "--listen", "127.0.0.1:0", "--metrics", ""],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        serving = next(json.loads(line) for line in process.stderr if '"serving"' in line)
        host, _, port = serving["enroll"].rpartition(":")
        spoken = {}
        for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
            context = ssl.create_default_context(cafile=str(Files(tmp_path / "identity").authority))
            context.minimum_version = context.maximum_version = version
            context.set_alpn_protocols(["h2"])
            try:
                with (
                    ssl.create_connection((host, int(port)), timeout=5) as raw,
                    context.wrap_socket(raw, server_hostname=host) as tls,
                ):
                    spoken[version] = tls.version()
            except ssl.SSLError as error:
                spoken[version] = error.reason
        assert spoken[ssl.TLSVersion.TLSv1_3] == "TLSv1.3"
        assert spoken[ssl.TLSVersion.TLSv1_2] != "TLSv1.2"
    finally:
        os.kill(process.pid, signal.SIGTERM)
        process.communicate(timeout=20)


async def test_the_servers_certificate_is_replaced_while_it_serves(secured: Federation) -> None:
    operator = secured.access()
    await operator.ListTokens(access.ListTokensRequest())
    own = secured.server.certificates
    assert own is not None
    before = own.certificate
    person = ["--operator", "bo", "--operator-identity", str(own.files.folder / "bo")]
    init.main(["--identity", str(own.files.folder), "--host", "fed.example.org", *person])
    assert own.refresh()
    assert own.certificate != before and own.hosts[0] == "fed.example.org"
    host, port = secured.enrollment.split(":")
    pem = await asyncio.to_thread(ssl.get_server_certificate, (host, int(port)))
    served = x509.load_pem_x509_certificate(pem.encode())
    assert served == own.certificate
    await operator.ListTokens(access.ListTokensRequest())
    assert (await secured.token("a")).server.startswith("fed.example.org:")


# The audit log


async def test_the_audit_log_tells_of_a_round_and_is_a_whole_chain(secured: Federation) -> None:
    run, clients, tasks = await held(secured, "a", "b")
    for name, client in clients.items():
        await client.push(tasks[name].ticket, filled(1.0))
    operator = secured.daemon(secured.operators())
    await operator.until(run, lambda r: r.state == run_pb2.RUN_STATE_COMPLETED)
    await operator.operator.DeleteRun(op.DeleteRunRequest(run=run))
    entries = await secured.audit()
    told = [(entry.actor, entry.action) for entry in entries if entry.object == run]
    assert told[0] == ("operator ada", "run.created")
    assert sorted(told[1:3]) == [("client a", "update.received"), ("client b", "update.received")]
    assert told[3:] == [("server", "round.committed"), ("operator ada", "run.deleted")]
    head = audit.verify(AuditEntry(**{f.name: getattr(e, f.name) for f in e.DESCRIPTOR.fields}) for e in entries)
    assert head is not None and head.number == len(entries)


async def test_without_certificates_everybody_is_local_and_nobody_enrolls(start: StartDaemon) -> None:
    daemon = await start()
    from fedpeft.v1 import access_service_pb2_grpc as access_grpc

    service = access_grpc.AccessServiceStub(daemon.channel)
    assert (
        await refused(service.Renew(access.RenewRequest(signing_request=requests.make(keys.make())))) == "NO_AUTHORITY"
    )
    assert (
        await refused(service.CreateToken(access.CreateTokenRequest(name="a", role=TO_PROTO[Role.CLIENT])))
        == "NO_AUTHORITY"
    )
    run = await daemon.create(config(rounds={"count": 1, "clients": 1}))
    (client,) = await daemon.clients("a")
    await client.push((await client.task()).ticket, filled(1.0))
    await daemon.until(run.id, lambda r: r.state == run_pb2.RUN_STATE_COMPLETED)
    entries = (await service.ListAuditEntries(access.ListAuditEntriesRequest())).entries
    told = [(e.actor, e.action) for e in entries if e.object == run.id]
    assert told == [("local", "run.created"), ("local", "update.received"), ("server", "round.committed")]
    assert json.loads(next(e.details for e in entries if e.action == "update.received"))["client"] == "a"


# init and settings


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Path]:
    init.main(["--data-dir", str(tmp_path), "--operator-identity", str(tmp_path / "me"), "--operator", "ada"])
    yield tmp_path


def test_init_said_again_keeps_everything(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in made.rglob("*.*")}
    init.main(["--data-dir", str(made), "--operator-identity", str(made / "me"), "--operator", "ada"])
    assert {path: path.read_bytes() for path in made.rglob("*.*")} == before
    assert capsys.readouterr().out.count(": kept,") == 3


def test_init_does_not_take_anothers_identity(made: Path) -> None:
    with pytest.raises(SettingsInvalid, match="is the identity of operator ada"):
        init.main(["--data-dir", str(made), "--operator-identity", str(made / "me"), "--operator", "bo"])


def test_init_signs_with_an_authority_of_ones_own(tmp_path: Path) -> None:
    own = Authority.make("our company")
    (tmp_path / "ca.pem").write_bytes(certificates.to_pem(own.certificate))
    (tmp_path / "ca.key").write_bytes(keys.to_pem(own.key))
    arguments = ["--data-dir", str(tmp_path / "d"), "--operator-identity", str(tmp_path / "me"), "--operator", "ada"]
    given = ["--authority", str(tmp_path / "ca.pem"), "--authority-key", str(tmp_path / "ca.key")]
    (tmp_path / "ca.key").chmod(0o644)
    with pytest.raises(IdentityInvalid, match="chmod 600"):
        init.main([*arguments, *given])
    (tmp_path / "ca.key").chmod(0o600)
    init.main([*arguments, *given])
    server = certificates.load(tmp_path / "d" / "identity" / "server.pem")[0]
    assert server.issuer == own.certificate.subject


async def test_nobody_else_reads_the_data_folder(start: StartDaemon, tmp_path: Path) -> None:
    folders = [tmp_path / "deep" / "by-init", tmp_path / "by-server"]
    init.main(["--data-dir", str(folders[0]), "--operator-identity", str(tmp_path / "me"), "--operator", "ada"])
    await start(folders[1])
    assert [folder.stat().st_mode & 0o777 for folder in folders] == [0o700, 0o700]


def test_certificates_and_insecure_contradict(made: Path) -> None:
    with pytest.raises(SettingsInvalid, match="--insecure would serve plain text"):
        Settings.read(["--data-dir", str(made), "--insecure"])
    with pytest.raises(SettingsInvalid, match=r"has no server\.pem"):
        Settings.read(["--data-dir", str(made), "--identity", str(made / "me")])
    assert Settings.read(["--data-dir", str(made), "--listen", "0.0.0.0:7070"]).enroll_address == "0.0.0.0:7071"


def test_the_last_port_has_none_after_it(made: Path) -> None:
    last = ["--data-dir", str(made), "--listen", "127.0.0.1:65535"]
    with pytest.raises(
        SettingsInvalid, match="leaves no port after it, where devices would enroll; name one with --enroll"
    ):
        Settings.read(last)
    assert Settings.read([*last, "--enroll", "127.0.0.1:7071"]).enroll_address == "127.0.0.1:7071"
    (made / "identity" / "authority.key").unlink()
    assert Settings.read(last).listen == "127.0.0.1:65535", "where nobody enrolls no second port is taken"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--listen", "127.0.0.1:7170", "--metrics", "0.0.0.0:7170"], "--listen .* and --metrics .* are one port"),
        (["--metrics", "[::]:7071", "--enroll", "127.0.0.1:7071"], "--metrics .* and --enroll .* are one port"),
        (["--max-clients", "x"], r"unable to parse string as an integer \(got 'x'\)"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path: Path, flags: list[str], said: str) -> None:
    with pytest.raises(SettingsInvalid, match=said):
        Settings.read(["--data-dir", str(tmp_path), *flags])


def test_ports_of_one_number_may_be_of_two_addresses(tmp_path: Path, made: Path) -> None:
    flags = ["--listen", "127.0.0.1:7170", "--metrics", "127.0.0.2:7170", "--enroll", "127.0.0.1:0"]
    assert Settings.read(["--data-dir", str(tmp_path), *flags]).metrics == "127.0.0.2:7170"
    metrics = ["--metrics", "127.0.0.1:7071"]
    assert Settings.read(["--data-dir", str(tmp_path / "plain"), *metrics])
    with pytest.raises(SettingsInvalid, match=r"--metrics .*:7071 and --enroll .*:7071 are one port"):
        Settings.read(["--data-dir", str(made), *metrics])
