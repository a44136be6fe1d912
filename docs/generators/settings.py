"""The settings of daemon and agent: flag, meaning, values, default, from the pydantic models."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from fedpeft.process.settings import ProcessSettings
from fedpeft_client.settings import Settings as Client
from fedpeft_server.settings import Settings as Server
from generators.run_file import explanations, values
from generators.tables import table

PAGE = "settings.md"


def lines() -> Iterator[str]:
    """Yields a section a program."""
    for cls in (Server, Client):
        prefix = cls.model_config.get("env_prefix", "")
        yield from (f"## `{cls.program}`", "", f"In the environment: `{prefix}` and the name in capitals.", "")
        yield from table(("flag", "meaning", "values", "default"), _rows(cls))
        yield ""


def _rows(cls: type[ProcessSettings]) -> Iterator[tuple[str, ...]]:
    properties = cls.model_json_schema()["properties"]
    texts = explanations(cls)
    for name, field in cls.model_fields.items():
        short = f", `-{cls.shortcuts[name]}`" if name in cls.shortcuts else ""
        flag = f"`--{name.replace('_', '-')}`{short}"
        meaning = field.description or texts.get(name, "")
        yield flag, meaning, _values(properties[name]), _default(field)


def _values(schema: dict[str, Any]) -> str:
    """Returns what may be given; a path is said to be one."""
    choices = [s for s in schema.get("anyOf", [schema]) if s.get("type") != "null"]
    return "path" if any(s.get("format") == "path" for s in choices) else values(schema)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    if value is None or value == "":
        return "none"
    return f"`{value if isinstance(value, str | Path) else json.dumps(value)}`"
