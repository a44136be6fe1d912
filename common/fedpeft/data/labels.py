"""Label maps: a site's class names to the run's classes, by name, so that no site's order matters."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedpeft import text_files
from fedpeft.data.sources.interface import Indices
from fedpeft.errors import DataInvalid
from fedpeft.formatting import counted

_SHOWN = 20
_ESCAPED = re.compile(r"\\x([0-9a-f]{2})")
"""A byte of a folder's name that is not UTF-8; see `fedpeft.data.sources.file_names.class_name`."""


@dataclass(frozen=True)
class MappedLabels:
    """The rows of a source that belong to the run.

    Attributes:
        rows: Their numbers, ascending, int64.
        labels: Their labels as positions in the run's classes, int64.
        dropped: Number of rows that the label map dropped.
    """

    rows: Indices
    labels: Indices
    dropped: int

    @property
    def examples(self) -> int:
        """Number of rows that were kept."""
        return len(self.rows)


def nfc(name: str) -> str:
    """Returns a name in Unicode's form NFC, in which names are compared: macOS writes an accent by itself."""
    return unicodedata.normalize("NFC", name)


def read_label_map(path: Path) -> dict[str, str | None]:
    """Reads a TOML or JSON file of ``own name = run class``; an empty string or null drops the class.

    Raises:
        DataInvalid: If the file cannot be read, is not a flat table of strings, or names a class twice.
    """
    toml = path.suffix.lower() == ".toml"
    try:
        text = text_files.read(path, text_files.MOST_LISTED_BYTES)
        data = text_files.toml(text) if toml else text_files.json_of(text, _once)
    except OSError as error:
        raise DataInvalid(f"cannot read label map {path}: {error.strerror}") from None
    except _Twice as error:
        raise DataInvalid(f"label map {path} names {error.args[0]!r} twice; one line for each class") from None
    except ValueError as error:
        more = "" if path.suffix.lower() in (".toml", ".json") else "; a label map is NAME.toml or NAME.json"
        raise DataInvalid(f"label map {path} is not {'TOML' if toml else 'JSON'}: {error}{more}") from None
    if not isinstance(data, dict):
        raise DataInvalid(f"label map {path} is not a table of own name = run class")
    for own, name in data.items():
        if name is not None and not isinstance(name, str):
            raise DataInvalid(f'label map {path}: {own!r} is {name!r}; a class of the run, or "" to drop, is expected')
    if twice := _twice(map(nfc, data)):
        raise DataInvalid(f"label map {path} names {twice!r} twice, in two forms of Unicode; one line for each class")
    return {own: name or None for own, name in data.items()}


class _Twice(Exception):
    """A key that an object of JSON has twice: Python takes the second without a word."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if twice := _twice(key for key, _ in pairs):
        raise _Twice(twice)
    return dict(pairs)


def _twice(names: Iterable[str]) -> str | None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


class ClassMap:
    """A site's class names to the run's classes; all names are compared in NFC.

    Args:
        classes: The run's classes in the order of the logits.
        label_map: Own name to run class, None to drop the class. A name that is not in it stands for itself.

    Raises:
        DataInvalid: If the map names a class that the run does not have.
    """

    def __init__(self, classes: Sequence[str], label_map: Mapping[str, str | None] | None = None) -> None:
        self._classes = classes
        self._position = {nfc(name): k for k, name in enumerate(classes)}
        self._map = {nfc(own): name if name is None else nfc(name) for own, name in (label_map or {}).items()}
        for own, name in self._map.items():
            if name is not None and name not in self._position:
                raise DataInvalid(f"the label map sends {own!r} to {name!r}{self._alike(name)}; {_known(classes)}")

    def of(self, own: str) -> int | None:
        """Returns the position of a site's class in the run's classes; -1 if it is none of them, None if dropped."""
        name = self._map.get(nfc(own), nfc(own))
        return None if name is None else self._position.get(name, -1)

    def unknown(self, own: str, rows: int) -> DataInvalid:
        """Returns the error about a class that is not among the run's."""
        return DataInvalid(
            f"class {own!r} ({counted(rows, 'row')}) is not among the run's{self._alike(own)}; {_known(self._classes)}"
            f'; a label map can rename it or leave its rows out ({json.dumps(own, ensure_ascii=False)} = "")'
        )

    def _alike(self, name: str) -> str:
        """Returns what a name differs in from a class that it is probably meant to be, as a clause."""
        same = (known for known in self._classes if _plain(known) == _plain(name))
        found = next(same, None)
        if found is not None:
            return f" (it differs from {found!r} in case or white space only)"
        read = _ESCAPED.sub(lambda match: chr(int(match[1], 16)), name)
        if read != name and nfc(read) in self._position:
            return f" (its folder's name is not UTF-8; in Latin-1 it is {read!r})"
        return ""


def _plain(name: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())


def map_labels(
    names: Sequence[str], labels: Indices, classes: Sequence[str], label_map: Mapping[str, str | None] | None = None
) -> MappedLabels:
    """Maps a site's labels to the run's classes by name, names compared in NFC.

    Args:
        names: The site's class names.
        labels: The label of every row, positions in `names`, int64.
        classes: The run's classes in the order of the logits.
        label_map: Own name to run class, None to drop the class. A name that is not in it stands for itself.

    Raises:
        DataInvalid: If a class that has rows is not among the run's, the map names a class that the run does not have,
            or no row is left.
    """
    known = ClassMap(classes, label_map)
    table = np.full(len(names), -1, np.int64)
    present = np.bincount(labels, minlength=len(names))
    for k, own in enumerate(names):
        position = known.of(own)
        if position is None:
            continue
        table[k] = position
        if position < 0 and present[k]:
            raise known.unknown(own, int(present[k]))
    mapped = table[labels]
    rows = np.flatnonzero(mapped >= 0)
    if not len(rows):
        raise DataInvalid(f"the label map drops all {len(labels)} rows")
    return MappedLabels(rows, mapped[rows], len(labels) - len(rows))


def _known(classes: Sequence[str]) -> str:
    more = f" and {len(classes) - _SHOWN} more" if len(classes) > _SHOWN else ""
    return f"the run's classes are {', '.join(classes[:_SHOWN])}{more}"
