"""The reference of all commands: of `fedpeft` from typer, of daemon and agent from their argument parsers."""

import argparse
import itertools
import os
from collections.abc import Iterator
from typing import Any

import typer
from typer.main import get_command

from fedpeft_client.commands import enroll, leave, ledger, status
from fedpeft_operator.app import app
from fedpeft_server.commands import authority, backup, certificate, check, init, restore
from generators.tables import table

PAGE = "commands.md"
PARSERS = (
    init._parser,
    certificate._parser,
    authority._parser,
    check._parser,
    backup._parser,
    restore._parser,
    enroll._parser,
    status._parser,
    ledger._parser,
    leave._parser,
)
"""Makers of the parsers of the commands that daemon and agent have beside serving and taking part."""
SHELLS = {"--install-completion", "--show-completion", "--help"}
"""Options that every command has, or that the written part explains."""


def lines() -> Iterator[str]:
    """Yields a section a command, those of a group below it."""
    command = get_command(app)
    yield from _section(command, typer.Context(command, info_name="fedpeft"), "fedpeft", 2)
    for parser in _parsers():
        yield from _of_parser(parser)


def _parsers() -> list[argparse.ArgumentParser]:
    """Returns the parsers as they are for somebody called you, so that the page is the same wherever it is made."""
    before = dict(os.environ)
    os.environ.update(HOME="/home/you", LOGNAME="you")
    os.environ.pop("XDG_CONFIG_HOME", None)
    try:
        return [make() for make in PARSERS]
    finally:
        os.environ.clear()
        os.environ.update(before)


def _of_parser(parser: argparse.ArgumentParser, level: str = "##") -> Iterator[str]:
    """Yields the section of a command of daemon or agent, those of its own commands below it."""
    usage = " ".join(parser.format_usage().removeprefix("usage: ").split())
    yield from (f"{level} `{parser.prog}`", "", _text(parser.description or ""), "", "```text", usage, "```", "")
    rows, inner = [], dict[str, argparse.ArgumentParser]()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            rows += [(f"`{each.dest}`", _text(each.help or "")) for each in action._choices_actions]
            inner.update(action.choices)
        elif not isinstance(action, argparse._HelpAction):
            value = "" if action.nargs == 0 else f" {action.metavar or action.dest.upper()}"
            name = ", ".join(action.option_strings) + value if action.option_strings else value.strip()
            rows.append((f"`{name}`", _text(_help(action))))
    yield from (*table(("argument or option", "meaning"), rows), "")
    title, _, example = (parser.epilog or "").partition(": ")
    if example:
        yield from (f"{title}:", "", "```sh", example, "```", "")
    for child in inner.values():
        yield from _of_parser(child, "###")


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
    """Yields (kind, (usage, help)) for each parameter that is not hidden; the kind is `argument` or `option`."""
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None:
            yield parameter.param_type_name, record


def _help(action: argparse.Action) -> str:
    """Returns the help of an argument, its default filled in."""
    return ((action.help or "") % {"default": action.default}).replace("/home/you", "~")


def _epilog(text: str) -> Iterator[str]:
    """Yields the epilog's paragraphs; examples become a block of code."""
    for is_example, group in itertools.groupby(text.split("\n\n"), lambda line: line.startswith("$ ")):
        if is_example:
            yield from ("```sh", *(line.removeprefix("$ ") for line in group), "```", "")
        else:
            yield from itertools.chain.from_iterable((_text(line), "") for line in group)


def _text(text: str) -> str:
    """Returns text for Markdown: what looks like a placeholder is not taken for HTML."""
    return text.replace("<", "&lt;")
