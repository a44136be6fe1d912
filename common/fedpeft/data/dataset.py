"""A labelled image data set of a run: a source, the run's classes, and pixels as the model wants them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from fedpeft.data.labels import map_labels, read_label_map
from fedpeft.data.sources.interface import UNREADABLE_SHARE, Indices, Source, origin, too_many_unreadable
from fedpeft.data.sources.opening import open_source
from fedpeft.data.store import CACHE_BYTES, PixelStore
from fedpeft.data.transforms import ImageUnreadable, Pixels, Preprocessing
from fedpeft.errors import DataInvalid
from fedpeft.formatting import counted

_NAMED = 5


@dataclass(frozen=True)
class Batch:
    """Images and labels before augmentation.

    Attributes:
        pixels: uint8[n, 3, side, side].
        labels: int64[n], positions in the run's classes.
        rows: int64[n], the rows of the source, the same in every epoch and whatever else is in the data set.
    """

    pixels: Pixels
    labels: torch.Tensor
    rows: Indices

    def __len__(self) -> int:
        return len(self.rows)


class ImageDataset(Dataset[tuple[torch.Tensor, int]]):
    """Rows of a source with the run's labels.

    An unreadable image keeps its place in the order and is left out of its batch, so what is trained does not depend on
    whether it was known to be unreadable before.

    Attributes:
        classes: The run's classes in the order of the logits.
        rows: Rows of the source, int64[n].
        labels: Positions in `classes`, int64[n].

    Args:
        store: Source of the pixels.
        rows: As the attribute.
        labels: As the attribute.
        classes: As the attribute.

    Raises:
        DataInvalid: If there are no rows.
    """

    def __init__(self, store: PixelStore, rows: Indices, labels: Indices, classes: Sequence[str]) -> None:
        if not len(rows):
            raise DataInvalid("the data set has no images")
        self._store = store
        self.rows = rows
        self.labels = labels
        self.classes = tuple(classes)

    @property
    def preprocessing(self) -> Preprocessing:
        """The transform that decodes and normalises images."""
        return self._store.preprocessing

    @property
    def unreadable(self) -> dict[str, str]:
        """Reasons why images could not be read, by name, as far as they were asked for."""
        known = self._store.unreadable
        return {self._store.source.name(row): known[row] for row in map(int, self.rows[self._is_unreadable()])}

    @property
    def examples(self) -> int:
        """Images that can be read, as far as is known: the weight of an update."""
        return len(self) - int(self._is_unreadable().sum())

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        """Returns one image as evaluation sees it, float32[3, side, side], and its label.

        Raises:
            ImageUnreadable: If it cannot be decoded.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        row = self.rows[[index]]
        pixels, good = next(self._store.batches([row]))
        if not good[0]:
            raise ImageUnreadable(f"{self._store.source.name(int(row[0]))}: {self._store.unreadable[int(row[0])]}")
        return self.preprocessing.normalise(torch.from_numpy(pixels))[0], int(self.labels[index])

    def subset(self, indices: Indices) -> ImageDataset:
        """Returns some of the images, with the decoded pixels shared: one client of a simulation."""
        return ImageDataset(self._store, self.rows[indices], self.labels[indices], self.classes)

    def batches(self, orders: Iterable[Indices]) -> Iterator[Batch]:
        """Yields a batch for each array of positions in this data set; unreadable images are left out.

        Args:
            orders: The positions, int64[n] each. Iterated twice at once, so no generator, but it may be lazy.

        Raises:
            DataInvalid: As soon as more than 1 % of the data set, or of the one that it is a part of, is known to be
                unreadable, or all of it; the first are named.
        """
        self._store.prepare(self.rows)
        self._check_unreadable()
        for order, (pixels, good) in zip(orders, self._store.batches(_Rows(self.rows, orders)), strict=True):
            if not good.all():
                self._check_unreadable()
            kept = order[good]
            yield Batch(pixels, torch.from_numpy(self.labels[kept]), self.rows[kept])

    def _is_unreadable(self) -> NDArray[np.bool_]:
        return np.isin(self.rows, np.fromiter(self._store.unreadable, np.int64))

    def _check_unreadable(self) -> None:
        if fault := _unreadable_fault(self._store.source, len(self) - self.examples, len(self)):
            raise _unreadable(fault, list(self.unreadable.items()))


@dataclass(frozen=True)
class _Rows:
    """Rows of the source for positions in the data set, made as they are asked for."""

    rows: Indices
    orders: Iterable[Indices]

    def __iter__(self) -> Iterator[Indices]:
        return (self.rows[order] for order in self.orders)


def open_dataset(
    path: Path | str,
    classes: Sequence[str],
    preprocessing: Preprocessing,
    *,
    label_map: Path | Mapping[str, str | None] | None = None,
    image: str | None = None,
    label: str | None = None,
    cache_bytes: int = CACHE_BYTES,
    workers: int | None = None,
) -> ImageDataset:
    """Opens data for a run.

    Args:
        path: Parquet, image folder, or index file; see `open_source`.
        classes: The run's classes in the order of the logits.
        preprocessing: The model's preprocessing.
        label_map: Own class names to the run's, or the file that says so.
        image: Name of the image column.
        label: Name of the label column.
        cache_bytes: Size of decoded pixels up to which they are kept in memory.
        workers: Worker processes for decoding; chosen if None.

    Raises:
        DataInvalid: If the data cannot be read or its classes are not the run's.
    """
    source = open_source(path, image, label)
    return dataset_of(source, classes, preprocessing, label_map=label_map, cache_bytes=cache_bytes, workers=workers)


def dataset_of(
    source: Source,
    classes: Sequence[str],
    preprocessing: Preprocessing,
    *,
    label_map: Path | Mapping[str, str | None] | None = None,
    cache_bytes: int = CACHE_BYTES,
    workers: int | None = None,
    pixel_cache: Path | None = None,
) -> ImageDataset:
    """Returns a source as a run's data set; arguments and errors as `open_dataset`, `pixel_cache` as `PixelStore`."""
    renamed = read_label_map(label_map) if isinstance(label_map, Path) else label_map
    mapped = map_labels(source.class_names, source.labels, classes, renamed)
    known = source.unreadable
    bad = [row for row in map(int, mapped.rows) if row in known] if known else []
    if fault := _unreadable_fault(source, len(bad), mapped.examples):
        raise _unreadable(fault, [(source.name(row), known[row]) for row in bad[:_NAMED]])
    store = PixelStore(source, preprocessing, cache_bytes, workers, pixel_cache)
    return ImageDataset(store, mapped.rows, mapped.labels, classes)


def _unreadable_fault(source: Source, unreadable: int, images: int) -> str:
    """Returns a sentence if too many images cannot be read; else an empty text.

    What a part may lack is measured by the whole: one damaged file would end a simulation when its client is sampled.
    """
    if 0 < images == unreadable:
        return f"none of {counted(images, 'image')} can be read"
    whole, _ = origin(source, np.empty(0, np.int64))
    if images >= len(whole):
        return too_many_unreadable(unreadable, images)
    if not too_many_unreadable(unreadable, len(whole)):
        return ""
    share = f"{UNREADABLE_SHARE:.0%} of the {len(whole):,} that they are a part of"
    return f"{unreadable:,} of {counted(images, 'image')} cannot be read, more than {share}"


def _unreadable(fault: str, named: Sequence[tuple[str, str]]) -> DataInvalid:
    return DataInvalid(f"{fault}, the first: {'; '.join(f'{name}: {why}' for name, why in named[:_NAMED])}")
