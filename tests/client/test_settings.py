from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

import fedpeft
from fedpeft.errors import BackboneMismatch, RoundClosed, ServerUnreachable, SettingsInvalid
from fedpeft_client.__main__ import run
from fedpeft_client.error_policy import Exit, exit_code
from fedpeft_client.relay.options import RelayOptions
from fedpeft_client.settings import Settings

FLAGS = ["--server", "127.0.0.1:8080", "--name", "site-a", "--data", "d.parquet", "--state-dir", "s"]
RELAY = ["--relay", "127.0.0.1:7071", "--relay-clients", "4"]
RELAYING = [*FLAGS[:4], *FLAGS[6:], *RELAY]


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"FEDPEFT_CLIENT_{name.upper()}", raising=False)


def test_flags_give_whole_frozen_settings() -> None:
    settings = Settings.read([*FLAGS, "--once", "--evaluate", "--threads", "2", "-v"])
    assert settings.once and settings.evaluate and settings.verbose and settings.threads == 2
    assert settings.data == Path("d.parquet") and settings.device == "auto" and settings.run is None
    with pytest.raises(ValidationError):
        settings.once = False  # type: ignore[misc]


def test_flags_come_before_environment_before_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "client.toml"
    file.write_text('name = "file"\nthreads = 3\ndevice = "cpu"\nserver = "localhost:1"\n')
    monkeypatch.setenv("FEDPEFT_CLIENT_NAME", "environment")
    monkeypatch.setenv("FEDPEFT_CLIENT_THREADS", "4")
    given = ["--data", "d", "--state-dir", "s", "--config", str(file), "--threads", "5"]
    settings = Settings.read(given)
    assert (settings.name, settings.threads, settings.device) == ("environment", 5, "cpu")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "--server is missing (or FEDPEFT_CLIENT_SERVER, or server in the settings file)"),
        ([*FLAGS, "--name", "a b"], "--name: 'a b' is not 1 to 64 letters"),
        ([*FLAGS, "--device", "tpu"], "--device: 'tpu' is not auto, cpu, cuda or cuda:N"),
        ([*FLAGS, "--threads", "0"], "--threads: Input should be greater than or equal to 1"),
        ([*FLAGS, "--server", "localhost"], "is not HOST:PORT"),
        ([*FLAGS, "--server", "localhost:70000"], "is not HOST:PORT"),
        ([*FLAGS, "--server", "example.org:80"], "say --insecure"),
        ([*FLAGS, "--run", "../../etc"], "--run: '../../etc' is not a run's id"),
        ([*FLAGS, "--twice"], "unrecognized arguments: --twice"),
        (
            [*FLAGS[:4], *FLAGS[6:]],
            "--data is missing: name the images of this site; or, for the agent of an edge, its",
        ),
        ([*FLAGS, *RELAY], "--data and --relay exclude each other"),
        ([*FLAGS, "--relay-clients", "4"], "--relay-clients needs --relay"),
        ([*RELAYING[:-2]], "--relay-clients is missing: the number of clients whose updates a round of the edge wants"),
        ([*RELAYING, "--relay-quorum", "5"], "--relay-quorum 5 is more than --relay-clients 4"),
        ([*RELAYING, "--relay", "edge"], "--relay: 'edge' is not HOST:PORT"),
        (
            [*RELAYING, "--relay", "edge.example:7070"],
            "name an operator's identity with --relay-identity, use a loopback",
        ),
        ([*RELAYING, "--evaluate"], "--evaluate does not go with --relay, which sends sums; an evaluator is"),
        ([*RELAYING, "--dry-run"], "--dry-run does not go with --relay, which says at its start whether"),
        ([*RELAYING, "--weights", "w"], "--weights is about computing, which a client with --relay leaves"),
        ([*RELAYING, "--device", "cpu"], "--device is about computing, which a client with --relay leaves"),
        ([*RELAYING, "--label-map", "m"], "--label-map is about images, and a client with --relay has none of its own"),
        ([*FLAGS, "--config", "/nowhere.toml"], "--config: cannot read /nowhere.toml: No such file"),
    ],
)
def test_wrong_usage_is_one_sentence_and_code_2(
    flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SettingsInvalid):
        Settings.read(flags)
    assert run(flags) == Exit.USAGE
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1 and said.startswith("fedpeft-client: ")


def test_settings_file_with_an_unknown_key_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "client.toml"
    file.write_text("colour = 1\n")
    with pytest.raises(SettingsInvalid, match="colour is not a setting"):
        Settings.read([*FLAGS, "--config", str(file)])
    file.write_text("= 1\n")
    with pytest.raises(SettingsInvalid, match="is not a TOML file"):
        Settings.read([*FLAGS, "--config", str(file)])


def test_a_setting_of_another_type_is_said_without_the_name_of_a_class(tmp_path: Path) -> None:
    file = tmp_path / "client.toml"
    file.write_text("data = 3\n")
    with pytest.raises(SettingsInvalid, match=r"--data: should be a path$"):
        Settings.read([*FLAGS[:4], *FLAGS[6:], "--config", str(file)])


@pytest.mark.parametrize(
    ("server", "relay"),
    [
        ("127.0.0.1:8080", "127.0.0.1:8080"),
        ("127.0.0.1:8080", "localhost:8080"),
        ("edge.example:70", "edge.example.:70"),
    ],
)
def test_a_relay_does_not_work_for_the_server_that_it_relays(server: str, relay: str) -> None:
    flags = [*RELAYING, "--server", server, "--relay", relay, "--insecure"]
    with pytest.raises(SettingsInvalid, match="is the server that this client is a client of"):
        Settings.read(flags)


def test_a_relay_has_a_server_in_place_of_data() -> None:
    settings = Settings.read([*RELAYING, "--relay-quorum", "3", "--relay-deadline-s", "60", "--relay-examples", "900"])
    assert settings.data is None and settings.relaying == RelayOptions("127.0.0.1:7071", "site-a", 4, 3, 60.0, 900)
    elsewhere = Settings.read([*RELAYING, "--relay", "edge.example:7070", "--insecure"])
    assert elsewhere.relaying == RelayOptions("edge.example:7070", "site-a", 4)
    assert Settings.read(FLAGS).relaying is None


@pytest.mark.parametrize("server", ["localhost:1", "127.8.0.1:65535", "[::1]:8080"])
def test_plain_text_is_for_this_machine(server: str) -> None:
    assert Settings.read([*FLAGS, "--server", server]).server == server


def test_plain_text_elsewhere_must_be_asked_for() -> None:
    assert Settings.read([*FLAGS, "--server", "example.org:80", "--insecure"]).insecure


def test_help_names_flags_and_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        run(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert "Exit codes: 0 done" in text
    for name in Settings.model_fields:
        assert "--" + name.replace("_", "-") in text


def test_version_is_told_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        run(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"fedpeft-client {fedpeft.__version__}\n"


def test_exit_codes() -> None:
    assert exit_code(ServerUnreachable("x")) == 3
    assert exit_code(BackboneMismatch("x")) == 4
    assert exit_code(RoundClosed("x")) == exit_code(OSError("x")) == 1
