"""Faults of a run file in words: the field, and the line of the file."""

from __future__ import annotations

import json
import re
import tomllib
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from fedpeft.formatting import counted

Fault = tuple[str, str]
"""Dotted path of a field, as TOML writes it, and a sentence about it."""

LONGEST_VALUE = 60
"""Characters of a wrong value that are shown."""

_WORDS = {
    "missing": "is required",
    "extra_forbidden": "is not a known key",
    "tuple_type": "should be a list",
    "model_type": "should be a table",
    "dict_type": "should be a table",
}
_NESTED = "nested_faults"


def faults_of(error: ValidationError, data: Any, below: str = "", whole: str = "run file") -> tuple[Fault, ...]:
    """Returns every fault, one a field.

    Args:
        error: Pydantic's error.
        data: The checked data. Pydantic's own names for parts of a schema, which the data has not, are left out.
        below: Path of the field that `data` is the value of.
        whole: Name of the file, for a fault that is of no field.
    """
    found: dict[str, list[str]] = {}
    for fault in error.errors(include_url=False):
        if fault["type"] == "too_short" and len(fault["input"]) >= fault["ctx"]["min_length"]:
            continue  # items that are wrong, each of them a fault, are not counted
        parts = ([below] if below else []) + [_quoted(part) for part in _way(data, fault)]
        if fault["type"] == _NESTED:
            for key, text in fault["ctx"]["faults"]:
                found.setdefault(".".join([*parts, key]), []).append(text)
        else:
            found.setdefault(".".join(parts) or whole, []).append(_sentence(fault))
    return tuple((path, ", or: ".join(dict.fromkeys(texts))) for path, texts in found.items())


def nested(error: ValidationError, data: Any) -> PydanticCustomError:
    """Returns what a validator raises for the faults of keys below the field that it checks."""
    return PydanticCustomError(_NESTED, "holds wrong values", {"faults": faults_of(error, data)})


def fault_at(key: str, text: str) -> PydanticCustomError:
    """Returns what a validator of a section raises for one of its keys, also where the file does not give that key."""
    return PydanticCustomError(_NESTED, "holds wrong values", {"faults": ((key, text),)})


def dotted(*parts: str) -> str:
    """Returns the path of a field as TOML writes it."""
    return ".".join(map(_quoted, parts))


def in_file(path: Path, text: str, faults: Sequence[Fault], override: Mapping[str, Any] = MappingProxyType({})) -> str:
    """Returns the message about faults of a TOML file: a line `FILE:LINE: FIELD: what` for each.

    Args:
        path: The file.
        text: Its content.
        faults: At least one.
        override: Fields that were set in place of the file's; of these no line of the file is to blame.
    """

    def place(field: str) -> str:
        parts = _parts(field)
        overridden = bool(parts) and _present(override, parts) == parts
        return f"set in place of {path}'s" if overridden else f"{path}:{line_of(text, field)}"

    return "\n".join(f"{place(field)}: {field}: {fault}" for field, fault in faults)


def keys_there(data: Any, field: str) -> int:
    """Returns how many keys of a field's path, from the first one on, a TOML document has."""
    return len(_present(data, _parts(field)))


def line_of(text: str, field: str) -> int:
    """Returns the 1-based line in which a TOML text begins to have a field, or its section if it is absent; else 1.

    That is the last line that names it and before which the text is whole and does not have it. The text is valid.
    """
    lines, parts = text.split("\n"), _present(tomllib.loads(text), _parts(field))
    ways = (parts[:length] for length in range(len(parts), 0, -1))
    return next((line for way in ways if (line := _beginning(lines, way))), 1)


def _beginning(lines: Sequence[str], way: Sequence[str]) -> int:
    """Returns the line in which a field that there is begins; 0 if its key is written with escapes."""
    # A key stands before an equals sign, a dot or a bracket: values, of which there may be thousands, do not.
    key = re.compile(rf"(?<![\w-])[\"']?{re.escape(way[-1])}[\"']?\s*[=.\]]")
    found = 0
    for number, line in enumerate(lines, 1):
        if not key.search(line):
            continue
        try:
            before = tomllib.loads("\n".join(lines[: number - 1]))
        except tomllib.TOMLDecodeError:
            continue  # inside a value of several lines
        if _present(before, way) == way:
            break
        found = number
    return found


def _way(data: Any, fault: ErrorDetails) -> list[str]:
    """Returns where in the data a fault is."""
    way = []
    for number, part in enumerate(fault["loc"], 1):
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            if fault["type"] != "missing" or number < len(fault["loc"]):
                continue
        way.append(str(part))
    return way


def _sentence(fault: ErrorDetails) -> str:
    if fault["type"] == "too_short":
        return f"should have at least {counted(fault['ctx']['min_length'], 'item')}"
    message = _WORDS.get(fault["type"], fault["msg"].removeprefix("Value error, "))
    value = fault["input"]
    if fault["type"] in ("missing", "value_error") or not isinstance(value, int | float | str):
        return message  # what our own validators say names the value where that helps
    try:
        shown = repr(value)
    except ValueError:  # Python does not write whole numbers of more than 4,300 digits
        shown = "a number of thousands of digits"
    return f"{message} (got {shown if len(shown) <= LONGEST_VALUE else shown[:LONGEST_VALUE] + '...'})"


def _quoted(part: str) -> str:
    """Returns a key as TOML writes it; nothing in it reaches a terminal as it is."""
    if re.fullmatch(r"[A-Za-z0-9_-]+", part):
        return part
    quoted = json.dumps(part, ensure_ascii=False)
    return "".join(f"\\u{ord(c):04x}" if unicodedata.category(c) == "Cc" else c for c in quoted)


def _parts(field: str) -> list[str]:
    """Returns the keys of a dotted path."""
    try:
        at: Any = tomllib.loads(f"{field} = 0")
    except tomllib.TOMLDecodeError:
        return []
    parts = []
    while isinstance(at, dict):
        ((key, at),) = at.items()
        parts.append(key)
    return parts


def _present(data: Any, parts: Sequence[str]) -> list[str]:
    """Returns the first of some keys that a TOML document has, each in the table of the one before."""
    found = []
    for part in parts:
        if not isinstance(data, dict) or part not in data:
            break
        data = data[part]
        found.append(part)
    return found
