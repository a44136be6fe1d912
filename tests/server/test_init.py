"""`fedpeft-server init`: what it refuses before it writes anything, and what it mends."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fedpeft import durable
from fedpeft.errors import SettingsInvalid
from fedpeft.identity import certificates, folder, keys
from fedpeft.identity.authority import Authority
from fedpeft.identity.folder import Identity
from fedpeft_server import init
from fedpeft_server.access.certificates import ServerCertificates, read_authority
from fedpeft_server.files import Files

DAYS = timedelta(days=90)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--host", "fed.example.org:7070"], "--host: 'fed.example.org:7070' is neither a host name nor an address"),
        (["--host", "fed.example.org", "--host", "0.0.0.0"], "--host 0.0.0.0 is every address of this machine"),
        (["--host", "::"], "--host :: is every address of this machine"),
        (["--operator", "a b"], "--operator: the name 'a b' must be"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_made(tmp_path: Path, given: list[str], said: str) -> None:
    with pytest.raises(SettingsInvalid, match=said):
        init.main(["--data-dir", str(tmp_path / "data"), "--operator-identity", str(tmp_path / "me"), *given])
    assert not list(tmp_path.iterdir())


def test_what_was_made_while_the_clock_was_ahead_is_made_anew(tmp_path: Path) -> None:
    arguments = ["--data-dir", str(tmp_path), "--operator", "ada", "--operator-identity", str(tmp_path / "me")]
    init.main(arguments)
    files = Files(tmp_path / "identity")
    authority = read_authority(files)
    assert authority is not None
    ahead = datetime.now(UTC) + timedelta(days=100)

    as_of(authority, files, ahead)
    served = ServerCertificates(files.folder)
    assert served.refresh() and has_begun(files.server)

    as_of(authority, files, ahead)
    person = Identity.load(tmp_path / "me")
    folder.write_certificate(tmp_path / "me", [authority.issue(person.subject, person.key.public_key(), DAYS, ahead)])
    init.main(arguments)
    assert has_begun(files.server) and has_begun(folder.certificate_path(tmp_path / "me"))


def as_of(authority: Authority, files: Files, at: datetime) -> None:
    """Puts a certificate in the place of the server's, as it would have been issued at a time."""
    made = authority.issue_server(["localhost", "127.0.0.1", "::1"], keys.load(files.server_key).public_key(), DAYS, at)
    durable.write(files.server, certificates.to_pem(made))


def has_begun(path: Path) -> bool:
    return certificates.load(path)[0].not_valid_before_utc <= datetime.now(UTC)
