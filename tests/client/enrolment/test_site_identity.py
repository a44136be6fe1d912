"""Settings beside an identity: server and name come from it, and settings that contradict it are refused."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fedpeft.errors import IdentityInvalid, SettingsInvalid
from fedpeft.identity import folder
from fedpeft.identity.authority import Authority
from fedpeft.identity.subject import Role, Subject
from fedpeft_client.__main__ import run
from fedpeft_client.settings import Settings

SERVER = "fed.clinic.example:7070"


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"FEDPEFT_CLIENT_{name.upper()}", raising=False)


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority.make("a federation")


def enrolled(authority: Authority, where: Path, role: Role = Role.CLIENT, life: timedelta = timedelta(1)) -> Path:
    key = folder.take_key(where)
    folder.write(
        where, SERVER, [authority.certificate], [authority.issue(Subject(role, "noto"), key.public_key(), life)]
    )
    return where


def read(state: Path, *flags: str) -> Settings:
    return Settings.read(["--data", "d", "--state-dir", str(state), *flags])


def test_an_enrolled_client_needs_neither_server_nor_name(authority: Authority, tmp_path: Path) -> None:
    where = enrolled(authority, tmp_path / "state" / "identity")
    settings = read(tmp_path / "state")
    assert (settings.server, settings.name, settings.identity) == (SERVER, "noto", where)
    same = read(tmp_path / "state", "--server", SERVER, "--name", "noto")
    assert same == settings


def test_an_identity_may_be_elsewhere(authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = enrolled(authority, tmp_path / "mine")
    assert read(tmp_path / "state", "--identity", str(where)).name == "noto"
    monkeypatch.setenv("FEDPEFT_CLIENT_IDENTITY", str(where))
    assert read(tmp_path / "state").server == SERVER
    (tmp_path / "client.toml").write_text(f'identity = "{where}"\n')
    monkeypatch.delenv("FEDPEFT_CLIENT_IDENTITY")
    assert read(tmp_path / "state", "--config", str(tmp_path / "client.toml")).identity == where


def test_an_empty_identity_is_none_and_not_the_current_folder(authority: Authority, tmp_path: Path) -> None:
    where = enrolled(authority, tmp_path / "state" / "identity")
    assert read(tmp_path / "state", "--identity", "").identity == where
    assert read(tmp_path / "new", "--identity", "", "--server", SERVER, "--name", "noto", "--insecure").identity is None


def test_a_state_directory_may_come_from_the_environment(
    authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enrolled(authority, tmp_path / "state" / "identity")
    monkeypatch.setenv("FEDPEFT_CLIENT_STATE_DIR", str(tmp_path / "state"))
    assert Settings.read(["--data", "d"]).name == "noto"


def test_no_identity_and_no_server_is_one_fault(tmp_path: Path) -> None:
    with pytest.raises(IdentityInvalid, match=rf"there is no identity in {tmp_path}/stat/identity: .* enroll"):
        read(tmp_path / "stat")
    with pytest.raises(SettingsInvalid, match=r"^--name is missing"):
        read(tmp_path / "stat", "--server", "127.0.0.1:7070")


@pytest.mark.parametrize("lacks", [("certificate.pem",), ("identity.toml", "certificate.pem")])
def test_an_incomplete_identity_names_what_is_missing(
    authority: Authority, tmp_path: Path, lacks: tuple[str, ...]
) -> None:
    where = enrolled(authority, tmp_path / "state" / "identity")
    for name in lacks:
        (where / name).unlink()
    with pytest.raises(IdentityInvalid, match=f"{where} is incomplete, without {' and '.join(lacks)}: "):
        read(tmp_path / "state")


@pytest.mark.parametrize(
    ("role", "flags", "said"),
    [
        (Role.CLIENT, ["--name", "other"], r"name other: the certificate in .* speaks for noto; leave --name out"),
        (Role.CLIENT, ["--server", "127.0.0.1:7070"], r"server 127.0.0.1:7070: the identity in .* is for fed\.clinic"),
        (Role.CLIENT, ["--evaluate"], "that of a client that trains; an evaluator needs a token of role evaluator"),
        (Role.EVALUATOR, [], "is an evaluator's; say --evaluate"),
        (Role.OPERATOR, [], "is that of operator noto, which cannot take part in runs"),
        (Role.VIEWER, ["--evaluate"], "is that of viewer noto, which cannot take part in runs"),
        (Role.CLIENT, ["--insecure"], "--insecure asks for plain text, and there is a certificate in"),
    ],
)
def test_contradictions(authority: Authority, tmp_path: Path, role: Role, flags: list[str], said: str) -> None:
    enrolled(authority, tmp_path / "state" / "identity", role)
    with pytest.raises(SettingsInvalid, match=said):
        read(tmp_path / "state", *flags)


def test_metrics_for_the_network_are_no_contradiction(authority: Authority, tmp_path: Path) -> None:
    enrolled(authority, tmp_path / "state" / "identity")
    assert read(tmp_path / "state", "--insecure", "--metrics", "0.0.0.0:9101").insecure


def test_an_open_key_is_refused(authority: Authority, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = enrolled(authority, tmp_path / "state" / "identity")
    folder.key_path(where).chmod(0o644)
    with pytest.raises(IdentityInvalid, match="chmod 600"):
        read(tmp_path / "state")
    assert run(["--data", "d", "--state-dir", str(tmp_path / "state")]) == 2
    assert "is open to others (mode 0644); it is secret: chmod 600" in capsys.readouterr().err


def test_a_named_folder_must_be_enrolled(tmp_path: Path) -> None:
    with pytest.raises(IdentityInvalid, match="enroll first"):
        read(tmp_path / "state", "--identity", str(tmp_path / "nothing"))


def test_an_ended_certificate_ends_the_client_at_once(
    authority: Authority, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    enrolled(authority, tmp_path / "state" / "identity", life=timedelta(minutes=-5))
    assert run(["--data", "d", "--state-dir", str(tmp_path / "state"), "--log-format", "json"]) == 5
    said = capsys.readouterr().err
    assert "the certificate of client noto ended at" in said
    assert f"and this machine's clock says {datetime.now(UTC):%Y-%m-%d}" in said
    assert "(fedpeft token create --name noto --role client) and enroll again with --replace" in said
