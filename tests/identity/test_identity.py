"""Keys, certificates, signing requests and enrolment tokens: what is accepted, and what each refusal says."""

import os
import socket
import ssl
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.errors import IdentityInvalid
from fedpeft.identity import certificates, keys, requests, token
from fedpeft.identity import folder as identity_folder
from fedpeft.identity.authority import AUTHORITY_LIFE, SKEW, Authority
from fedpeft.identity.folder import Identity
from fedpeft.identity.subject import Role, Subject
from fedpeft.identity.token import EnrollmentToken

DAY = timedelta(days=1)
NAMES = st.from_regex(r"[A-Za-z0-9._\-]{1,64}", fullmatch=True).filter(lambda name: name not in (".", ".."))


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority.make("a federation")


@pytest.fixture
def noto(authority: Authority) -> x509.Certificate:
    return authority.issue(Subject(Role.CLIENT, "noto"), keys.make().public_key(), DAY)


# Subjects


@given(st.sampled_from(Role), NAMES)
def test_a_subject_is_its_id(role: Role, name: str) -> None:
    assert Subject.of_id(Subject(role, name).id) == Subject(role, name)


@given(st.text())
def test_any_other_text_is_refused_or_a_subject(text: str) -> None:
    try:
        assert Subject.of_id(text).id.endswith(f"/fedpeft/{text.split('/fedpeft/')[1]}")
    except IdentityInvalid as error:
        assert "SPIFFE" not in error.message and len(error.message) < 500


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("spiffe://a/fedpeft/root/noto", "the role 'root'; there are operator, viewer, client, evaluator"),
        ("spiffe://a/fedpeft/client/no to", "the name 'no to' must be"),
        ("spiffe://a/fedpeft/client/..", "the name '..' must be"),
        ("spiffe://a/fedpeft/client/a/b", "is not of the form"),
        ("spiffe://a/other/client/noto", "is not of the form"),
        ("https://a/fedpeft/client/noto", "is not of the form"),
        ("spiffe://a/fedpeft/client/noto\n", "must be"),
    ],
)
def test_what_is_no_id_is_refused(text: str, said: str) -> None:
    with pytest.raises(IdentityInvalid) as refused:
        Subject.of_id(text)
    assert said in refused.value.message


def test_another_trust_domain_is_understood() -> None:
    assert Subject.of_id("spiffe://clinic.example/fedpeft/evaluator/e1") == Subject(Role.EVALUATOR, "e1")


# Keys


def written(path: Path, data: bytes, mode: int = 0o600) -> Path:
    path.write_bytes(data)
    path.chmod(mode)
    return path


def test_a_key_is_read_back(tmp_path: Path) -> None:
    key = keys.make()
    assert keys.load(written(tmp_path / "key.pem", keys.to_pem(key))).private_numbers() == key.private_numbers()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o777])
def test_a_key_open_to_others_is_refused(tmp_path: Path, mode: int) -> None:
    path = written(tmp_path / "key.pem", keys.to_pem(keys.make()), mode)
    with pytest.raises(IdentityInvalid, match=f"mode {mode:04o}.*chmod 600"):
        keys.load(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
def test_a_key_of_another_user_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "key.pem", keys.to_pem(keys.make()))
    os.chown(path, 65_534, 65_534)
    with pytest.raises(IdentityInvalid, match="belongs to another user"):
        keys.load(path)


def rsa_pem() -> bytes:
    key = rsa.generate_private_key(65_537, 2048)
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


@pytest.mark.parametrize(
    ("data", "said"),
    [(b"", "holds no"), (b"\xff" * 99, "holds no"), (rsa_pem(), "not on the curve P-256")],
    ids=["empty", "noise", "RSA"],
)
def test_what_is_no_key_is_refused(tmp_path: Path, data: bytes, said: str) -> None:
    with pytest.raises(IdentityInvalid, match=said):
        keys.load(written(tmp_path / "key.pem", data))


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    with pytest.raises(IdentityInvalid, match=r"key\.pem cannot be read: No such file"):
        keys.load(tmp_path / "key.pem")


# Signing requests


def test_a_request_yields_its_key() -> None:
    key = keys.make()
    assert requests.read(requests.make(key)) == key.public_key()


def test_a_request_signed_by_another_key_is_refused() -> None:
    mine, other = keys.make(), keys.make()
    forged = requests.make(mine).replace(point(mine), point(other))
    with pytest.raises(IdentityInvalid, match="does not fit its key"):
        requests.read(forged)


def point(key: keys.PrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)


def test_a_request_for_another_curve_is_refused() -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    with pytest.raises(IdentityInvalid, match="P-256"):
        requests.read(builder.sign(key, hashes.SHA256()).public_bytes(Encoding.DER))


@given(st.binary(max_size=200))
def test_noise_is_no_request(data: bytes) -> None:
    with pytest.raises(IdentityInvalid, match="not a signing request"):
        requests.read(data)


