"""Opening every image of a data set once, as training would, to say beforehand which cannot be read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fedpeft.data.images import MAX_PIXELS
from fedpeft.data.sources.interface import Source
from fedpeft.data.store import PixelStore
from fedpeft.data.transforms import Preprocessing

BATCH = 256
"""Images between two reports of progress."""

_SMALL = Preprocessing(8, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "nearest")
"""Decoding is what may fail; the size afterwards does not matter."""


@dataclass(frozen=True)
class SurveyResult:
    """Findings of a survey.

    Attributes:
        unreadable: Name of each image that cannot be read, and why.
        by_class: Number of those, by the site's own class names.
        bits: Used bits, of the 16 a channel, of the images that have so many; None if none has.
    """

    unreadable: list[tuple[str, str]]
    by_class: Mapping[str, int]
    bits: int | None = None


def survey(source: Source, progress: Callable[[dict[str, Any]], None], max_pixels: int = MAX_PIXELS) -> SurveyResult:
    """Opens every image.

    Args:
        source: The images.
        progress: Called after every batch with `images` opened so far `of` how many, and how many `unreadable`.
        max_pixels: Pixels of the largest image that is opened.

    Raises:
        DataInvalid: If the data as a whole went away or changed its form.
    """
    store = PixelStore(source, replace(_SMALL, max_pixels=max_pixels), cache_bytes=0)
    rows = np.arange(len(source), dtype=np.int64)
    batches = [rows[at : at + BATCH] for at in range(0, len(rows), BATCH)]
    done = 0
    for _, good in store.batches(batches):
        done += len(good)
        progress({"images": done, "of": len(rows), "unreadable": len(store.unreadable)})
    names = source.class_names
    by_class = Counter(names[source.labels[row]] for row in store.unreadable)
    unreadable = [(source.name(row), why) for row, why in sorted(store.unreadable.items())]
    return SurveyResult(unreadable, by_class, store.preprocessing.bits)
