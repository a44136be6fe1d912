"""Label maps: a site's class names to the run's classes, by name, so that no site's order matters."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedpeft.data.interface import Indices
from fedpeft.errors import DataInvalid
from fedpeft.units import counted

_SHOWN = 20


@dataclass(frozen=True)
class MappedLabels:
    """The rows of a source that belong to the run.

    Attributes:
        rows: Their numbers, ascending, int64.
        labels: Their labels as positions in the run's classes, int64.
        dropped: How many rows the label map dropped.
    """

    rows: Indices
    labels: Indices
    dropped: int

    @property
    def examples(self) -> int:
        """How many rows were kept."""
        return len(self.rows)


def read_label_map(path: Path) -> dict[str, str | None]:
    """Reads a TOML or JSON file of ``own name = run class``; an empty string or null drops the class.

    Raises:
        DataInvalid: If the file cannot be read, or is not a flat table of strings.
    """
    try:
        text = path.read_text(encoding="utf-8")
        data = tomllib.loads(text) if path.suffix.lower() == ".toml" else json.loads(text)
    except OSError as error:
        raise DataInvalid(f"cannot read label map {path}: {error.strerror}") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise DataInvalid(f"label map {path} is not {'TOML' if path.suffix == '.toml' else 'JSON'}: {error}") from None
    if not isinstance(data, dict):
        raise DataInvalid(f"label map {path} is not a table of own name = run class")
    for own, name in data.items():
        if name is not None and not isinstance(name, str):
            raise DataInvalid(f'label map {path}: {own!r} is {name!r}; a class of the run, or "" to drop, is expected')
    return {own: name or None for own, name in data.items()}


def map_labels(
    names: Sequence[str], labels: Indices, classes: Sequence[str], label_map: Mapping[str, str | None] | None = None
) -> MappedLabels:
    """Maps a site's labels to the run's classes by name.

    Args:
        names: The site's class names.
        labels: The label of every row, positions in `names`, int64.
        classes: The run's classes in the order of the logits.
        label_map: Own name to run class, None to drop the class. A name that is not in it stands for itself.

    Raises:
        DataInvalid: If a class that has rows is none of the run's, the map names a class that the run does not have, or
            no row is left.
    """
    position = {name: k for k, name in enumerate(classes)}
    label_map = label_map or {}
    for own, name in label_map.items():
        if name is not None and name not in position:
            raise DataInvalid(f"the label map sends {own!r} to {name!r}; {_known(classes)}")
    table = np.full(len(names), -1, np.int64)
    present = np.bincount(labels, minlength=len(names))
    for k, own in enumerate(names):
        name = label_map.get(own, own)
        if name is None:
            continue
        table[k] = position.get(name, -1)
        if table[k] < 0 and present[k]:
            raise DataInvalid(
                f"class {own!r} ({counted(present[k], 'row')}) is none of the run's; {_known(classes)}; "
                "a label map can rename it"
            )
    mapped = table[labels]
    rows = np.flatnonzero(mapped >= 0)
    if not len(rows):
        raise DataInvalid(f"the label map drops all {len(labels)} rows")
    return MappedLabels(rows, mapped[rows], len(labels) - len(rows))


def _known(classes: Sequence[str]) -> str:
    more = f" and {len(classes) - _SHOWN} more" if len(classes) > _SHOWN else ""
    return f"the run's classes are {', '.join(classes[:_SHOWN])}{more}"