def test_a_long_request_is_not_even_parsed() -> None:
    with pytest.raises(IdentityInvalid, match=f"at most {requests.MAX_BYTES}"):
        requests.read(b"0" * (requests.MAX_BYTES + 1))


# Certificates


def test_a_certificate_says_whom_it_speaks_for_and_until_when(noto: x509.Certificate) -> None:
    now = datetime.now(UTC)
    assert certificates.subject(noto) == Subject(Role.CLIENT, "noto")
    certificates.check_time(noto, now)
    assert now + DAY - SKEW < noto.not_valid_after_utc <= now + DAY
    assert abs(certificates.renewal(noto) - (now + DAY / 2 - SKEW / 2)) < timedelta(minutes=1)


def test_a_certificate_is_read_back_and_has_a_fingerprint(noto: x509.Certificate, tmp_path: Path) -> None:
    path = written(tmp_path / "chain.pem", certificates.to_pem(noto, noto))
    assert certificates.load(path) == [noto, noto]
    assert certificates.fingerprint(noto) == noto.fingerprint(hashes.SHA256()).hex()


def test_a_file_without_a_certificate_is_named(tmp_path: Path) -> None:
    with pytest.raises(IdentityInvalid, match=r"none\.pem: this holds no certificate"):
        certificates.load(written(tmp_path / "none.pem", b"nothing"))
    with pytest.raises(IdentityInvalid, match=r"absent\.pem cannot be read: No such file"):
        certificates.load(tmp_path / "absent.pem")


def test_an_old_certificate_and_a_slow_clock_are_told_apart(noto: x509.Certificate) -> None:
    with pytest.raises(
        IdentityInvalid, match=r"ended at .*, and this machine's clock says .*; enroll again .* set the clock"
    ):
        certificates.check_time(noto, datetime.now(UTC) + 2 * DAY)
    with pytest.raises(IdentityInvalid, match=r"clock says .* set the clock"):
        certificates.check_time(noto, datetime.now(UTC) - DAY)


def test_a_server_certificate_speaks_for_nobody(authority: Authority) -> None:
    certificate = authority.issue_server(["localhost"], keys.make().public_key(), DAY)
    with pytest.raises(IdentityInvalid, match="exactly one URI"):
        certificates.subject(certificate)


# The authority


def test_an_authority_outlives_what_it_signs_and_signs_no_other(authority: Authority) -> None:
    certificate = authority.certificate
    certificate.verify_directly_issued_by(certificate)
    basic = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    assert basic.critical and basic.value.ca and basic.value.path_length == 0
    assert certificate.not_valid_after_utc - datetime.now(UTC) > AUTHORITY_LIFE - DAY


def test_a_key_that_is_not_its_certificates_is_refused(authority: Authority) -> None:
    with pytest.raises(IdentityInvalid, match="does not belong"):
        Authority(authority.certificate, keys.make())


def test_a_certificate_that_may_not_sign_is_no_authority(authority: Authority) -> None:
    key = keys.make()
    with pytest.raises(IdentityInvalid, match="may not sign"):
        Authority(authority.issue(Subject(Role.CLIENT, "noto"), key.public_key(), DAY), key)


@pytest.mark.parametrize(
    "host", ["", "a b", "-a", "a..b", "http://a", "a:7070", "ä.example", "a" * 64, "x." * 127 + "y"]
)
def test_what_is_no_host_is_refused(authority: Authority, host: str) -> None:
    with pytest.raises(IdentityInvalid, match="neither a host name nor an address"):
        authority.issue_server([host], keys.make().public_key(), DAY)


def test_a_server_needs_a_host(authority: Authority) -> None:
    with pytest.raises(IdentityInvalid, match="needs a host name"):
        authority.issue_server([], keys.make().public_key(), DAY)


def contexts(
    authority: Authority, client: Authority, tmp_path: Path, host: str
) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """TLS contexts of a server for `host` and of a client that `client` signed for; both trust `authority`."""
    trusted = written(tmp_path / "authority.pem", certificates.to_pem(authority.certificate))

    def loaded(kind: int, key: keys.PrivateKey, certificate: x509.Certificate) -> ssl.SSLContext:
        context = ssl.SSLContext(kind)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_verify_locations(trusted)
        context.verify_mode = ssl.CERT_REQUIRED
        pair = keys.to_pem(key) + certificates.to_pem(certificate)
        context.load_cert_chain(written(tmp_path / "pair.pem", pair))
        return context

    server_key, client_key = keys.make(), keys.make()
    of_server = authority.issue_server([host, "10.0.0.1"], server_key.public_key(), DAY)
    of_client = client.issue(Subject(Role.CLIENT, "noto"), client_key.public_key(), DAY)
    server = loaded(ssl.PROTOCOL_TLS_SERVER, server_key, of_server)
    return server, loaded(ssl.PROTOCOL_TLS_CLIENT, client_key, of_client)


