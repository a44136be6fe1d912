"""Users without a home folder, as containers have them: every command works or says what to name."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedpeft.api.caller import choose
from fedpeft.errors import SettingsInvalid
from fedpeft.identity import folder
from fedpeft.process import home
from fedpeft.process.addresses import Address
from fedpeft_operator.app import main
from fedpeft_server.commands import init


@pytest.fixture(autouse=True)
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "FEDPEFT_IDENTITY", "FEDPEFT_SERVER"):
        monkeypatch.delenv(name, raising=False)

    def unknown(number: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.setattr("pwd.getpwuid", unknown)


def test_there_is_none_and_xdg_stands_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert home.home_folder() is None and folder.personal() is None
    with pytest.raises(SettingsInvalid, match=r"no home folder .* name a folder with --identity"):
        folder.personal_needed("--identity")
    monkeypatch.setenv("XDG_CONFIG_HOME", "/configuration")
    assert folder.personal() == Path("/configuration/fedpeft/identity")


def test_a_server_on_this_machine_is_called_without_an_identity() -> None:
    assert choose(None, None, insecure=False).identity is None
    with pytest.raises(SettingsInvalid, match="there is no identity for it: enroll"):
        choose("fed.example.org:7070", None, insecure=False)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--server", "127.0.0.1:1", "run", "list"], 3, "no FedPEFT server answers"),
        (["enroll", "x"], 2, "name a folder with --identity"),
        (["doctor", "--json"], 0, ""),
        (["--install-completion", "bash"], 2, "no home folder"),
    ],
)
def test_commands_do_not_end_in_an_unexpected_error(
    arguments: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # typer looks which shell called it, and ends differently below a plain sh, as of make
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert (ended.value.code or 0) == code
    printed = capsys.readouterr().err
    assert said in printed and "unexpected" not in printed


def test_a_server_is_set_up_where_the_operator_s_folder_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--data-dir", str(tmp_path / "data"), "--host", "my_host.example."]
    with pytest.raises(SettingsInvalid, match=r"no home folder .* name a folder with --operator-identity"):
        init.main(given)
    assert init.main([*given, "--operator", "op", "--operator-identity", str(tmp_path / "operator")]) == 0
    assert "operator op: made" in capsys.readouterr().out
    assert folder.server_of(tmp_path / "operator") == "my_host.example:7070"


def test_the_root_s_dot_at_the_end_of_a_host_is_no_part_of_its_name() -> None:
    assert Address.parse("fed.example.org.:7070") == Address("fed.example.org", 7070)
    assert Address.parse("[::1]:7070") == Address("::1", 7070)
