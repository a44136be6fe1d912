"""Options for reading a site's images where the usual names and limits do not fit; imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

MAX_PIXELS = 178_956_970
"""Pixels of the largest image that is opened where nothing else is set: Pillow's own limit."""


@dataclass(frozen=True)
class Reading:
    """The data owner's options for reading them.

    Attributes:
        image_column: Column of parquet that holds the images; None: `image` or `img`.
        label_column: Column of parquet that holds the labels; None: `label`, `labels` or `fine_label`.
        max_image_pixels: Pixels of the largest image that is opened.
        pixel_cache: Folder in which decoded pixels are kept between processes, for simulations; None: they are not.
    """

    image_column: str | None = None
    label_column: str | None = None
    max_image_pixels: int = MAX_PIXELS
    pixel_cache: Path | None = field(default=None, repr=False, compare=False)


USUAL = Reading()
"""Nothing said."""
