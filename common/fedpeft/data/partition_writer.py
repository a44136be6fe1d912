"""Writes a partition to disk: a folder a client, or an index file a client, and `partition.json` beside them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from fedpeft.data.partitions import Indices, Partition, skew
from fedpeft.data.sources.arrow_paths import arrow_path
from fedpeft.data.sources.interface import Source, too_many_unreadable
from fedpeft.data.sources.opening import INDEX_SUFFIX, labels_digest, open_source, parquet_files
from fedpeft.errors import DataInvalid
from fedpeft.process import durable

RECORD = "partition.json"
_NAMED = 5
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,127}")


def write_parts(
    path: Path,
    partition: Partition,
    out: Path,
    *,
    index: bool = False,
    image: str | None = None,
    label: str | None = None,
    source: Source | None = None,
) -> dict[str, Any]:
    """Writes what each client of a partition has, for a client to be started with.

    Args:
        path: The data that was partitioned, as `open_source` takes it.
        partition: Rows of it.
        out: The folder; made if it is not there.
        index: Write ``out/NAME.index.json``, which names rows of `path`, instead of ``out/NAME/data.parquet``, which
            has the rows themselves, every column and the schema's metadata kept.
        image: Name of the image column.
        label: Name of the label column.
        source: The same data where they are open already; None: they are opened.

    Returns:
        The record, as written to ``out/partition.json``: variant, alpha, seed, draws, digest, skew, each client's name
        and examples, and source (what was found there and not taken, and with copies the images that turned out
        unreadable, see `Inventory.as_dict`).

    Raises:
        DataInvalid: If the partition does not fit the data, a name is no file name, a client has no rows, `out`
            cannot be written, is not empty or lies in the image folder `path`, or more images cannot be read than a
            data set may have.
    """
    source = open_source(path, image, label) if source is None else source
    _check(source, partition, path)
    _check_readable(source, path)
    try:
        _check_place(out, path)
        out.parent.mkdir(parents=True, exist_ok=True)
        with durable.folder(out) as folder:
            for name, rows in zip(partition.names, partition.parts, strict=True):
                if index:
                    data = _index(source, path, rows, out, image, label)
                    (folder / f"{file_name(name)}{INDEX_SUFFIX}").write_text(data, encoding="utf-8")
                else:
                    _write_rows(source, rows, folder / file_name(name))
            _check_readable(source, path)  # again: some show only when they are read
            record = _record(source, partition)
            (folder / RECORD).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise DataInvalid(f"cannot write the partition to {out}: {error.strerror or error}") from None
    return record


def _check_readable(source: Source, path: Path) -> None:
    """Refuses to divide data of which more images cannot be read than training would take."""
    if fault := too_many_unreadable(len(source.unreadable), len(source)):
        first = "; ".join(f"{source.name(row)}: {why}" for row, why in islice(source.unreadable.items(), _NAMED))
        raise DataInvalid(f"{path}: {fault}, the first: {first}")


def _check_place(out: Path, path: Path) -> None:
    """Refuses a folder that holds anything, and one among the class folders: a partition is whole, and by itself."""
    if path.is_dir() and not parquet_files(path) and out.resolve().is_relative_to(path.resolve()):
        raise DataInvalid(f"{out} lies inside {path}, and would be read as a part of it; name a folder outside")
    if (out / RECORD).exists():
        raise DataInvalid(f"{out} holds a partition already; name another folder")
    if out.exists() and any(out.iterdir()):
        raise DataInvalid(f"{out} is not empty; a partition is written to a folder that is new or empty")


def _check(source: Source, partition: Partition, path: Path) -> None:
    for name, rows in zip(partition.names, partition.parts, strict=True):
        if not len(rows):
            raise DataInvalid(f"client {name} of the partition has no rows")
    highest = max(int(rows[-1]) for rows in partition.parts)
    if highest >= len(source):
        raise DataInvalid(f"the partition names row {highest}; {path} has {len(source)}")
    file_names(partition.names)


def file_names(names: Sequence[str]) -> list[str]:
    """Returns the names of clients as `file_name` makes them, each another one, upper and lower case being the same.

    Raises:
        DataInvalid: If a name leaves none, or two leave one.
    """
    files = [file_name(name) for name in names]
    first: dict[str, str] = {}
    for name, file in zip(names, files, strict=True):
        other = first.setdefault(file.lower(), name)  # file systems of macOS and Windows do not tell case
        if other is not name:
            raise DataInvalid(
                f"clients {other[:80]!r} and {name[:80]!r} would have one file name, {file!r} (upper and lower case "
                "are the same there); rename one of these values in the data, or make both one value if they are "
                "one client"
            )
    return files


def file_name(name: str) -> str:
    """Returns a client's name with what file systems do not take replaced by hyphens.

    Raises:
        DataInvalid: If nothing is left that can be a name.
    """
    plain = re.sub(r"[^A-Za-z0-9_.\-]+", "-", name).lstrip(".-")
    if not _NAME.fullmatch(plain):
        raise DataInvalid(f"client name {name[:80]!r} cannot be a folder's name; letters, digits, . _ - are needed")
    return plain


def _write_rows(source: Source, rows: Indices, folder: Path) -> None:
    folder.mkdir()
    with (
        arrow_path(folder / "data.parquet", "wb") as place,
        pq.ParquetWriter(place, source.schema, compression="zstd") as writer,
    ):
        for table in source.tables(rows):
            writer.write_table(table)


def _index(source: Source, path: Path, rows: Indices, out: Path, image: str | None, label: str | None) -> str:
    data = {
        "source": os.path.relpath(path.resolve(), out.resolve()),
        "image": image,
        "label": label,
        "labels_sha256": labels_digest(source),
        "rows": rows.tolist(),
    }
    return json.dumps(data) + "\n"


def _record(source: Source, partition: Partition) -> dict[str, Any]:
    return {
        "variant": partition.variant,
        "alpha": partition.alpha,
        "seed": partition.seed,
        "draws": partition.draws,
        "digest": partition.digest,
        "source": source.inventory.as_dict(),
        "rows": int(sum(map(len, partition.parts))),
        "skew": skew(source.labels, partition.parts, len(source.class_names)).as_dict(),
        "clients": [
            {"name": name, "examples": len(rows)} for name, rows in zip(partition.names, partition.parts, strict=True)
        ],
    }
