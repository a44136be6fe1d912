"""Diagnosis of servers that are not reached: each fault is made with real sockets, and has its sentence with a cure."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID

from fedpeft.identity import authority as authority_module
from fedpeft.identity import certificates, keys
from fedpeft.identity import folder as identity_folder
from fedpeft.identity.authority import Authority
from fedpeft.identity.folder import Identity
from fedpeft.identity.requests import PublicKey
from fedpeft.identity.subject import Role, Subject
from fedpeft.rpc import diagnosis
from fedpeft.rpc import probe as probe
from fedpeft.rpc.diagnosis import Trust, diagnose

DAY = timedelta(days=1)
Talk = Callable[[socket.socket], None]


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority.make("a federation")


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "STEP_S", 0.5)


def enrolled(authority: Authority, folder: Path, life: timedelta = DAY, *, by: Authority | None = None) -> Identity:
    """Writes an identity folder; `by` issues the certificate in place of the authority that it trusts."""
    key = identity_folder.take_key(folder)
    certificate = (by or authority).issue(Subject(Role.CLIENT, "noto"), key.public_key(), life)
    identity_folder.write(folder, "localhost:1", [authority.certificate], [certificate])
    return Identity.load(folder)


@pytest.fixture
def trust(authority: Authority, tmp_path: Path) -> Trust:
    return Trust.of(enrolled(authority, tmp_path / "identity"))


@contextmanager
def listening(talk: Talk) -> Iterator[str]:
    """Serves every connection with `talk`, one after the other."""
    line = socket.create_server(("127.0.0.1", 0))
    line.settimeout(0.05)
    over = threading.Event()

    def serve() -> None:
        while not over.is_set():
            try:
                caller, _ = line.accept()
            except TimeoutError:  # nobody came; is the test over?
                continue
            with caller:
                caller.settimeout(3)
                try:
                    talk(caller)
                except OSError:  # a handshake that is to fail, a caller that has gone
                    continue

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"127.0.0.1:{line.getsockname()[1]}"
    finally:
        over.set()
        thread.join()
        line.close()


def speaking_tls(
    authority: Authority,
    folder: Path,
    *,
    hosts: tuple[str, ...] = ("127.0.0.1",),
    life: timedelta = DAY,
    newest: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3,
    protocols: tuple[str, ...] = ("h2",),
    then: Talk = lambda secure: secure.sendall(bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])),
) -> Talk:
    """Returns a server's side of TLS, with a certificate made for it."""
    key = keys.make()
    folder.mkdir(exist_ok=True)
    (folder / "server.key").write_bytes(keys.to_pem(key))
    certificate = authority.issue_server(hosts, key.public_key(), life)
    (folder / "server.pem").write_bytes(certificates.to_pem(certificate))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.maximum_version = newest
    context.load_cert_chain(folder / "server.pem", folder / "server.key")
    context.set_alpn_protocols(protocols)

    def talk(line: socket.socket) -> None:
        with context.wrap_socket(line, server_side=True) as secure:
            then(secure)
            secure.recv(64)

    return talk


@contextmanager
def grpc_server(authority: Authority, *, enrolling: bool = False) -> Iterator[str]:
    """A real gRPC server with TLS that demands certificates, or not where devices enroll."""
    key = keys.make()
    certificate = certificates.to_pem(authority.issue_server(["127.0.0.1", "localhost"], key.public_key(), DAY))
    credentials = grpc.ssl_server_credentials(
        [(keys.to_pem(key), certificate)],
        root_certificates=None if enrolling else certificates.to_pem(authority.certificate),
        require_client_auth=not enrolling,
    )
    with futures.ThreadPoolExecutor(1) as pool:
        server = grpc.server(pool)
        port = server.add_secure_port("127.0.0.1:0", credentials)
        server.start()
        yield f"127.0.0.1:{port}"
        server.stop(None).wait()


@contextmanager
def plain_server() -> Iterator[str]:
    with futures.ThreadPoolExecutor(1) as pool:
        server = grpc.server(pool)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        yield f"127.0.0.1:{port}"
        server.stop(None).wait()