def shaken(server: ssl.SSLContext, client: ssl.SSLContext, host: str) -> bytes:
    """Shakes hands over a real socket; returns what arrived."""
    here, there = socket.socketpair()

    def serve() -> None:
        try:
            with server.wrap_socket(there, server_side=True) as end:
                end.sendall(b"welcome")
        except (ssl.SSLError, ConnectionError):
            there.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with client.wrap_socket(here, server_hostname=host) as end:
            return end.recv(16)
    finally:
        here.close()
        thread.join()


def test_two_ends_of_one_authority_shake_hands(authority: Authority, tmp_path: Path) -> None:
    assert shaken(*contexts(authority, authority, tmp_path, "server.example"), "server.example") == b"welcome"
    assert shaken(*contexts(authority, authority, tmp_path, "server.example"), "10.0.0.1") == b"welcome"


def test_another_host_name_is_noticed(authority: Authority, tmp_path: Path) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        shaken(*contexts(authority, authority, tmp_path, "server.example"), "other.example")


def test_a_client_of_another_authority_is_refused(authority: Authority, tmp_path: Path) -> None:
    foreign = Authority.make("a federation")  # the same name, another key
    with pytest.raises(ssl.SSLError, match=r"(?i)alert|unknown ca|decrypt"):
        shaken(*contexts(authority, foreign, tmp_path, "server.example"), "server.example")


# Tokens


def test_a_token_is_one_line_and_is_read_back(authority: Authority) -> None:
    made = EnrollmentToken.make("fed.example:7070", "fed.example:7071", authority.certificate)
    line = made.encode()
    assert line.isascii() and not set(line) & set(" \t\r\n'\"\\$`") and len(line) < 900
    assert EnrollmentToken.decode(f"  {line}\r\n") == made
    assert made.digest == token.digest(made.secret) != made.secret


def test_two_tokens_have_two_secrets(authority: Authority) -> None:
    one, two = (EnrollmentToken.make("a:1", "a:2", authority.certificate) for _ in range(2))
    assert one.secret != two.secret


def test_a_token_does_not_show_its_secret(authority: Authority) -> None:
    made = EnrollmentToken.make("a:1", "a:2", authority.certificate)
    shown = f"{made!r} {made}"
    assert "a:1" in shown and str(made.secret) not in shown and made.encode().split(".")[4] not in shown


@given(st.data())
def test_a_damaged_token_is_refused_without_showing_it(authority: Authority, data: st.DataObject) -> None:
    line = EnrollmentToken("a:1", "a:2", authority.certificate, bytes(range(32))).encode()
    at = data.draw(st.integers(0, len(line) - 1))
    damaged = data.draw(st.sampled_from([line[:at], line[:at] + "~" + line[at + 1 :], line[:at] + line[at + 1 :]]))
    if damaged == line:
        return
    with pytest.raises(IdentityInvalid) as refused:
        EnrollmentToken.decode(damaged)
    assert line[30:60] not in refused.value.message


def test_a_very_long_line_is_refused() -> None:
    with pytest.raises(IdentityInvalid, match="not an enrolment token"):
        EnrollmentToken.decode("fedpeft1." + "A" * token.MAX_LENGTH)


def enrolled(folder: Path) -> Identity:
    authority = Authority.make("test")
    key = identity_folder.take_key(folder)
    certificate = authority.issue(Subject(Role.CLIENT, "site-a"), key.public_key(), timedelta(days=1))
    identity_folder.write(folder, "[::1]:7070", [authority.certificate], [certificate])
    return Identity.load(folder)


def test_an_identity_folder_gives_back_what_was_written(tmp_path: Path) -> None:
    identity = enrolled(tmp_path / "identity")
    assert identity.subject == Subject(Role.CLIENT, "site-a")
    assert identity.server == "[::1]:7070"
    again = identity_folder.take_key(tmp_path / "identity")
    assert identity.key.public_key() == again.public_key(), "an enrolment that broke keeps its key"
    assert (tmp_path / "identity").stat().st_mode & 0o777 == 0o700
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in (tmp_path / "identity").iterdir())


def test_a_folder_without_a_certificate_is_nobodys(tmp_path: Path) -> None:
    identity_folder.take_key(tmp_path)
    assert not identity_folder.exists(tmp_path)
    with pytest.raises(IdentityInvalid, match="enroll first"):
        Identity.load(tmp_path)


def test_a_certificate_of_another_key_is_refused(tmp_path: Path) -> None:
    enrolled(tmp_path / "a")
    enrolled(tmp_path / "b")
    (tmp_path / "a" / "certificate.pem").write_bytes((tmp_path / "b" / "certificate.pem").read_bytes())
    with pytest.raises(IdentityInvalid, match="is not the certificate of"):
        Identity.load(tmp_path / "a")
