"""Sources over data sets of a program: a map-style `Dataset` of torch, or one of the Hugging Face `datasets` library.

Notable: a run decodes, scales and augments images itself, so it wants them as they are: encoded, as PIL images, or as
8-bit values. What the data set would do to them by random numbers would differ from one repetition to the next.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from fedpeft.data.reading import USUAL, Reading
from fedpeft.data.sources.interface import ImageUnreadable, Indices, Source
from fedpeft.data.sources.inventory import EMPTY, Inventory
from fedpeft.data.sources.parquet import IMAGE_COLUMNS, LABEL_COLUMNS
from fedpeft.data.sources.parquet_labels import class_names, metadata, named, read_labels
from fedpeft.errors import DataInvalid

PNG_MODES = {"1", "L", "P", "RGB", "RGBA", "I;16"}
"""Modes of Pillow that a PNG holds without a change."""
SAMPLED = 16
"""Images that are looked at for the size of all."""


def source_of(dataset: Any, reading: Reading = USUAL) -> Source:
    """Returns a source over a data set.

    Args:
        dataset: One of torch, whose items begin with image and label; or of the `datasets` library.
        reading: Names of columns, for the latter.

    Raises:
        DataInvalid: If it is neither, or has no labels, or no images that can be read.
    """
    if isinstance(dataset, Mapping):
        raise DataInvalid(f"the data set has splits ({', '.join(map(str, dataset))}); give one of them")
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise DataInvalid(
            f"{type(dataset).__name__} is no data set with a length: give a path, a map-style Dataset of torch, or one "
            "of the Hugging Face datasets library that does not stream"
        )
    if not len(dataset):
        raise DataInvalid("the data set has no rows")
    return ArrowDataset(dataset, reading) if hasattr(dataset, "cast_column") else TorchDataset(dataset)


class _Unwritten:
    """The part of a source that files have, and data sets of a program have not."""

    unreadable: Mapping[int, str] = {}
    inventory: Inventory = EMPTY

    @property
    def schema(self) -> Any:
        """Raises `DataInvalid`: only files are copied to other files."""
        raise DataInvalid("a data set of a program is not written to files; save it as parquet and partition that")

    def tables(self, rows: Indices) -> Iterator[Any]:
        """Raises `DataInvalid`, as `schema`."""
        yield self.schema

    def name(self, row: int) -> str:
        """Returns the row's number."""
        return f"row {row}"


class ArrowDataset(_Unwritten):
    """Rows of a data set of the Hugging Face `datasets` library, in its order; transforms set on it are not applied."""

    def __init__(self, dataset: Any, reading: Reading) -> None:
        from datasets import Image as ImageFeature

        self._dataset = dataset.with_format(None)
        image = self._column(reading.image_column, IMAGE_COLUMNS, "image")
        label = self._column(reading.label_column, LABEL_COLUMNS, "label")
        only = self._dataset.select_columns([image])
        is_image = isinstance(dataset.features[image], ImageFeature)
        self._images = only.cast_column(image, ImageFeature(decode=False)) if is_image else only
        self._image = image
        labels = self._dataset.select_columns([label]).with_format("arrow")[:]
        schema: Any = dataset.features.arrow_schema
        self.class_names, self.labels, self.unnamed = read_labels(
            schema, label, labels.column(label).chunks, "the data set"
        )
        self.image_bytes_total = only.data.nbytes * len(only) // max(only.data.num_rows, 1)

    def __len__(self) -> int:
        return len(self.labels)

    def image_bytes(self, row: int) -> bytes | memoryview:
        """See `Source.image_bytes`."""
        value = self._images[row][self._image]
        if isinstance(value, Mapping):
            if value.get("bytes") is None and value.get("path"):
                return _file(value["path"])
            value = value.get("bytes")
        if value is not None and not isinstance(value, bytes):
            raise DataInvalid(f"column {self._image!r} holds {type(value).__name__}; images are of the feature Image")
        return value or b""

    def column(self, name: str) -> list[Any]:
        """See `Source.column`; of a column of classes their names."""
        if name not in self._dataset.column_names:
            raise DataInvalid(f"no column {name!r}; columns found: {', '.join(self._dataset.column_names)}")
        names = class_names(self._dataset.features.arrow_schema, name)
        values = list(self._dataset[name])
        return values if names is None else [named(value, names) for value in values]

    def _column(self, given: str | None, usual: tuple[str, ...], what: str) -> str:
        there = self._dataset.column_names
        for name in (given,) if given else usual:
            if name in there:
                return name
        wanted = " or ".join(map(repr, (given,) if given else usual))
        raise DataInvalid(f"no {what} column {wanted}; columns found: {', '.join(there)}; {what}_column names another")