def said(server: str, trust: Trust | None) -> str:
    began = time.monotonic()
    found = diagnose(server, trust)
    assert time.monotonic() - began < diagnosis.BUDGET_S
    assert found is not None, "no fault was found"
    assert "\n" not in str(found)
    assert ": " in str(found), "what to do comes after the colon"
    return str(found)


# Nothing is wrong


def test_a_server_that_is_well_has_no_fault(authority: Authority, trust: Trust) -> None:
    with grpc_server(authority) as server:
        assert diagnose(server, trust) is None
        assert diagnose(server.replace("127.0.0.1", "localhost"), trust) is None
    with grpc_server(authority, enrolling=True) as server:
        assert diagnose(server, Trust((authority.certificate,))) is None
    with plain_server() as server:
        assert diagnose(server, None) is None


# The way there


def test_a_name_that_is_not_known(trust: Trust) -> None:
    assert "the name nowhere.invalid is not known here" in said("nowhere.invalid:7070", trust)


@pytest.mark.parametrize("plain", [True, False])
def test_a_closed_port(trust: Trust, plain: bool) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        found = said(f"127.0.0.1:{port}", None if plain else trust)
    assert f"nothing listens on port {port}: start fedpeft-server" in found


def test_nobody_answers(trust: Trust) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, ExitStack() as stack:
        for _ in range(4):  # the queue of a server that accepts nobody is full: the kernel drops what comes then
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        time.sleep(0.05)
        found = said(f"127.0.0.1:{full.getsockname()[1]}", trust)
    assert "does not answer at all: a firewall" in found


def test_a_connection_that_stays_silent(trust: Trust) -> None:
    with socket.create_server(("127.0.0.1", 0)) as quiet:
        server = f"127.0.0.1:{quiet.getsockname()[1]}"
        assert "does not answer the TLS handshake: a firewall" in said(server, trust)
        assert "accepts the connection but sends nothing: a firewall" in said(server, None)


def test_a_way_that_there_is_not(trust: Trust) -> None:
    assert "there is no way to 255.255.255.255:9 (" in said("255.255.255.255:9", trust)


# Something else answers


def a_web_proxy(line: socket.socket) -> None:
    line.recv(4096)
    line.sendall(b"HTTP/1.1 400 Bad Request\r\nVia: 1.1 squid\r\n\r\n")


@pytest.mark.parametrize("plain", [True, False])
def test_a_web_proxy_between(trust: Trust, plain: bool) -> None:
    with listening(a_web_proxy) as server:
        found = said(server, None if plain else trust)
    assert "a web server or HTTP proxy answers at" in found
    assert "'HTTP/1.1 400 Bad Request'" in found


@pytest.mark.parametrize("plain", [True, False])
def test_a_balancer_without_a_server(trust: Trust, plain: bool) -> None:
    with listening(lambda line: None) as server:
        assert "takes the connection and closes it" in said(server, None if plain else trust)


