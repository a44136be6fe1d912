"""Interface of a data source, and a source that is some rows of another."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedpeft.data.sources.inventory import Inventory
from fedpeft.formatting import counted

Indices = NDArray[np.int64]
"""Row numbers, counted from 0."""

DEEP_BITS = 16
"""Bits of a channel of an image that has more than the usual 8."""

NO_BYTES = "it is empty"
"""Reason why an image of no bytes cannot be read."""

UNREADABLE_SHARE = 0.01
"""Share of images that may be unreadable before a data set is refused."""


class ImageUnreadable(ValueError):
    """One image cannot be read or decoded; the data set counts it and goes on."""


class Source(Protocol):
    """Encoded images with labels, by row number. Picklable: a worker process opens its own view.

    Every method that reads from disk raises `DataInvalid` if the data went away or changed its form.
    """

    @property
    def class_names(self) -> tuple[str, ...]:
        """The site's own class names; label k is ``class_names[k]``."""

    @property
    def unnamed(self) -> frozenset[str]:
        """Those of `class_names` that are figures of numbers without a name, where others have one (-1, 255)."""

    @property
    def labels(self) -> Indices:
        """The label of every row, int64[rows], read-only."""

    @property
    def image_bytes_total(self) -> int:
        """Size of all encoded images in bytes, approximately."""

    @property
    def unreadable(self) -> Mapping[int, str]:
        """Reasons why rows hold no image, by row, as far as that shows before they are read or `tables` met them."""

    @property
    def inventory(self) -> Inventory:
        """The entries that were found where the data lie, with the fate of each; `tables` adds what it cannot read."""

    def __len__(self) -> int: ...

    def image_bytes(self, row: int) -> bytes | memoryview:
        """Returns the encoded image of a row, a view where possible; empty if the row holds none.

        Raises:
            ImageUnreadable: If this image alone cannot be read.
        """

    def name(self, row: int) -> str:
        """Returns what a person would look for: the file and the row, or the path."""

    def column(self, name: str) -> list[Any]:
        """Returns a column's values as Python objects, one a row.

        Raises:
            DataInvalid: If there is no such column; the message lists those there are.
        """

    def tables(self, rows: Indices) -> Iterator[Any]:
        """Yields Arrow tables of whole rows in ascending order, with one schema, a bounded number at a time.

        A row whose image cannot be read stays, without bytes, and is in `unreadable` and `inventory` from then on.
        """

    @property
    def schema(self) -> Any:
        """The Arrow schema of `tables`, class names in its `huggingface` metadata where the source has them."""


def too_many_unreadable(unreadable: int, images: int) -> str:
    """Returns a sentence if more images are unreadable than a data set may have; else an empty text."""
    if unreadable <= UNREADABLE_SHARE * images:
        return ""
    return f"{unreadable:,} of {counted(images, 'image')} cannot be read, more than {UNREADABLE_SHARE:.0%}"


SIZED = 1000
"""Files whose sizes are asked for; those of all are reckoned from these: a million cost minutes to ask."""


def reckoned_bytes(count: int, path: Callable[[int], str | os.PathLike[str]]) -> int:
    """Returns the size of some image files by that of `SIZED` of them, evenly spaced.

    Args:
        count: Number of the files.
        path: Returns the path of one, from its number; one that is not there has no bytes.
    """
    some = np.unique(np.linspace(0, count - 1, min(count, SIZED)).astype(int))
    return sum(_size(path(int(number))) for number in some) * count // max(len(some), 1)


def _size(path: str | os.PathLike[str]) -> int:
    try:
        return os.stat(path).st_size
    except (OSError, ValueError):
        return 0


class Noting(Protocol):
    """A source as `bytes_or_note` needs it: one that notes what `tables` could not read."""

    unreadable: dict[int, str]
    inventory: Inventory

    def image_bytes(self, row: int) -> bytes | memoryview:
        """See `Source.image_bytes`."""

    def name(self, row: int) -> str:
        """See `Source.name`."""


def bytes_or_note(source: Noting, row: int, taken: int = 0) -> bytes | memoryview | None:
    """Returns the bytes of an image; of one that cannot be read or is empty, None, and the source notes it.

    Args:
        source: The source.
        row: The row of the image.
        taken: Entries that its inventory counted as taken for the row.
    """
    try:
        data = source.image_bytes(row)
        if len(data):
            return data
        why = NO_BYTES
    except ImageUnreadable as error:
        why = str(error)
    if row not in source.unreadable:
        source.unreadable[row] = why
        source.inventory = source.inventory.with_unreadable(source.name(row), why, taken)
    return None


class Selection:
    """Some rows of a source, in a stated order.

    Args:
        source: The source.
        rows: Rows of `source`, int64.
    """

    def __init__(self, source: Source, rows: Indices) -> None:
        self._source = source
        self._rows = np.ascontiguousarray(rows, np.int64)
        self.labels: Indices = source.labels[self._rows]
        self.labels.flags.writeable = False

    @property
    def unreadable(self) -> Mapping[int, str]:
        """Those of the whole source that are rows of the selection, put together anew for each call."""
        known = self._source.unreadable
        at = np.flatnonzero(np.isin(self._rows, np.fromiter(known, np.int64)))
        return {int(k): known[int(self._rows[k])] for k in at}

    @property
    def inventory(self) -> Inventory:
        """Of the whole source."""
        return self._source.inventory

    @property
    def class_names(self) -> tuple[str, ...]:
        """The class names of the whole source, so that clients of one source agree."""
        return self._source.class_names

    @property
    def unnamed(self) -> frozenset[str]:
        """Of the whole source."""
        return self._source.unnamed

    @property
    def image_bytes_total(self) -> int:
        """Size of the encoded images in bytes, as the mean over the whole source."""
        return self._source.image_bytes_total * len(self) // max(len(self._source), 1)

    @property
    def schema(self) -> Any:
        """The Arrow schema of the whole source."""
        return self._source.schema

    def __len__(self) -> int:
        return len(self._rows)

    def image_bytes(self, row: int) -> bytes | memoryview:
        """Returns the encoded image of a row of the selection."""
        return self._source.image_bytes(int(self._rows[row]))

    def name(self, row: int) -> str:
        """Returns the name that the row has in the whole source."""
        return self._source.name(int(self._rows[row]))

    def column(self, name: str) -> list[Any]:
        """Returns a column's values, one a row of the selection."""
        values = self._source.column(name)
        return [values[row] for row in self._rows]

    def tables(self, rows: Indices) -> Iterator[Any]:
        """Yields whole rows, ascending in the whole source."""
        return self._source.tables(self._rows[rows])

    def origin(self, rows: Indices) -> tuple[Source, Indices]:
        """Returns the whole source, and where rows of the selection are in it."""
        return origin(self._source, self._rows[rows])


def origin(source: Source, rows: Indices) -> tuple[Source, Indices]:
    """Returns the source that others are parts of, and where rows of one of these are in it."""
    return source.origin(rows) if isinstance(source, Selection) else (source, rows)
