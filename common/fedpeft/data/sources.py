"""Opens data by its path: parquet files, folders of them, image folders, index files."""

from __future__ import annotations

import json
import re
from glob import glob
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from fedpeft.data.folders import FolderSource
from fedpeft.data.interface import Indices, Selection, Source
from fedpeft.data.parquet import ParquetSource
from fedpeft.errors import DataInvalid

__all__ = ["INDEX_SUFFIX", "Selection", "Source", "labels_digest", "open_source"]

INDEX_SUFFIX = ".index.json"
"""An index file: rows of a source that lies elsewhere, as JSON."""

_SPLITS = {"train": "train", "test": "test", "eval": "test", "valid": "valid", "validation": "valid", "val": "valid"}


def open_source(path: Path | str, image: str | None = None, label: str | None = None) -> Source:
    """Opens parquet (a file, a folder of files, or a pattern as ``DIR/train*.parquet``), an image folder, or an index.

    Args:
        path: The data.
        image: Name of the image column of parquet; `image` or `img` if absent.
        label: Name of the label column of parquet; `label` or `labels` if absent.

    Raises:
        DataInvalid: If there is nothing there that can be read; the message says what was found.
    """
    path = Path(path)
    if not path.exists():
        matches = sorted(Path(p) for p in glob(str(path))) if any(c in path.name for c in "*?[") else []
        if not matches:
            raise DataInvalid(f"there is no data at {path}")
        return ParquetSource(matches, image, label)
    try:
        if path.is_dir():
            return _open_folder(path, image, label)
        if path.name.endswith(INDEX_SUFFIX):
            return _open_index(path, image, label)
    except OSError as error:
        raise DataInvalid(f"cannot read {path}: {error.strerror}") from None
    return ParquetSource([path], image, label)


def _open_folder(path: Path, image: str | None, label: str | None) -> Source:
    files = sorted(path.glob("*.parquet"))
    if not files:
        return FolderSource(path)
    splits = {_split(file) for file in files} - {None}
    if len(splits) > 1:
        # Concatenating them would train on the test set without a word.
        raise DataInvalid(
            f"{path} holds several splits ({', '.join(file.name for file in files[:4])}); name the files of one, "
            f"for example {files[0]} or '{path}/train*.parquet'"
        )
    return ParquetSource(files, image, label)


def _split(file: Path) -> str | None:
    """Returns the split that a file's name begins with, if any."""
    return _SPLITS.get(re.split(r"[-_.0-9]", file.name.lower(), maxsplit=1)[0])


def labels_digest(source: Source) -> str:
    """Returns the sha256 of class names and labels of a source, hexadecimal."""
    digest = sha256(json.dumps(source.class_names).encode())
    digest.update(source.labels.astype("<i8").tobytes())
    return digest.hexdigest()


def _open_index(path: Path, image: str | None, label: str | None) -> Source:
    """Opens an index file; its `source` is relative to the file's own folder."""
    data = _read_index(path)
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


def _read_index(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise DataInvalid(f"{path} is not JSON: {error}") from None
    wanted = {"source": str, "rows": list, "labels_sha256": str}
    for key, kind in wanted.items():
        if not (isinstance(data, dict) and isinstance(data.get(key), kind)):
            raise DataInvalid(f"{path} has no {key} as {'a list' if kind is list else 'a string'}; it is no index file")
    if not all(type(row) is int and abs(row) < 2**62 for row in data["rows"]):
        raise DataInvalid(f"{path}: rows holds something that is no row number")
    return dict(data)
