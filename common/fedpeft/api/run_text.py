"""A run's configuration as the run file that would make it, with every default written out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from fedpeft.config import RunConfig

WIDTH = 100
"""A list that is longer has an item a line."""


def run_text(config: RunConfig) -> str:
    """Returns a configuration in TOML; read again, it is the same configuration."""
    data = config.model_dump(mode="json", exclude_none=True)
    plain = {key: value for key, value in data.items() if not isinstance(value, Mapping)}
    return "\n".join([*_pairs(plain), *_sections(data)]) + "\n"


def _sections(data: Mapping[str, Any]) -> Iterator[str]:
    for name, section in data.items():
        if not isinstance(section, Mapping):
            continue
        values = {key: value for key, value in section.items() if key != "options"}
        options = section.get("options") or {}
        if name != "model":  # whose options are a table of their own; elsewhere they stand beside what they are of
            values, options = {**values, **options}, {}
        yield from ("", f"[{name}]", *_pairs(values))
        if options:
            yield from ("", f"[{name}.options]", *_pairs(options))


def _pairs(values: Mapping[str, Any]) -> Iterator[str]:
    for key, value in values.items():
        yield f"{_key(key)} = {_value(value)}"


def _key(name: str) -> str:
    bare = name.isascii() and name.replace("_", "").replace("-", "").isalnum()
    return name if bare else _text(name)


def _text(value: str) -> str:
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _value(value: Any) -> str:
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_key(key)} = {_value(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        items = [_value(each) for each in value]
        whole = f"[{', '.join(items)}]"
        return whole if len(whole) <= WIDTH else "[\n" + "".join(f"  {item},\n" for item in items) + "]"
    return repr(value)