@pytest.mark.parametrize("plain", [True, False])
def test_something_that_is_neither(trust: Trust, plain: bool) -> None:
    with listening(lambda line: line.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")) as server:
        assert "is not a FedPEFT server: check the address" in said(server, None if plain else trust)


def test_a_server_in_plain_text(trust: Trust) -> None:
    with plain_server() as server:
        assert "serves plain text, and this side has a certificate" in said(server, trust)


def test_a_server_with_tls_where_plain_text_was_tried(authority: Authority) -> None:
    with grpc_server(authority) as server:
        assert "speaks TLS and this side has no certificate: ask its operator" in said(server, None)


def test_tls_that_is_not_grpc(authority: Authority, trust: Trust, tmp_path: Path) -> None:
    with listening(speaking_tls(authority, tmp_path / "server", protocols=("http/1.1",))) as server:
        assert "speaks TLS but not gRPC" in said(server, trust)


def test_an_old_version(authority: Authority, trust: Trust, tmp_path: Path) -> None:
    with listening(speaking_tls(authority, tmp_path / "server", newest=ssl.TLSVersion.TLSv1_2)) as server:
        assert "offers only TLS 1.2 or older" in said(server, trust)


# The server's certificate


def test_another_authority(trust: Trust, tmp_path: Path) -> None:
    with grpc_server(Authority.make("a proxy that opens TLS")) as server:
        found = said(server, trust)
    assert "shows a certificate of 'CN=a proxy that opens TLS', and this side trusts 'CN=a federation'" in found
    assert "'CN=a federation': a proxy between them that intercepts TLS, or another federation's server" in found
    assert "Or the server's authority was replaced since: ask its operator for a new token" in found


@pytest.mark.parametrize(
    ("role", "cure"),
    [
        (None, "ask its operator for a new token (fedpeft token create), for this one is worthless"),
        (Role.CLIENT, "ask its operator for a new token, then fedpeft-client enroll --replace TOKEN"),
        (Role.EVALUATOR, "ask its operator for a new token, then fedpeft-client enroll --replace TOKEN"),
        (Role.VIEWER, "ask another operator for a new token, then fedpeft enroll --replace TOKEN"),
        (
            Role.OPERATOR,
            "on the server's own machine fedpeft-server init --data-dir DIR --operator a; else ask ",
        ),
    ],
)
def test_an_authority_that_was_replaced(authority: Authority, role: Role | None, cure: str) -> None:
    own = authority.issue(Subject(role, "a"), keys.make().public_key(), DAY) if role else None
    with grpc_server(Authority.make("a federation")) as server:
        found = said(server, Trust((authority.certificate,), None, own))
    assert f"Most likely the server's authority was replaced since: {cure}" in found
    assert "If its operator knows nothing of that, it is a proxy between them" in found


def test_another_name(authority: Authority, trust: Trust, tmp_path: Path) -> None:
    made_out = ("fed.clinic.example", "10.1.2.3")
    with listening(speaking_tls(authority, tmp_path / "server", hosts=made_out)) as server:
        found = said(server, trust)
        by_name = said(server.replace("127.0.0.1", "localhost"), trust)
    assert "not made out to '127.0.0.1' but to fed.clinic.example, 10.1.2.3: use one of these names" in found
    assert "not made out to 'localhost' but to" in by_name


class Careless(Authority):
    """Issues certificates whose alternative name is an address of five bytes."""

    def issue_server(self, hosts: object, key: PublicKey, life: timedelta, at: object = None) -> x509.Certificate:
        malformed = x509.UnrecognizedExtension(
            ExtensionOID.SUBJECT_ALTERNATIVE_NAME, bytes.fromhex("300787050102030405")
        )
        return self._sign("x", malformed, ExtendedKeyUsageOID.SERVER_AUTH, key, life)


async def test_a_certificate_that_cannot_be_read(
    authority: Authority, trust: Trust, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    careless = Careless(authority.certificate, authority.key)
    with listening(speaking_tls(careless, tmp_path / "server")) as server:
        found = await diagnosis.explain(server, trust)
    assert f"the certificate of {server} cannot be read" in str(found)
    assert capfd.readouterr() == ("", "")


def test_a_certificate_that_has_ended(authority: Authority, trust: Trust, tmp_path: Path) -> None:
    with listening(speaking_tls(authority, tmp_path / "server", life=timedelta(minutes=-5))) as server:
        found = said(server, trust)
    assert f"the certificate of {server} ended at {datetime.now(UTC) - timedelta(minutes=5):%Y-%m-%d}" in found
    assert "this machine's clock says" in found and "have its operator renew it" in found


def test_a_clock_that_is_behind(
    authority: Authority, trust: Trust, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(authority_module, "SKEW", timedelta(hours=-3))
    with listening(speaking_tls(authority, tmp_path / "server")) as server:
        found = said(server, trust)
    assert f"the certificate of {server} begins at" in found
    assert "but this machine's clock says" in found and "the clock is behind" in found


def test_an_authority_that_has_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(authority_module, "AUTHORITY_LIFE", timedelta(minutes=-1))
    old = Authority.make("an old federation")
    with listening(speaking_tls(old, tmp_path / "server")) as server:
        found = said(server, Trust((old.certificate,)))
    assert f"the authority of {server} ended at" in found and "its operator must make a new one" in found


def test_a_certificate_for_another_purpose(authority: Authority, trust: Trust, tmp_path: Path) -> None:
    own = enrolled(authority, tmp_path / "client")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(identity_folder.certificate_path(own.folder), identity_folder.key_path(own.folder))

    def posing(line: socket.socket) -> None:
        with context.wrap_socket(line, server_side=True, do_handshake_on_connect=False) as secure:
            secure.do_handshake()

    with listening(posing) as server:
        assert "cannot be trusted: unsuitable certificate purpose" in said(server, trust)


# This side's certificate


def test_a_port_that_wants_a_certificate(authority: Authority) -> None:
    with grpc_server(authority) as server:
        assert "wants a certificate and this side has none yet" in said(server, Trust((authority.certificate,)))


def test_an_own_certificate_that_has_ended(authority: Authority, tmp_path: Path) -> None:
    ended = enrolled(authority, tmp_path / "ended", timedelta(minutes=-5))
    with grpc_server(authority) as server:
        assert "the certificate here ended at" in said(server, Trust.of(ended))


def test_an_own_certificate_of_another_authority(authority: Authority, tmp_path: Path) -> None:
    foreign = enrolled(authority, tmp_path / "foreign", by=Authority.make("another"))
    with grpc_server(authority) as server:
        found = said(server, Trust.of(foreign))
    assert "does not take the certificate here, which CN=another issued until" in found
    assert "the server trusts another authority, since its own was replaced perhaps, or its clock is wrong" in found
    assert "fedpeft-client enroll --replace TOKEN" in found


def test_an_own_certificate_that_begins_later(
    authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(authority_module, "SKEW", timedelta(hours=-1))
    early = enrolled(authority, tmp_path / "early", 2 * DAY)
    monkeypatch.undo()
    with grpc_server(authority) as server:
        assert "the certificate here begins at" in said(server, Trust.of(early))


@pytest.mark.parametrize("broken", ["gone", "another key", "encrypted", "no key", "no certificate"])
def test_an_identity_whose_files_are_broken_by_now(
    authority: Authority, trust: Trust, broken: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert trust.folder is not None
    key = identity_folder.key_path(trust.folder)
    secret = keys.make().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"x"))
    wrong = {"another key": keys.to_pem(keys.make()), "encrypted": secret, "no key": b"\xff\x00"}
    if broken == "gone":
        key.unlink()
    elif broken == "no certificate":
        identity_folder.certificate_path(trust.folder).write_text("")
    else:
        key.write_bytes(wrong[broken])
    with grpc_server(authority) as server:
        assert f"the key and certificate in {trust.folder} cannot be used any more (" in said(server, trust)
    assert capfd.readouterr() == ("", "")


# What waiting mends


def test_a_server_that_is_away_may_come_back(trust: Trust) -> None:
    found = diagnose("127.0.0.1:1", trust)
    assert found is not None and not isinstance(found, probe.PermanentFault)


def test_another_federations_server_stays_one(trust: Trust) -> None:
    with grpc_server(Authority.make("another")) as server:
        assert isinstance(diagnose(server, trust), probe.PermanentFault)


def test_plain_text_and_tls_stay_what_they_are(authority: Authority, trust: Trust) -> None:
    with plain_server() as server:
        assert isinstance(diagnose(server, trust), probe.PermanentFault)
    with grpc_server(authority) as server:
        assert isinstance(diagnose(server, None), probe.PermanentFault)


# Beside an event loop


async def test_the_loop_goes_on_meanwhile(authority: Authority, trust: Trust) -> None:
    with socket.create_server(("127.0.0.1", 0)) as quiet:
        looking = asyncio.create_task(diagnosis.explain(f"127.0.0.1:{quiet.getsockname()[1]}", trust))
        beats = 0
        while not looking.done():
            await asyncio.sleep(0.01)
            beats += 1
    assert beats > 10
    assert "does not answer the TLS handshake" in str(await looking)


async def test_it_ends_when_a_step_does_not(trust: Trust, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "BUDGET_S", 0.1)
    monkeypatch.setattr(diagnosis, "diagnose", lambda server, trust: time.sleep(0.3))
    assert "the cause was not found in time" in str(await diagnosis.explain("127.0.0.1:1", trust))
    await asyncio.sleep(0.3)  # what comes after the end is dropped
