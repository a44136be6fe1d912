"""Arguments that a program gives: what has a wrong type is said before anything is done."""

from __future__ import annotations

import os
import reprlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from fedpeft.errors import SettingsInvalid


def path_of(value: object, argument: str) -> Path:
    """Returns an argument as a path; an empty text is none, and not the current folder.

    Raises:
        SettingsInvalid: If it is none.
    """
    if not isinstance(value, str | os.PathLike):
        raise SettingsInvalid(f"{argument} is a path, a str or os.PathLike; a {type(value).__name__} was given")
    if value == "":
        raise SettingsInvalid(empty(argument))
    return Path(value)


def empty(argument: str) -> str:
    """Returns the sentence about an argument that is an empty text."""
    return f"{argument} is empty: a variable that is not set, perhaps"


def list_of(value: Any, argument: str, kind: type, words: str) -> list[Any]:
    """Returns an argument that lists values of one type as a list.

    Args:
        value: The argument.
        argument: Its name.
        kind: The type; truth values are no numbers.
        words: Name of such values, in the plural.

    Raises:
        SettingsInvalid: If it is no such list; a single text is none.
    """
    listed = list(value) if is_list(value) and not isinstance(value, str) else [None]
    if not all(isinstance(each, kind) and not isinstance(each, bool) for each in listed):
        raise _wrong(value, argument, f"a list of {words}")
    return listed


def mapping_of(value: Any, argument: str, words: str, fits: Callable[[Any], bool] | None = None) -> Mapping[str, Any]:
    """Returns an argument that maps texts to values.

    Args:
        value: The argument.
        argument: Its name.
        words: Names of the texts and the values.
        fits: Called with each value; returns False if it is of a wrong type.

    Raises:
        SettingsInvalid: If it is no such mapping.
    """
    if isinstance(value, Mapping) and all(
        isinstance(key, str) and (fits is None or fits(each)) for key, each in value.items()
    ):
        return value
    raise _wrong(value, argument, f"a mapping of {words}")


def text_of(value: Any, argument: str) -> str:
    """Returns an argument that is a text.

    Raises:
        SettingsInvalid: If it is none.
    """
    if isinstance(value, str):
        return value
    raise _wrong(value, argument, "a text")


def is_list(value: object) -> bool:
    """Returns True for what can be gone through in order, a text too, and no mapping."""
    return isinstance(value, Iterable) and not isinstance(value, bytes | Mapping)


def _wrong(value: object, argument: str, wanted: str) -> SettingsInvalid:
    return SettingsInvalid(f"{argument} is {wanted}; {reprlib.repr(value)} was given")
