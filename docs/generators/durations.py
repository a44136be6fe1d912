"""Every duration of the programs: name, meaning and seconds, from the two frozen `Timing`."""

import re
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from fedpeft_client.timing import Timing as Client
from fedpeft_server.timing import Timing as Server
from generators.tables import table

PAGE = "waits.md"
_ENTRY = re.compile(r"^ {4}(\w+): (.+(?:\n {5,}.+)*)", re.M)


def lines() -> Iterator[str]:
    """Yields a section a program."""
    for program, cls in (("fedpeft-server", Server), ("fedpeft-client", Client)):
        yield from (f"## Durations of `{program}`", "")
        yield from table(("name", "meaning", "seconds"), _rows(cls))
        yield ""


def _rows(cls: type[Any]) -> Iterator[tuple[str, ...]]:
    text = "\n".join(line.removeprefix("    ") for line in (cls.__doc__ or "").splitlines())
    meanings = {name: " ".join(meaning.split()) for name, meaning in _ENTRY.findall(text)}
    for field in fields(cls):
        yield f"`{field.name}`", meanings[field.name], f"{field.default:,.9g}"
