"""Image folders: one subfolder a class, named as the class."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from fedpeft.data.interface import Indices
from fedpeft.data.parquet_labels import metadata
from fedpeft.errors import DataInvalid

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
"""File names that count as images, in any case."""

_BATCH = 256


class FolderSource:
    """The images below the subfolders of a folder, ordered by class name and then by path.

    Args:
        root: The folder. Hidden files and folders, and files that are no images by their suffix, are passed over.

    Raises:
        DataInvalid: If there is no subfolder with an image.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
        images = [(folder.name, path) for folder in folders for path in _images(folder)]
        if not images:
            raise DataInvalid(f"{root} has no image in a subfolder; one subfolder a class, named as the class, is read")
        self.class_names = tuple(folder.name for folder in folders)
        number = {name: k for k, name in enumerate(self.class_names)}
        self._paths = [path for _, path in images]
        self.labels: Indices = np.array([number[name] for name, _ in images], np.int64)
        self.labels.flags.writeable = False
        self.image_bytes_total = sum(path.stat().st_size for path in self._paths)

    def __len__(self) -> int:
        return len(self._paths)

    def image_bytes(self, row: int) -> bytes | memoryview:
        """Returns the bytes of an image file.

        Raises:
            DataInvalid: If the file went away or may not be read.
        """
        try:
            return self._paths[row].read_bytes()
        except OSError as error:
            raise DataInvalid(f"cannot read {self._paths[row]}: {error.strerror}") from None

    def name(self, row: int) -> str:
        """Returns the path below the folder."""
        return self._paths[row].relative_to(self._root).as_posix()

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
        """Yields whole rows, ascending, a few hundred at a time."""
        rows = np.sort(rows)
        for start in range(0, len(rows), _BATCH):
            some = [int(row) for row in rows[start : start + _BATCH]]
            images = [{"bytes": self.image_bytes(row), "path": self.name(row)} for row in some]
            yield pa.Table.from_pydict({"image": images, "label": self.labels[some]}, self.schema)


def _images(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
