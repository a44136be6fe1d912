"""Flags of the commands that read images: which columns of parquet hold what, and how large an image may be."""

from __future__ import annotations

from typing import Annotated

import typer

ImageColumn = Annotated[
    str | None,
    typer.Option("--image-column", metavar="NAME", help="Column of parquet with the images, if not image or img."),
]
LabelColumn = Annotated[
    str | None,
    typer.Option("--label-column", metavar="NAME", help="Column of parquet with the labels, if not label or labels."),
]
MaxImagePixels = Annotated[
    int | None,
    typer.Option("--max-image-pixels", metavar="N", min=1, help="Pixels of the largest image that is opened."),
]
