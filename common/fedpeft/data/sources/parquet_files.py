"""Parquet files that are one data set: their common schema, and their rows in batches of bounded size.

Shards that pandas, polars or `datasets` wrote apart from each other may differ in what means nothing: the metadata of
the writer, the order of columns, pandas' index, whether a column may hold nulls, narrow or wide, plain or dictionary
types of the same values. Everything else must agree.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from fedpeft import text_files
from fedpeft.data.sources.arrow_paths import arrow_path
from fedpeft.data.sources.file_names import is_image
from fedpeft.data.sources.parquet_labels import class_names
from fedpeft.data.sources.parquet_labels import metadata as described
from fedpeft.errors import DataInvalid
from fedpeft.process.file_formats import HEAD_BYTES, kind_of

BATCH_ROWS = 1024
"""Rows of a batch at most."""

BATCH_BYTES = 16 * 1024 * 1024
"""Unpacked size that batches aim at. A page of parquet, and a single image, are unpacked whole, however large."""

INFO = "dataset_info.json"
"""Describes the columns of the files beside it, as the `datasets` library writes it."""

_PANDAS_INDEX = re.compile(r"__index_level_\d+__")


class ParquetFiles:
    """Parquet files read one after the other.

    Attributes:
        paths: The files.
        schema: The one schema of all rows.
        rows: Number of rows of each file.
        unpacked_bytes: Size of all rows, unpacked, as the files say.

    Args:
        paths: The files.

    Raises:
        DataInvalid: If one cannot be read, or two disagree; with the column and what it is in each.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = tuple(paths)
        metadata = [_metadata(path) for path in self.paths]
        self.schema = _common([(p, _schema(p, m)) for p, m in zip(self.paths, metadata, strict=True)])
        self.rows = [m.num_rows for m in metadata]
        self.unpacked_bytes = sum(_group_bytes(m, i) for m in metadata for i in range(m.num_row_groups))

    def __str__(self) -> str:
        return str(self.paths[0]) if len(self.paths) == 1 else f"{self.paths[0]} and {len(self.paths) - 1} more"

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Yields all rows in order; raises `pa.ArrowException` or `OSError` where a file is damaged."""
        for path in self.paths:
            with arrow_path(path) as place, pq.ParquetFile(place, memory_map=True) as file:
                for batch in _batches(file):
                    yield self._conformed(batch)

    def _conformed(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        if batch.schema.equals(self.schema):
            return batch
        arrays = [batch.column(field.name).cast(field.type) for field in self.schema]
        return pa.RecordBatch.from_arrays(arrays, schema=self.schema)


def beside(path: Path) -> list[Path]:
    """Returns the files that lie apart from a parquet file and are read with it: its description, images by their path.

    They need not be there; a file that is no parquet has none.
    """
    try:
        with arrow_path(path) as place, pq.ParquetFile(place, memory_map=True) as file:
            named = _named_images(file)
            about = file.schema_arrow.metadata or {}
    except (pa.ArrowException, OSError):
        return []
    info = path.parent / INFO
    described_there = [info] if b"huggingface" not in about and info.is_file() else []
    return [*described_there, *(path.parent / name for name in sorted(named))]


def _named_images(file: pq.ParquetFile) -> set[str]:
    """Returns the paths of images whose rows have no bytes of them; row groups without such rows are not read."""
    leaves = {file.metadata.schema.column(k).path: k for k in range(file.metadata.num_columns)}
    found: set[str] = set()
    for column in (leaf.removesuffix(".bytes") for leaf in leaves if leaf.endswith(".bytes")):
        if f"{column}.path" not in leaves or column not in file.schema_arrow.names:  # that is in a list, or deeper
            continue
        for number in range(file.metadata.num_row_groups):
            statistics = file.metadata.row_group(number).column(leaves[f"{column}.bytes"]).statistics
            if statistics is not None and statistics.has_null_count and statistics.null_count == 0:
                continue
            images = file.read_row_group(number, [f"{column}.bytes", f"{column}.path"]).column(0)
            for chunk in images.chunks:
                paths = chunk.field("path").filter(chunk.field("bytes").is_null())
                found.update(name for name in paths.to_pylist() if name)
    return found


def _metadata(path: Path) -> pq.FileMetaData:
    try:
        with arrow_path(path) as place:
            return pq.read_metadata(place, memory_map=True)
    except (pa.ArrowException, OSError) as error:
        raise DataInvalid(f"{path} is not a readable parquet file: {_instead(path) or error}") from None


def _instead(path: Path) -> str:
    """Returns the clause that says what a file is that is no parquet; empty if that cannot be told."""
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError:
        return ""
    if head.startswith(b"PAR1"):
        return "its end is missing or damaged, as after a download or copy that did not end"
    if is_image(head):
        return "it is an image; the folder of class folders that it belongs to is read"
    if kind := kind_of(head):
        return f"it is {kind}"
    text = head.decode("utf-8", "replace").rstrip("\ufffd")
    return "it is text, such as CSV" if text.replace("\n", "").replace("\r", "").replace("\t", "").isprintable() else ""


def _schema(path: Path, metadata: pq.FileMetaData) -> pa.Schema:
    """Returns a file's schema; with the class names of `dataset_info.json` beside it where it has none itself.

    Raises:
        DataInvalid: If what describes the columns is malformed; the file is named.
    """
    schema = metadata.schema.to_arrow_schema()
    about, place = schema.metadata or {}, path
    try:
        if b"huggingface" not in about and (path.parent / INFO).is_file():
            place = path.parent / INFO
            features = text_files.json_of(text_files.read(place, text_files.MOST_LISTED_BYTES))["features"]
            schema = schema.with_metadata({**about, **described(features)})
        for name in schema.names:
            class_names(schema, name)
    except DataInvalid as error:
        raise DataInvalid(f"{place}: {error.message}") from None
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise DataInvalid(f"{place} does not describe columns under the key `features`: {error}") from None
    return schema


def _group_bytes(metadata: pq.FileMetaData, number: int) -> int:
    return int(metadata.row_group(number).total_byte_size)


def _batches(file: pq.ParquetFile) -> Iterator[pa.RecordBatch]:
    """Yields a file's rows: small row groups together, large ones in parts."""
    span: list[int] = []
    rows = size = 0
    for number in range(file.metadata.num_row_groups):
        more_rows, more = file.metadata.row_group(number).num_rows, _group_bytes(file.metadata, number)
        if span and (size + more > BATCH_BYTES or rows + more_rows > BATCH_ROWS):
            yield from _whole(file, span)
            span, rows, size = [], 0, 0
        if more > BATCH_BYTES or more_rows > BATCH_ROWS:
            yield from _in_parts(file, number, max(1, min(BATCH_ROWS, BATCH_BYTES * more_rows // max(more, 1))))
        else:
            span, rows, size = [*span, number], rows + more_rows, size + more
    if span:
        yield from _whole(file, span)


def _whole(file: pq.ParquetFile, groups: list[int]) -> Iterator[pa.RecordBatch]:
    yield from file.read_row_groups(groups).combine_chunks().to_batches()


def _in_parts(file: pq.ParquetFile, group: int, rows: int) -> Iterator[pa.RecordBatch]:
    """Yields a row group in batches of so many rows, and of fewer from where they turn out larger than meant."""
    done = 0
    while True:
        at = 0
        try:
            for batch in file.iter_batches(rows, [group]):
                at += batch.num_rows
                if at <= done:
                    continue  # read before, in larger batches
                fresh = batch.slice(max(0, done - (at - batch.num_rows)))
                done = at
                yield fresh
                if batch.nbytes > 4 * BATCH_BYTES and rows > 1:
                    break
            else:
                return
        except pa.ArrowNotImplementedError:  # 2 GiB of images in one batch, which Arrow does not put together
            if rows == 1:
                raise
        rows = max(1, rows // 8)


def _common(schemas: Sequence[tuple[Path, pa.Schema]]) -> pa.Schema:
    """Returns the one schema of all files; that of the first, where they all have it."""
    first_path, first = schemas[0]
    if len({field.name for field in first}) < len(first):
        twice = next(name for name in first.names if first.names.count(name) > 1)
        raise DataInvalid(f"{first_path} has two columns {twice!r}")
    others = [(path, schema) for path, schema in schemas[1:] if not schema.equals(first)]
    for path, schema in others:
        _check_columns(first_path, first, path, schema)
    for path, schema in schemas[1:]:
        _check_classes(first_path, first, path, schema)
    wanted = [field for field in first if not (others and _PANDAS_INDEX.fullmatch(field.name))]
    fields = [_united(field, first_path, [(p, s.field(field.name)) for p, s in others]) for field in wanted]
    return pa.schema(fields, first.metadata)


def _check_columns(first_path: Path, first: pa.Schema, path: Path, schema: pa.Schema) -> None:
    known, own = ({n for n in s.names if not _PANDAS_INDEX.fullmatch(n)} for s in (first, schema))
    if missing := sorted(known - own):
        raise DataInvalid(f"{path} has no column {missing[0]!r}, and {first_path} has; files of one folder must agree")
    if beyond := sorted(own - known):
        raise DataInvalid(f"{path} has column {beyond[0]!r}, and {first_path} has not; files of one folder must agree")


def _check_classes(first_path: Path, first: pa.Schema, path: Path, schema: pa.Schema) -> None:
    for name in first.names:
        ours, theirs = class_names(first, name), class_names(schema, name)
        if ours != theirs:
            raise DataInvalid(
                f"{path} has other class names in column {name!r} than {first_path} ({_listed(theirs)}, not "
                f"{_listed(ours)}); files of one folder must agree"
            )


def _listed(names: tuple[str, ...] | None) -> str:
    return "none" if names is None else ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")


def _united(field: pa.Field, first_path: Path, others: list[tuple[Path, pa.Field]]) -> pa.Field:
    """Returns a column that holds the values of all files."""
    kind = field.type
    for path, other in others:
        if other.type == kind:
            continue
        both = [pa.schema([pa.field(field.name, _plain(each))]) for each in (kind, other.type)]
        try:
            kind = pa.unify_schemas(both, promote_options="permissive").field(0).type
        except pa.ArrowException:
            raise DataInvalid(
                f"column {field.name!r} is {other.type} in {path} and {field.type} in {first_path}; files of one "
                "folder must agree"
            ) from None
    nullable = field.nullable or any(other.nullable for _, other in others)
    return pa.field(field.name, kind, nullable, field.metadata)


def _plain(kind: pa.DataType) -> pa.DataType:
    """Returns a type that is the same for values that are written in several ways."""
    if pa.types.is_dictionary(kind):
        return _plain(kind.value_type)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return pa.large_string()
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind):
        return pa.large_binary()
    if pa.types.is_struct(kind):
        return pa.struct([pa.field(f.name, _plain(f.type)) for f in kind])
    return kind
