"""Checks a dashboard's JSON against Grafana's schema.

The schema is the one of Grafana 11.6 as its SDK for Python (grafana-foundation-sdk) has it: classes that are generated
from Grafana's definitions, panel options and queries included. Their `from_json` drops what it does not know and
checks no type; so what was read is written again, which must give the same, and each attribute is held against its
annotation.
"""

from __future__ import annotations

import enum
import json
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal, Union

from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard


def faults(data: dict[str, Any]) -> list[str]:
    """Returns what is wrong with a dashboard, each with its place."""
    register_default_plugins()
    read = Dashboard.from_json(data)
    written = json.loads(json.dumps(read, cls=JSONEncoder))
    return [*_differences(data, written, "dashboard"), *_of_object(read, "dashboard")]


def _differences(given: object, known: object, place: str) -> Iterator[str]:
    if isinstance(given, dict) and isinstance(known, dict):
        for key in given.keys() - known.keys():
            yield f"{place}.{key} is not in the schema"
        for key in given.keys() & known.keys():
            yield from _differences(given[key], known[key], f"{place}.{key}")
    elif isinstance(given, list) and isinstance(known, list) and len(given) == len(known):
        for position, (one, other) in enumerate(zip(given, known, strict=True)):
            yield from _differences(one, other, f"{place}[{position}]")
    elif given != known:
        yield f"{place} is {given!r}, which the schema reads as {known!r}"


def _of_object(value: object, place: str) -> Iterator[str]:
    for name, annotation in typing.get_type_hints(type(value)).items():
        yield from _of(getattr(value, name), annotation, f"{place}.{name}")


def _of(value: object, annotation: Any, place: str) -> Iterator[str]:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in (object, Any):
        # What a panel type adds (options, custom): an object of its class, or data where it declares none.
        if hasattr(value, "to_json"):
            yield from _of_object(value, place)
    elif origin in (Union, types.UnionType):
        each = [list(_of(value, argument, place)) for argument in arguments]
        if all(each):
            yield from min(each, key=len)
    elif origin is Literal:
        if value not in arguments:
            yield f"{place} is {value!r}, not one of {arguments}"
    elif origin is list:
        if not isinstance(value, list):
            yield f"{place} is no list: {value!r}"
            return
        for position, one in enumerate(value):
            yield from _of(one, arguments[0], f"{place}[{position}]")
    elif origin is dict:
        if not isinstance(value, dict):
            yield f"{place} is no object: {value!r}"
            return
        for key, one in value.items():
            yield from _of(one, arguments[1], f"{place}.{key}")
    else:
        yield from _of_class(value, annotation, place)


def _of_class(value: object, cls: type, place: str) -> Iterator[str]:
    if issubclass(cls, enum.Enum):
        if value not in list(cls):
            yield f"{place} is {value!r}, not one of {[m.value for m in cls]}"
    elif cls is float:
        if not isinstance(value, int | float) or isinstance(value, bool):
            yield f"{place} is no number: {value!r}"
    elif isinstance(value, dict) and hasattr(cls, "from_json"):  # the SDK reads some parts only on demand
        read = cls.from_json(value)
        yield from _differences(value, json.loads(json.dumps(read, cls=JSONEncoder)), place)
        yield from _of_object(read, place)
    elif not isinstance(value, cls) or (cls is int and isinstance(value, bool)):
        yield f"{place} is {value!r}, not {cls.__name__}"
    elif hasattr(value, "to_json"):
        yield from _of_object(value, place)
