"""Parquet in the Hugging Face image layout: an image column, a label column, class names in the schema's metadata.

Parquet is compressed in row groups of thousands of images, so a single image cannot be read from it at random. The rows
are unpacked once: small data into memory, larger into a temporary Arrow file that is memory-mapped, so that memory
does not grow with the data and images are views, not copies. What is unpacked at a time is bounded in bytes, see
`fedpeft.data.sources.parquet_files`.

An image is the bytes of a row; where a row has none, those of the file that its path names, as seen from the parquet
file's folder.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from fedpeft.data.sources import disks
from fedpeft.data.sources.interface import ImageUnreadable, Indices, bytes_or_note, reckoned_bytes
from fedpeft.data.sources.inventory import EMPTY, Inventory
from fedpeft.data.sources.parquet_files import ParquetFiles
from fedpeft.data.sources.parquet_labels import class_names, named, read_labels
from fedpeft.data.spool import Spool
from fedpeft.errors import DataInvalid

IN_MEMORY_BYTES = 256 * 1024 * 1024
"""Uncompressed data up to this size is held in memory; more goes to a temporary file."""

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels", "fine_label")
"""The last is that of CIFAR-100, which has a coarse one too."""


class ParquetSource:
    """Rows of one or several parquet files of one schema, in the order given.

    Args:
        files: The files.
        image: Name of the image column: struct{bytes, path} or binary. `image` or `img` if absent.
        label: Name of the label column: integers, strings or truth values. `label`, `labels` or `fine_label` if absent.

    Raises:
        DataInvalid: If a file cannot be read, has no rows, no such columns, or labels that are no classes.
        DiskFull: If the temporary folder has no room for the unpacked rows.

    Attributes:
        unreadable: See `Source.unreadable`; empty until `tables` has met a row.
    """

    inventory: Inventory = EMPTY
    """See `Source.inventory`; of the folder, if the files are all of one."""

    def __init__(self, files: Sequence[Path], image: str | None = None, label: str | None = None) -> None:
        self._files = ParquetFiles(files)
        self.schema = self._files.schema
        self._image = self._column(image, IMAGE_COLUMNS, "image")
        label = self._column(label, LABEL_COLUMNS, "label")
        _check_image(self.schema.field(self._image), files[0])
        self.unreadable: dict[int, str] = {}
        self._spool: Spool | None = None
        self._load()
        if not len(self):
            raise DataInvalid(f"{self._files} has no rows")
        column = [batch.column(label) for batch in self._batches]
        self.class_names, self.labels, self.unnamed = read_labels(self.schema, label, column, str(self._files))
        self.image_bytes_total = sum(images.nbytes for images in self._images) + self._named_bytes()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def image_bytes(self, row: int) -> bytes | memoryview:
        """Returns a view of the encoded image of a row, or the bytes of the file that the row names."""
        images, at = self._locate(row)
        value = images[at]
        if value.is_valid:
            return memoryview(value.as_buffer())
        path = self._path(row)
        if path is None:
            raise ImageUnreadable("its row has neither the bytes of an image nor a path")
        return _beside(self._file(row)[0], path)

    def name(self, row: int) -> str:
        """Returns the file, the row within it, and the image's own path if there is one."""
        file, within = self._file(row)
        path = self._path(row)
        return f"{file.name} row {within}" + (f" ({path})" if path else "")

    def column(self, name: str) -> list[Any]:
        """Returns a column's values as Python objects: of a ClassLabel column the names, None where there is none."""
        if name not in self.schema.names:
            raise DataInvalid(f"{self._files} has no column {name!r}; {_found(self.schema)}")
        if pa.types.is_nested(self.schema.field(name).type):
            raise DataInvalid(
                f"{self._files}: column {name!r} holds {self.schema.field(name).type}; one plain value a row is needed"
            )
        values = [value for batch in self._batches for value in batch.column(name).to_pylist()]
        names = class_names(self.schema, name)
        return values if names is None else [named(value, names) for value in values]

    def tables(self, rows: Indices) -> Iterator[pa.Table]:
        """Yields whole rows, ascending, at most `BATCH_ROWS` at a time; images that lie beside the files are in them.

        An image that cannot be read stays as it is, a path without bytes, and is noted in `unreadable`.
        """
        rows = np.sort(rows)
        cuts = np.searchsorted(rows, self._starts)
        for number, batch in enumerate(self._batches):
            mine = rows[cuts[number] : cuts[number + 1]]
            if len(mine):
                taken = self._filled(batch.take(pa.array(mine - self._starts[number])), mine)
                yield pa.Table.from_batches([taken], self.schema)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        for name in ("_batches", "_images"):
            state.pop(name, None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def __getattr__(self, name: str) -> Any:
        """Loads the rows on first use after unpickling."""
        if name in ("_batches", "_images") and "_files" in self.__dict__:
            self._load()
            return self.__dict__[name]
        raise AttributeError(name)

    def _named_bytes(self) -> int:
        """Returns the size of the image files that rows name, reckoned."""
        lacking = [np.flatnonzero(images.is_null().to_numpy(zero_copy_only=False)) for images in self._images]
        rows = np.concatenate([start + each for start, each in zip(self._starts, lacking, strict=False)])

        def file(number: int) -> Path:
            row = int(rows[number])
            return self._file(row)[0].parent / (self._path(row) or "")

        return reckoned_bytes(len(rows), file)

    def _column(self, given: str | None, known: Sequence[str], kind: str) -> str:
        """Returns the name of a column, as given or one of the usual names."""
        cure = f"--{kind}-column names another"
        found = [name for name in ((given,) if given else known) if name in self.schema.names]
        if len(found) > 1:
            raise DataInvalid(
                f"{self._files.paths[0]} has the columns {' and '.join(map(repr, found))}; "
                f"say with --{kind}-column which one is meant"
            )
        if not found:
            wanted = repr(given) if given else " or ".join(map(repr, known))
            raise DataInvalid(f"{self._files.paths[0]} has no {kind} column {wanted}; {_found(self.schema)}; {cure}")
        return str(found[0])

    def _locate(self, row: int) -> tuple[Any, int]:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        batch = int(np.searchsorted(self._starts, row, "right")) - 1
        return self._images[batch], row - int(self._starts[batch])

    def _file(self, row: int) -> tuple[Path, int]:
        """Returns the file that a row is of, and its number there."""
        number = int(np.searchsorted(self._file_starts, row, "right")) - 1
        return self._files.paths[number], row - int(self._file_starts[number])

    def _path(self, row: int) -> str | None:
        """Returns the image's own path, if the row has one."""
        batch = int(np.searchsorted(self._starts, row, "right")) - 1
        images = self._batches[batch].column(self._image)
        if not (pa.types.is_struct(images.type) and images.type.get_field_index("path") >= 0):
            return None
        value = images[row - int(self._starts[batch])].as_py()
        return None if value is None else value["path"]

    def _filled(self, batch: pa.RecordBatch, rows: Indices) -> pa.RecordBatch:
        """Returns a batch with the bytes of the images beside its file: where it goes, their paths are void."""
        at = batch.schema.get_field_index(self._image)
        column = batch.column(at)
        lacking = [k for k, image in enumerate(_binary(column)) if not (image.is_valid and image.as_buffer().size)]
        found = {k: bytes(data) for k in lacking if (data := bytes_or_note(self, int(rows[k])))}
        if not found:
            return batch
        values = column.to_pylist()
        for k, data in found.items():
            values[k]["bytes"] = data
        return batch.set_column(at, batch.schema.field(at), pa.array(values, column.type))

    def _load(self) -> None:
        """Unpacks the files, or maps the temporary file that another process of this machine made."""
        try:
            if self._spool is not None and not self._spool.is_here:
                self._spool = None
            if self._spool is None and self._files.unpacked_bytes > IN_MEMORY_BYTES:
                self._spool = Spool(self._files.batches(), self.schema)
            self._batches = list(self._files.batches()) if self._spool is None else self._spool.batches()
        except (pa.ArrowException, OSError) as error:
            raise DataInvalid(f"cannot read {self._files}: {error}") from None
        self._images = [_binary(batch.column(self._image)) for batch in self._batches]
        self._starts = np.cumsum([0, *(batch.num_rows for batch in self._batches)])
        self._file_starts = np.cumsum([0, *self._files.rows])


def _check_image(field: pa.Field, file: Path) -> None:
    """Refuses an image column that holds no bytes."""
    kind = field.type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)):
        raise DataInvalid(
            f"{file}: image column {field.name!r} is {field.type}; struct{{bytes, path}} or binary is read"
        )


def _beside(file: Path, path: str) -> bytes:
    """Returns the bytes of an image file that a row of `file` names, from that file's folder on or absolutely."""
    place = file.parent / path
    try:
        if not stat.S_ISREG(place.stat().st_mode):  # a pipe would be waited for
            raise ImageUnreadable("its row has no bytes, and its path names no file")
        return place.read_bytes()
    except (OSError, ValueError) as error:
        if isinstance(error, OSError):
            disks.check(error, place)
        why = error.strerror if isinstance(error, OSError) else error
        raise ImageUnreadable(f"its row has no bytes, and the file at its path cannot be read: {why}") from None


def _binary(images: pa.Array) -> pa.Array:
    return images.field("bytes") if pa.types.is_struct(images.type) else images


def _found(schema: pa.Schema) -> str:
    return f"columns found: {', '.join(schema.names)}"
