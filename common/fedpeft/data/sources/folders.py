"""Image folders: one subfolder a class, named as the class."""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import structlog

from fedpeft.data.sources import disks
from fedpeft.data.sources.file_names import PARQUET_SUFFIXES, shown
from fedpeft.data.sources.interface import ImageUnreadable, Indices, bytes_or_note, reckoned_bytes
from fedpeft.data.sources.inventory import Fate, Group, Inventory, Tally
from fedpeft.data.sources.parquet_labels import metadata
from fedpeft.data.sources.splits import one_to_train_on, split_called, splits_among
from fedpeft.data.sources.walk import UNTOLD, walk
from fedpeft.errors import DataInvalid

_log = structlog.get_logger(__name__)

_BATCH = 256
_NAMED = 5
_OF_THIS_IMAGE = frozenset(
    {errno.ENOENT, errno.EACCES, errno.EPERM, errno.ELOOP, errno.EISDIR, errno.ENAMETOOLONG, errno.ENOTDIR}
)
"""Errors that say that one image cannot be read; any other is of the machine."""


class FolderSource:
    """The images below the subfolders of a folder, ordered by class name and then by path.

    A class's name is its folder's in Unicode's form NFC, so that macOS and Linux mean the same. What is an image is
    told by its suffix, or by its content where it has none; see `fedpeft.data.sources.walk`.

    Attributes:
        inventory: Parts of the folder that are not read, each with the reason.
        unreadable: Links to nothing and folders that cannot be listed: each is a row, so that it counts. Files that
            cannot be opened, or are empty, come to it and to `inventory` once `tables` has met them.

    Args:
        root: The folder.

    Raises:
        OSError: If it cannot be listed.
        DataInvalid: If there is no subfolder with an image, a class of whose files all are skipped or cannot be read,
            or the subfolders are splits, or hold some.
    """

    unnamed: frozenset[str] = frozenset()
    """See `Source.unnamed`: each class has its folder's name."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._paths: list[str] = []
        groups: list[int] = []
        tallies: dict[str, Tally] = {}
        unreadable: dict[int, str] = {}
        number: dict[str, int] = {}
        direct: set[str] = set()
        inner: dict[str, set[str]] = {}
        for entry in walk(root):
            tallies.setdefault(entry.group, Tally()).add(entry)
            if entry.group:
                number.setdefault(entry.group, len(number))
            if entry.fate is Fate.SKIPPED:
                continue
            if entry.fate is Fate.UNREADABLE:
                unreadable[len(groups)] = entry.reason
            elif (depth := entry.path.count(os.sep)) == 1:
                direct.add(entry.group)
            elif depth > 1:
                inner.setdefault(entry.group, set()).add(entry.path.split(os.sep, 2)[1])
            self._paths.append(entry.path)
            groups.append(number[entry.group])
        self.class_names = tuple(number)
        self.inventory = Inventory.sum(tally.inventory() for tally in tallies.values())
        self.unreadable = unreadable
        _check_splits(root, self.class_names, direct)
        _check_inner_splits(root, self.class_names, set().union(*inner.values()))
        _check(root, {name: tallies[name].inventory() for name in number}, self.inventory)
        if not direct:
            _tell_of_sites(root, inner)
        self.labels: Indices = np.array(groups, np.int64)
        self.labels.flags.writeable = False
        self.image_bytes_total = reckoned_bytes(len(self), lambda row: os.path.join(root, self._paths[row]))

    def __len__(self) -> int:
        return len(self._paths)

    def image_bytes(self, row: int) -> bytes | memoryview:
        """Returns the bytes of an image file.

        Raises:
            ImageUnreadable: If the file went away, or may not be read.
            DataInvalid: If the machine cannot read it now, or its disk fails.
        """
        if row in self.unreadable:
            raise ImageUnreadable(self.unreadable[row])
        try:
            with open(os.path.join(self._root, self._paths[row]), "rb", buffering=0) as file:
                return file.read()
        except OSError as error:
            disks.check(error, self._root / self._paths[row])
            if error.errno in _OF_THIS_IMAGE:
                raise ImageUnreadable(f"it cannot be read: {error.strerror}") from None
            raise DataInvalid(f"cannot read {shown(str(self._root / self._paths[row]))}: {error.strerror}") from None

    def name(self, row: int) -> str:
        """Returns the path below the folder, printable."""
        return shown(self._paths[row])

    def column(self, name: str) -> list[Any]:
        """Returns `label` (class names) or `path` (relative paths)."""
        if name == "label":
            return [self.class_names[label] for label in self.labels]
        if name == "path":
            return [self.name(row) for row in range(len(self))]
        raise DataInvalid(f"{self._root} is an image folder and has no column {name!r}; columns found: label, path")

    @property
    def schema(self) -> pa.Schema:
        """The schema that the rows have as parquet: image as struct{bytes, path}, label as int64."""
        features: dict[str, dict[str, object]] = {
            "image": {"_type": "Image"},
            "label": {"names": list(self.class_names), "_type": "ClassLabel"},
        }
        image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        return pa.schema([("image", image), ("label", pa.int64())], metadata(features))

    def tables(self, rows: Indices) -> Iterator[pa.Table]:
        """Yields whole rows, ascending, a few hundred at a time; an image that cannot be read has no bytes."""
        rows = np.sort(rows)
        for start in range(0, len(rows), _BATCH):
            some = [int(row) for row in rows[start : start + _BATCH]]
            images = [{"bytes": bytes_or_note(self, row, taken=1), "path": self.name(row)} for row in some]
            yield pa.Table.from_pydict({"image": images, "label": self.labels[some]}, self.schema)


def _check(root: Path, classes: Mapping[str, Inventory], whole: Inventory) -> None:
    """Refuses a folder that is none of classes, and one of which a class would be lost."""
    lost = [text for name, inventory in classes.items() if (text := _lost(name, inventory))]
    if not whole.taken:
        raise DataInvalid(
            f"{root} has no image in a subfolder; one subfolder a class, named as the class, is read"
            + _instead(root, classes, whole)
        )
    if lost:
        more = f"; and {len(lost) - _NAMED:,} more classes" if len(lost) > _NAMED else ""
        raise DataInvalid(
            f"{root}: {'; '.join(lost[:_NAMED])}{more}; fix this, or move the folder elsewhere if it is not a class"
        )


def _check_splits(root: Path, classes: Sequence[str], direct: Collection[str]) -> None:
    """Refuses folders of splits; a class may be called train, but then its images lie in its folder itself.

    Args:
        root: The folder.
        classes: Its subfolders.
        direct: Those that have images in themselves, and not in folders of their own only.
    """
    splits = splits_among(classes)
    if splits and (len(set(splits.values())) > 1 or splits.keys() == set(classes) - set(direct)):
        raise DataInvalid(
            f"{root} holds splits ({', '.join(splits)}), which are no classes; name one of them, for example "
            f"{root / one_to_train_on(splits)}, or rename the folders if they are classes"
        )


def _check_inner_splits(root: Path, classes: Sequence[str], inner: Collection[str]) -> None:
    """Refuses splits inside the class folders: training and held-out images would be read together."""
    splits = {name: split for name in sorted(inner) if (split := split_called(name))}
    if len(set(splits.values())) > 1:
        raise DataInvalid(
            f"{root} holds splits ({', '.join(splits)}) inside its class folders, which would be read together; move "
            f"them above the classes, for example to {root / one_to_train_on(splits) / classes[0]}, or rename them if "
            "they are none"
        )


def _tell_of_sites(root: Path, inner: Mapping[str, Set[str]]) -> None:
    """Warns of folders inside the class folders that may be the classes, so that the class folders are sites.

    They look so where several class folders hold the same, or one class folder is all that there is; folders of
    patients or of photographers have names of their own.

    Args:
        root: The folder.
        inner: By class, the folders in its own that have images; a class has no images beside them.
    """
    times = Counter(name for names in inner.values() for name in names)
    several = [name for name, count in times.items() if count > 1 or len(inner) == 1]
    if several and len(times) > 1:
        _warn_of_sites(root, tuple(sorted(inner)[:_NAMED]), tuple(sorted(several)[:_NAMED]))


@cache
def _warn_of_sites(root: Path, classes: Sequence[str], folders: Sequence[str]) -> None:
    """Warns once: a command may open its data to learn the classes, and again to train."""
    _log.warning(
        "the class folders hold folders, no images: if those are the classes, and these are sites, name one site",
        classes=list(classes),
        folders=list(folders),
        site=str(root / classes[0]),
    )


def _lost(name: str, inventory: Inventory) -> str:
    """Returns a clause about a class whose files all are skipped or cannot be read; empty if it is none."""
    why: list[Group] = [*inventory.unreadable, *(g for g in inventory.skipped if g.reason not in UNTOLD)]
    if inventory.taken or not why:
        return ""
    return f"class {name!r} has no image that can be read: {', '.join(map(str, why[:_NAMED]))}"


def _instead(root: Path, classes: Mapping[str, Inventory], whole: Inventory) -> str:
    """Returns what there is in place of images, as the end of a sentence."""
    parquet = [
        name for name, found in classes.items() if any(g.reason.split()[-1] in PARQUET_SUFFIXES for g in found.skipped)
    ]
    if parquet:
        some = ", ".join(parquet[:_NAMED])
        return f"; there is parquet in its subfolders {some}: name one of them, for example {root / parquet[0]}"
    return "".join(f"; {line}" for line in whole.lines()[:_NAMED])
