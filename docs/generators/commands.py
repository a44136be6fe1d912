"""The reference of the `fedpeft` command, from what typer knows of it."""

import itertools
from collections.abc import Iterator
from typing import Any

import typer
from typer.main import get_command

from fedpeft.cli.app import app
from generators.tables import table

PAGE = "commands.md"
SHELLS = {"--install-completion", "--show-completion", "--help"}
"""Options that every command has, or that the written part explains."""


def lines() -> Iterator[str]:
    """Yields a section a command, those of a group below it."""
    command = get_command(app)
    yield from _section(command, typer.Context(command, info_name="fedpeft"), "fedpeft", 2)


def _section(command: Any, context: typer.Context, path: str, level: int) -> Iterator[str]:
    inner = getattr(command, "commands", {})
    yield from (f"{'#' * level} `{path}`", "")
    yield from ((command.help or "").replace("\b", "").strip(), "")
    usage = " ".join(command.collect_usage_pieces(context))
    yield from ("```text", f"{path} {usage}", "```", "")
    rows = [(kind, *record) for kind, record in _parameters(command, context) if record[0] not in SHELLS]
    if rows:
        head = ("argument or option", "meaning")
        yield from (*table(head, ((f"`{name}`", _text(text)) for _, name, text in rows)), "")
    if command.epilog:
        yield from _epilog(command.epilog)
    for name, child in inner.items():
        if not child.hidden:
            yield from _section(
                child, typer.Context(child, info_name=name, parent=context), f"{path} {name}", level + 1
            )


def _parameters(command: Any, context: typer.Context) -> Iterator[tuple[str, tuple[str, str]]]:
    """Yields (argument or option, (how it is written, what is said of it)) for each that is not hidden."""
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None:
            yield parameter.param_type_name, record


def _epilog(text: str) -> Iterator[str]:
    """Yields what stands below the options; examples become a block."""
    for is_example, group in itertools.groupby(text.split("\n\n"), lambda line: line.startswith("$ ")):
        if is_example:
            yield from ("```sh", *(line.removeprefix("$ ") for line in group), "```", "")
        else:
            yield from itertools.chain.from_iterable((_text(line), "") for line in group)


def _text(text: str) -> str:
    """Returns text for Markdown: what looks like a placeholder is not taken for HTML."""
    return text.replace("<", "&lt;")
