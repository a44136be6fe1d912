"""`--help` is a manual: every command and option has a sentence, examples that parse, and its exit codes."""

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer import Context
from typer.main import get_command

from fedpeft.process.settings import ProcessSettings
from fedpeft_client.settings import Settings as Client
from fedpeft_operator.app import app
from fedpeft_server.settings import Settings as Server

ROOT = get_command(app)


def leaves(command: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yields every command that does something, with how it is called."""
    inner = getattr(command, "commands", {})
    if not inner:
        yield path, command
    for name, child in inner.items():
        yield from leaves(child, f"{path} {name}")


COMMANDS = dict(leaves(ROOT, "fedpeft"))
EXAMPLES = [
    (path, line.removeprefix("$ "))
    for path, command in COMMANDS.items()
    for line in (command.epilog or "").split("\n\n")
    if line.startswith("$ ")
]


def parse(command: Any, arguments: list[str], name: str, parent: Context | None = None) -> str:
    """Reads a command line as the command would, and returns the path of the command that it calls."""
    context = command.make_context(name, arguments, parent=parent)
    if not getattr(command, "commands", None):
        return str(context.command_path)
    inner, child, rest = command.resolve_command(context, [*context._protected_args, *context.args])
    return parse(child, rest, inner, context)


@pytest.mark.parametrize("path", COMMANDS)
def test_a_command_says_what_it_and_its_options_do(path: str) -> None:
    command = COMMANDS[path]
    assert command.help and command.help.rstrip().endswith(".")
    context = Context(command, info_name=path)
    silent = [p.name for p in command.get_params(context) if not (p.get_help_record(context) or ("", "hidden"))[1]]
    assert silent == []


@pytest.mark.parametrize("path", COMMANDS)
def test_a_command_has_an_example_and_its_exit_codes(path: str) -> None:
    assert [example for called, example in EXAMPLES if called == path]
    assert "Exit codes: 0 done; 1 failed; 2 wrong usage" in COMMANDS[path].epilog


@pytest.mark.parametrize(("path", "example"), EXAMPLES)
def test_an_example_is_a_right_command_line(
    path: str, example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("emoji.toml", "train.parquet", "test.parquet"):
        (tmp_path / name).touch()
    (tmp_path / "sites").mkdir()
    monkeypatch.chdir(tmp_path)
    program, *arguments = shlex.split(example)
    assert program == "fedpeft"
    assert parse(ROOT, arguments, "fedpeft").split()[: len(path.split())] == path.split()


@pytest.mark.parametrize("cls", [Server, Client])
def test_an_agent_and_the_daemon_say_the_same(cls: type[ProcessSettings], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cls.read(["--help"])
    said = capsys.readouterr().out
    assert all(word in said for word in ("Example", "Exit codes:", f"{cls.program} --"))
    assert all((field.description or "").strip() for field in cls.model_fields.values())
