"""Overrides of a run file: fields that are set after it was read, from the command line or by a study.

An override is a table of the run file's own shape. Where it changes what a section names (the PEFT method, the
strategy, the local algorithm), the options that stood beside the old name go with it.
"""

from __future__ import annotations

import copy
import tomllib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from fedpeft.config_errors import dotted
from fedpeft.errors import ConfigInvalid
from fedpeft.partition_schemes import OPTIONS

Table = dict[str, Any]

NAMED_BY = {("peft",): "method", ("aggregation",): "strategy", ("training", "algorithm"): "name"}
"""Sections whose further keys are options of what this key names."""
OPTIONS_OF: dict[tuple[str, ...], dict[str, tuple[tuple[str, ...], tuple[str, ...]]]] = {
    ("simulation",): {
        "partition": (tuple({option: None for options in OPTIONS.values() for option in options}), ("column",)),
        "engine": (("workers",), ()),
    },
    ("codec",): {"up": (("density", "values"), ())},
    ("training",): {
        "optimizer": (("momentum",), ("momentum",)),
        "schedule": (("final_factor", "schedule_drops"), ()),
    },
    ("rounds",): {"policy": (("concurrency", "max_staleness"), ())},
}
"""By section the keys whose value has options among the keys beside it: all of them, and those that are for the value
which is meant where there is none."""


def merged(base: Mapping[str, Any], over: Mapping[str, Any], *, at: tuple[str, ...] = ()) -> Table:
    """Returns a run file's tables with an override's values in them; changes neither.

    Args:
        base: The tables; where they name nothing, their options are those of what the default names.
        over: The override.
        at: Path of both in the run file.
    """
    key = NAMED_BY.get(at)
    if key is not None and key in over and over[key] != base.get(key):
        return copy.deepcopy(dict(over))
    return _laid(_kept(base, over, at, named_alone=False), over, at, merged)


def united(base: Mapping[str, Any], over: Mapping[str, Any], *, at: tuple[str, ...] = ()) -> Table:
    """Returns the override that sets what `base` sets, and over it what `over` sets; changes neither.

    Options that stand beside no name stay, whichever of the two names something: they are for that.

    Args:
        base: An override.
        over: Likewise.
        at: Path of both in the run file.
    """
    key = NAMED_BY.get(at)
    if key is not None and key in base and key in over and over[key] != base[key]:
        return copy.deepcopy(dict(over))
    return _laid(_kept(base, over, at, named_alone=True), over, at, united)


def _kept(base: Mapping[str, Any], over: Mapping[str, Any], at: tuple[str, ...], *, named_alone: bool) -> Table:
    """Returns `base` without the options of values in whose place `over` puts others.

    Args:
        base: The tables.
        over: The override.
        at: Path of both in the run file.
        named_alone: False if the options of a default go too, where `base` names no value.
    """
    gone = set[str]()
    for name, (options, of_default) in OPTIONS_OF.get(at, {}).items():
        if name in over and over[name] != base.get(name):
            gone.update(options if name in base else () if named_alone else of_default)
    return {key: value for key, value in base.items() if key not in gone}


def _laid(base: Mapping[str, Any], over: Mapping[str, Any], at: tuple[str, ...], below: Callable[..., Table]) -> Table:
    """Returns `base` with the values of `over` in it, and their tables as `below` makes one of two."""
    result = copy.deepcopy(dict(base))
    for name, value in over.items():
        there = result.get(name)
        if isinstance(value, Mapping) and (isinstance(there, Mapping) or there is None):
            result[name] = below(there or {}, value, at=(*at, name))
        else:
            result[name] = copy.deepcopy(value)
    return result


def parse_overrides(settings: Iterable[str]) -> Table:
    """Returns the override that settings KEY=VALUE make, each key a path such as training.learning_rate.

    A value is one of TOML; what is none is text, so that quotes are needed only where a number is meant as text.

    Raises:
        ConfigInvalid: If a setting has no form KEY=VALUE, or two set one field.
    """
    result: Table = {}
    for setting in settings:
        result = joined(result, parse_setting(setting))
    return result


def joined(one: Mapping[str, Any], other: Mapping[str, Any]) -> Table:
    """Returns the override that makes what both make; changes neither.

    Raises:
        ConfigInvalid: If both set one field: which is meant cannot be told.
    """
    if field := _set_by_both(one, other):
        raise ConfigInvalid(f"{field} is set twice; give it once")
    return united(one, other)


def _set_by_both(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Returns the path of the first field that two overrides set; "" if there is none."""
    for key in one.keys() & other.keys():
        mine, theirs = one[key], other[key]
        if not (isinstance(mine, Mapping) and isinstance(theirs, Mapping)):
            return dotted(key)
        if below := _set_by_both(mine, theirs):
            return f"{dotted(key)}.{below}"
    return ""


def parse_setting(setting: str) -> Table:
    """Returns the override that one setting KEY=VALUE makes; raises as `parse_overrides`."""
    key, equals, value = setting.partition("=")
    if not (equals and key.strip()):
        raise ConfigInvalid(f"{setting!r} is no setting; give KEY=VALUE, such as training.learning_rate=0.005")
    return at_key(key.strip(), value_of(value.strip()))


def at_key(key: str, value: Any) -> Table:
    """Returns the override that gives one field a value.

    Args:
        key: Path of the field as TOML writes it.
        value: A value as TOML has them.

    Raises:
        ConfigInvalid: If that is no path.
    """
    try:
        found = tomllib.loads(f"{key} = 0") if key.isprintable() else {}
    except tomllib.TOMLDecodeError:
        found = {}
    at: Any = found
    while isinstance(at, dict) and len(at) == 1:
        (last,) = at
        if not isinstance(at[last], dict):
            at[last] = value
            return found
        at = at[last]
    raise ConfigInvalid(f"{key!r} is no key of a run file; give one such as training.learning_rate")


def value_of(text: str) -> Any:
    """Returns a value of TOML; the text itself if it is none."""
    try:
        table = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return table["value"] if len(table) == 1 else text
