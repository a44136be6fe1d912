"""Opens data by its path: parquet files, folders of them, image folders, index files; or by its name on the hub."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from glob import glob
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from fedpeft import text_files
from fedpeft.data.sources.file_names import PARQUET_SUFFIXES, suffix_of
from fedpeft.data.sources.folders import FolderSource
from fedpeft.data.sources.hub import local_path
from fedpeft.data.sources.interface import Indices, Selection, Source
from fedpeft.data.sources.inventory import Entry, Fate, inventory_of
from fedpeft.data.sources.parquet import ParquetSource
from fedpeft.data.sources.shards import check_shards
from fedpeft.data.sources.splits import splits_among
from fedpeft.errors import DataInvalid

__all__ = ["INDEX_SUFFIX", "Selection", "Source", "labels_digest", "open_source"]

INDEX_SUFFIX = ".index.json"
"""An index file: rows of a source that lies elsewhere, as JSON."""

BESIDE_PARQUET = "beside parquet files, which alone are read"


def open_source(path: Path | str, image: str | None = None, label: str | None = None) -> Source:
    """Opens parquet (a file, a folder of files, or a pattern as ``DIR/train*.parquet``), an image folder, or an index.

    Args:
        path: The data; or `hub:NAME/SPLIT`, see `fedpeft.data.sources.hub`.
        image: Name of the image column of parquet; `image` or `img` if absent.
        label: Name of the label column of parquet; `label`, `labels` or `fine_label` if absent.

    Raises:
        DataInvalid: If there is nothing there that can be read; the message says what was found.
    """
    path = local_path(path)
    if not path.exists():
        matches = sorted(Path(p) for p in glob(str(path))) if any(c in path.name for c in "*?[") else []
        if not matches:
            raise DataInvalid(f"there is no data at {path}")
        _check_splits(path, matches)
        if not any(c in path.name for c in "?["):  # a pattern that chooses files means some of them
            check_shards(path, matches)
        return ParquetSource(matches, image, label)
    try:
        if path.is_dir():
            return _open_folder(path, image, label)
        if is_index(path):
            return _open_index(path, image, label)
    except OSError as error:
        raise DataInvalid(f"cannot read {path}: {error.strerror}") from None
    return ParquetSource([path], image, label)


def parquet_files(folder: Path) -> list[Path]:
    """Returns the parquet files of a folder, by name."""
    with os.scandir(folder) as entries:
        return sorted(Path(e.path) for e in entries if not e.name.startswith(".") and _is_parquet(e))


def _is_parquet(entry: os.DirEntry[str]) -> bool:
    """Returns True if an entry is read as parquet; so is a link to nothing, to be named; a pipe is not opened."""
    named = suffix_of(entry.name) in PARQUET_SUFFIXES
    return named and (entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path)))


def _open_folder(path: Path, image: str | None, label: str | None) -> Source:
    files = parquet_files(path)
    if not files:
        return FolderSource(path)
    _check_splits(path, files)
    check_shards(path, files)
    source = ParquetSource(files, image, label)
    taken = {file.name for file in files}
    found = [(name, Fate.TAKEN if name in taken else Fate.SKIPPED) for name in sorted(os.listdir(path))]
    source.inventory = inventory_of(
        Entry(name, "", fate, "" if fate is Fate.TAKEN else BESIDE_PARQUET) for name, fate in found
    )
    return source


def _check_splits(path: Path, files: Sequence[Path]) -> None:
    """Refuses files of several splits, and a held-out one among others: read together, it would be trained on."""
    splits = splits_among(file.stem for file in files)
    if len(set(splits.values())) > 1 or (set(splits.values()) - {"train"} and len(splits) < len(files)):
        raise DataInvalid(
            f"{path} holds several splits ({', '.join(file.name for file in files[:4])}); name the files of one, "
            f"for example {files[0]} or '{files[0].parent}/train*.parquet'"
        )


def labels_digest(source: Source) -> str:
    """Returns the sha256 of class names and labels of a source, hexadecimal."""
    digest = sha256(json.dumps(source.class_names).encode())
    digest.update(source.labels.astype("<i8").tobytes())
    return digest.hexdigest()


def _open_index(path: Path, image: str | None, label: str | None) -> Source:
    """Opens an index file; its `source` is relative to the file's own folder."""
    data = read_index(path)
    source = open_source(path.parent / data["source"], image or data.get("image"), label or data.get("label"))
    rows: Indices = np.array(data["rows"], np.int64)
    if not len(rows):
        raise DataInvalid(f"{path} names no rows")
    if rows.min() < 0 or rows.max() >= len(source):
        raise DataInvalid(
            f"{path} names row {rows.min() if rows.min() < 0 else rows.max()}; its source has {len(source)}"
        )
    if labels_digest(source) != data["labels_sha256"]:
        raise DataInvalid(
            f"{path} was made for other data than {path.parent / data['source']} holds now; partition it again"
        )
    return Selection(source, rows)


def is_index(path: Path) -> bool:
    """Returns True if a path is that of an index file."""
    return path.name.lower().endswith(INDEX_SUFFIX)


def read_index(path: Path) -> dict[str, Any]:
    """Returns what an index file says: `source`, from its own folder on, `rows`, `labels_sha256`.

    Raises:
        DataInvalid: If it is none.
        OSError: If it cannot be read.
    """
    try:
        data = text_files.json_of(text_files.read(path, text_files.MOST_LISTED_BYTES))
    except ValueError as error:
        raise DataInvalid(f"{path} is not JSON: {error}") from None
    wanted = {"source": str, "rows": list, "labels_sha256": str}
    for key, kind in wanted.items():
        if not (isinstance(data, dict) and isinstance(data.get(key), kind)):
            raise DataInvalid(f"{path} has no {key} as {'a list' if kind is list else 'a string'}; it is no index file")
    if not all(type(row) is int and abs(row) < 2**62 for row in data["rows"]):
        raise DataInvalid(f"{path}: rows holds something that is no row number")
    return dict(data)
