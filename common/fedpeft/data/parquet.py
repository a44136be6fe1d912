"""Parquet in the Hugging Face image layout: an image column, a label column, class names in the schema's metadata.

Parquet is compressed in row groups of thousands of images, so a single image cannot be read from it at random. The rows
are unpacked once: small data into memory, larger into a temporary Arrow file that is memory-mapped, so that memory
does not grow with the data and images are views, not copies.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fedpeft.data.interface import Indices
from fedpeft.data.inventory import EMPTY, Inventory
from fedpeft.data.parquet_labels import read_labels
from fedpeft.errors import DataInvalid

IN_MEMORY_BYTES = 256 * 1024 * 1024
"""Uncompressed data up to this size is held in memory; more goes to a temporary file."""

BATCH_ROWS = 1024
IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels")


class ParquetSource:
    """Rows of one or several parquet files of one schema, in the order given.

    Args:
        files: The files.
        image: Name of the image column: struct{bytes, path} or binary. `image` or `img` if absent.
        label: Name of the label column: integers or strings. `label` or `labels` if absent.

    Raises:
        DataInvalid: If a file cannot be read, has no rows, no such columns, or labels that have no class.
    """

    unreadable: Mapping[int, str] = MappingProxyType({})
    """See `Source.unreadable`."""
    inventory: Inventory = EMPTY
    """See `Source.inventory`; of the folder, if the files are all of one."""

    def __init__(self, files: Sequence[Path], image: str | None = None, label: str | None = None) -> None:
        self._files = tuple(files)
        self.schema = _schema(self._files)
        self._image = _column(self.schema, files[0], image, IMAGE_COLUMNS, "image")
        label = _column(self.schema, files[0], label, LABEL_COLUMNS, "label")
        _check_image(self.schema.field(self._image), files[0])
        self._spool: Path | None = None
        self._load()
        if not len(self):
            raise DataInvalid(f"{_names(self._files)} has no rows")
        column = [batch.column(label) for batch in self._batches]
        self.class_names, self.labels = read_labels(self.schema, label, column, _names(self._files))
        self.image_bytes_total = sum(images.nbytes for images in self._images)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def image_bytes(self, row: int) -> bytes | memoryview:
        """Returns a view of the encoded image of a row; empty if it is null."""
        images, at = self._locate(row)
        value = images[at]
        return memoryview(value.as_buffer()) if value.is_valid else b""

    def name(self, row: int) -> str:
        """Returns the file, the row within it, and the image's own path if there is one."""
        number = int(np.searchsorted(self._file_starts, row, "right")) - 1
        within = row - int(self._file_starts[number])
        batch = int(np.searchsorted(self._starts, row, "right")) - 1
        images = self._batches[batch].column(self._image)
        path = None
        if pa.types.is_struct(images.type) and images.type.get_field_index("path") >= 0:
            path = images.field("path")[row - int(self._starts[batch])].as_py()
        return f"{self._files[number].name} row {within}" + (f" ({path})" if path else "")

    def column(self, name: str) -> list[Any]:
        """Returns a column's values as Python objects."""
        if name not in self.schema.names:
            raise DataInvalid(f"{_names(self._files)} has no column {name!r}; {_found(self.schema)}")
        return [value for batch in self._batches for value in batch.column(name).to_pylist()]

    def tables(self, rows: Indices) -> Iterator[pa.Table]:
        """Yields whole rows, ascending, at most `BATCH_ROWS` at a time."""
        rows = np.sort(rows)
        cuts = np.searchsorted(rows, self._starts)
        for number, batch in enumerate(self._batches):
            local = rows[cuts[number] : cuts[number + 1]] - self._starts[number]
            if len(local):
                yield pa.Table.from_batches([batch.take(pa.array(local))], self.schema)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        for name in ("_batches", "_images", "_finalizer"):
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

    def _locate(self, row: int) -> tuple[Any, int]:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        batch = int(np.searchsorted(self._starts, row, "right")) - 1
        return self._images[batch], row - int(self._starts[batch])

    def _load(self) -> None:
        """Unpacks the files, or maps the temporary file that another process made."""
        try:
            if self._spool is None and self._unpacked_bytes() > IN_MEMORY_BYTES:
                self._spool = _spool(self._read(), self.schema)
                self._finalizer = weakref.finalize(self, _remove, self._spool, os.getpid())
            if self._spool is not None:
                mapped = pa.ipc.open_file(pa.memory_map(str(self._spool)))
                self._batches = [mapped.get_batch(i) for i in range(mapped.num_record_batches)]
            else:
                self._batches = list(self._read())
        except (pa.ArrowException, OSError) as error:
            raise DataInvalid(f"cannot read {_names(self._files)}: {error}") from None
        self._images = [_binary(batch.column(self._image)) for batch in self._batches]
        self._starts = np.cumsum([0, *(batch.num_rows for batch in self._batches)])
        self._file_starts = np.cumsum([0, *(pq.read_metadata(file).num_rows for file in self._files)])

    def _unpacked_bytes(self) -> int:
        metadata = [pq.read_metadata(file) for file in self._files]
        return sum(m.row_group(i).total_byte_size for m in metadata for i in range(m.num_row_groups))

    def _read(self) -> Iterator[pa.RecordBatch]:
        for path in self._files:
            with pq.ParquetFile(path, memory_map=True) as file:
                yield from file.iter_batches(batch_size=BATCH_ROWS)


def _schema(files: Sequence[Path]) -> pa.Schema:
    """Returns the one schema of all files."""
    first: pa.Schema | None = None
    for path in files:
        try:
            schema = pq.read_schema(path, memory_map=True)
        except (pa.ArrowException, OSError) as error:
            raise DataInvalid(f"{path} is not a readable parquet file: {error}") from None
        first = schema if first is None else first
        if not schema.equals(first, check_metadata=True):
            raise DataInvalid(
                f"{path} has other columns or class names than {files[0]}; files of one folder must agree"
            )
    assert first is not None
    return first


def _column(schema: pa.Schema, file: Path, given: str | None, known: Sequence[str], kind: str) -> str:
    """Returns the name of a column, as given or one of the usual names."""
    for name in (given,) if given else known:
        if name in schema.names:
            return str(name)
    wanted = repr(given) if given else " or ".join(map(repr, known))
    raise DataInvalid(f"{file} has no {kind} column {wanted}; {_found(schema)}")


def _check_image(field: pa.Field, file: Path) -> None:
    """Refuses an image column that holds no bytes."""
    kind = field.type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise DataInvalid(
            f"{file}: image column {field.name!r} is {field.type}; struct{{bytes, path}} or binary is read"
        )


def _binary(images: pa.Array) -> pa.Array:
    return images.field("bytes") if pa.types.is_struct(images.type) else images


def _found(schema: pa.Schema) -> str:
    return f"columns found: {', '.join(schema.names)}"


def _names(files: Sequence[Path]) -> str:
    return str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"


def _spool(batches: Iterator[pa.RecordBatch], schema: pa.Schema) -> Path:
    """Writes batches to a temporary Arrow file and returns its path."""
    handle, name = tempfile.mkstemp(prefix="fedpeft-", suffix=".arrow")
    try:
        with os.fdopen(handle, "wb") as file, pa.ipc.new_file(file, schema) as writer:
            for batch in batches:
                writer.write_batch(batch)
    except BaseException:
        Path(name).unlink()
        raise
    return Path(name)


def _remove(path: Path, owner: int) -> None:
    """Removes the temporary file, from the process that made it only."""
    if os.getpid() == owner:
        path.unlink(missing_ok=True)