class TorchDataset(_Unwritten):
    """Items of a map-style data set of torch: image, label, and anything after them.

    Labels are its `targets` where it has such, as torchvision's have, else every item is looked at once. Class names
    are its `classes`; the labels' own figures or texts where it has none, or changes the labels that these are of.
    """

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        labels = _targets(dataset)
        if labels is None:
            labels = [self._label(row) for row in range(len(dataset))]
        values = pa.array(np.asarray(labels).tolist())
        names = _classes(dataset, labels)
        known = metadata({"label": {"names": list(map(str, names)), "_type": "ClassLabel"}}) if names else None
        schema = pa.schema([("label", values.type)], metadata=known)
        self.class_names, self.labels, self.unnamed = read_labels(schema, "label", [values], "the data set")

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def image_bytes_total(self) -> int:
        """Size of all encoded images, from some of them."""
        rows = range(0, len(self), -(-len(self) // SAMPLED))
        return sum(len(self.image_bytes(row)) for row in rows) * len(self) // len(rows)

    def image_bytes(self, row: int) -> bytes | memoryview:
        """Returns the image as it was encoded, else as PNG, which loses nothing."""
        try:
            image = self._item(row)[0]
        except OSError as error:
            raise ImageUnreadable(str(error)) from None
        return image if isinstance(image, bytes) else _png(image, row)

    def column(self, name: str) -> list[Any]:
        """Raises `DataInvalid`: there are no columns."""
        raise DataInvalid(f"a Dataset of torch has no column {name!r}; give each client's part by its name instead")

    def _label(self, row: int) -> Any:
        try:
            return self._item(row)[1]
        except OSError as error:
            raise DataInvalid(
                f"item {row} of the data set cannot be read, and nor can its label: {error}; leave it out, or give the "
                "data set `targets`, the labels of all items"
            ) from None

    def _item(self, row: int) -> Any:
        item = self._dataset[row]
        if not isinstance(item, tuple | list) or len(item) < 2:
            raise DataInvalid(f"item {row} of the data set is {type(item).__name__}; an image and a label are read")
        return item


def _targets(dataset: Any) -> Any:
    """Returns the labels of all items where a data set has them aside; None if its items must be looked at."""
    inner, indices = getattr(dataset, "dataset", None), getattr(dataset, "indices", None)
    if inner is not None and indices is not None:  # torch.utils.data.Subset
        whole = _targets(inner)
        return None if whole is None else np.asarray(whole)[np.asarray(indices)]
    return None if getattr(dataset, "target_transform", None) else _of_all(dataset)


def _of_all(dataset: Any) -> Any:
    """Returns a data set's `targets`, if there is one an item."""
    labels = getattr(dataset, "targets", None)
    return labels if labels is not None and len(labels) == len(dataset) else None


def _classes(dataset: Any, labels: Any) -> Any:
    """Returns the names of the classes, which subsets of subsets have from the whole; None if there are none.

    Likewise, if the labels are others than those that the names are of: a `target_transform` or a data set around
    another one may have changed them.
    """
    whole, rows, may_differ = dataset, np.arange(len(dataset)), False
    while not hasattr(whole, "classes") and hasattr(whole, "dataset"):
        indices = getattr(whole, "indices", None)
        may_differ |= indices is None
        if indices is not None:
            rows = np.asarray(indices)[rows]
        whole = whole.dataset
    if may_differ or getattr(whole, "target_transform", None):
        own = _of_all(whole)
        if own is None or rows.max() >= len(own) or not np.array_equal(np.asarray(own)[rows], np.asarray(labels)):
            return None
    return getattr(whole, "classes", None)


def _png(image: Any, row: int) -> bytes:
    """Returns a PIL image, an array uint8[h, w] or [h, w, 3], or a tensor uint8[1 or 3, h, w] as PNG."""
    if not isinstance(image, Image.Image):
        values = np.asarray(image)
        if type(image).__module__.split(".")[0] == "torch" and values.ndim == 3:
            values = values.transpose(1, 2, 0)
        if values.ndim == 3 and values.shape[2] == 1:
            values = values[:, :, 0]
        if values.dtype != np.uint8 or not (values.ndim == 2 or (values.ndim == 3 and values.shape[2] == 3)):
            raise DataInvalid(
                f"the image of item {row} is {type(image).__name__} of {values.dtype}{list(values.shape)}; PIL images, "
                "encoded bytes, uint8[h, w, 3] arrays or uint8[3, h, w] tensors are read: leave ToTensor, "
                "normalisation and augmentation to the run"
            )
        image = Image.fromarray(np.ascontiguousarray(values))
    out = io.BytesIO()
    (image if image.mode in PNG_MODES else image.convert("RGB")).save(out, "PNG", compress_level=1)
    return out.getvalue()


def _file(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ImageUnreadable(str(error)) from None
