"""`fedpeft-server init`: what it refuses before it writes anything, and what it mends."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from fedpeft.errors import SettingsInvalid
from fedpeft.identity import certificates, folder, keys
from fedpeft.identity.authority import Authority
from fedpeft.identity.folder import Identity
from fedpeft.process import durable
from fedpeft_server.access.certificates import ServerCertificates, read_authority
from fedpeft_server.access.files import Files
from fedpeft_server.commands import init
from fedpeft_server.settings import Settings

from ..conftest import begin_life
from ..secured import federation

DAYS = timedelta(days=90)


def test_host_and_port_that_are_not_given_stay_those_of_the_identity(tmp_path: Path) -> None:
    again = ["--data-dir", str(tmp_path / "data"), "--operator", "ada", "--operator-identity", str(tmp_path / "me")]
    init.main([*again, "--host", "fed.example.org", "--port", "27070"])
    init.main(again)
    assert Identity.load(tmp_path / "me").server == "fed.example.org:27070"
    init.main([*again, "--host", "new.example.org"])
    assert Identity.load(tmp_path / "me").server == "new.example.org:27070"
    init.main([*again, "--port", "7071"])
    assert Identity.load(tmp_path / "me").server == "new.example.org:7071"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--host", "fed.example.org:7070"], "--host: 'fed.example.org:7070' is neither a host name nor an address"),
        (["--host", "fed.example.org", "--host", "0.0.0.0"], "--host 0.0.0.0 is every address of this machine"),
        (["--host", "::"], "--host :: is every address of this machine"),
        (
            ["--host", "*.example.org", "--host", "a.org"],
            r"--host \*\.example\.org is first, .*: name the server itself",
        ),
        (["--operator", "a b"], "--operator: the name 'a b' must be"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_made(tmp_path: Path, given: list[str], said: str) -> None:
    with pytest.raises(SettingsInvalid, match=said):
        init.main(["--data-dir", str(tmp_path / "data"), "--operator-identity", str(tmp_path / "me"), *given])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("given", [["--data-dir", ""], ["--data-dir", "", "--identity", ""]])
def test_an_empty_folder_is_none_and_not_the_current_one(
    tmp_path: Path, given: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingsInvalid, match="--data-dir is missing"):
        init.main([*given, "--operator-identity", str(tmp_path / "me")])
    assert not list(tmp_path.iterdir())


def test_an_empty_folder_for_the_operator_is_the_usual_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("FEDPEFT_IDENTITY", raising=False)
    init.main(["--data-dir", str(tmp_path / "data"), "--operator", "ada", "--operator-identity", ""])
    assert Identity.load(tmp_path / "config" / "fedpeft" / "identity").subject.name == "ada"


def test_an_identity_of_another_server_is_kept_though_the_authority_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    own = tmp_path / "config" / "fedpeft" / "identity"
    one = ["--data-dir", str(tmp_path / "one"), "--operator", "ada"]
    init.main([*one, "--host", "one.example.org"])
    assert "this user's fedpeft command calls one.example.org:7070 from now on" in capsys.readouterr().out
    authority = tmp_path / "one" / "identity" / "authority"
    other = ["--data-dir", str(tmp_path / "other"), "--operator", "ada", "--host", "other.example.org"]
    other += ["--authority", f"{authority}.pem", "--authority-key", f"{authority}.key"]
    with pytest.raises(SettingsInvalid, match=r"at one\.example\.org:7070, which is another server"):
        init.main(other)
    assert Identity.load(own).server == "one.example.org:7070"
    init.main([*other, "--operator-identity", str(tmp_path / "me")])
    assert "from now on" not in capsys.readouterr().out
    init.main([*one, "--host", "one.example.org", "--port", "7071"])  # the same server, elsewhere
    assert Identity.load(own).server == "one.example.org:7071"


def test_a_pattern_of_names_may_follow_the_name(tmp_path: Path) -> None:
    hosts = ["--host", "fed.example.org", "--host", "*.example.org"]
    init.main(["--data-dir", str(tmp_path), "--operator-identity", str(tmp_path / "me"), "--operator", "ada", *hosts])
    assert ServerCertificates(tmp_path / "identity").hosts[:2] == ["fed.example.org", "*.example.org"]
    assert Identity.load(tmp_path / "me").server == "fed.example.org:7070"


def test_an_operators_certificate_begins_after_a_revocation_of_the_second_before(tmp_path: Path) -> None:
    before = datetime.now(UTC)
    init.main(["--data-dir", str(tmp_path), "--operator", "ada", "--operator-identity", str(tmp_path / "me")])
    begins = certificates.load(folder.certificate_path(tmp_path / "me"))[0].not_valid_before_utc
    assert before - timedelta(seconds=1) < begins <= datetime.now(UTC)


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


@pytest.mark.parametrize(
    ("hours", "said"),
    [
        (-3, "the server's certificate begins at .*, and the clock here says .*: it is behind"),
        (90 * 24 + 1, "the server's certificate ended at .*, and the clock here says .*: make another"),
    ],
)
async def test_a_server_whose_clock_is_wrong_says_so(tmp_path: Path, hours: int, said: str) -> None:
    async with federation(tmp_path) as made:
        authority = made.authority
    as_of(authority, Files(tmp_path / "data" / "identity"), datetime.now(UTC) - timedelta(hours=hours))
    (tmp_path / "data" / "identity" / "authority.key").unlink()  # which would make another one at once
    with capture_logs() as lines:
        _, end = await begin_life(Settings(data_dir=tmp_path / "data", listen="127.0.0.1:0", metrics=""))
        await end()
    (warned,) = [line for line in lines if line["event"].startswith("clients cannot connect")]
    assert warned["log_level"] == "error" and re.search(said, warned["cause"])


def as_of(authority: Authority, files: Files, at: datetime) -> None:
    """Puts a certificate in the place of the server's, as it would have been issued at a time."""
    made = authority.issue_server(["localhost", "127.0.0.1", "::1"], keys.load(files.server_key).public_key(), DAYS, at)
    durable.write(files.server, certificates.to_pem(made))


def has_begun(path: Path) -> bool:
    return certificates.load(path)[0].not_valid_before_utc <= datetime.now(UTC)
