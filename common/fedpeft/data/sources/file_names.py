"""Rules about names of files and folders: what is an image by its suffix, what storage leaves behind, what is shown."""

from __future__ import annotations

import os
import re
import unicodedata
from functools import cache

from PIL import Image

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""Pillow's names of the formats that are read; some of its others start programs."""

PARQUET_SUFFIXES = frozenset({".parquet", ".parq", ".pq"})

_SYSTEM_FOLDERS = frozenset(
    {
        "@eadir",  # Synology: thumbnails
        "@tmp",
        "@recycle",  # QNAP
        "@recently-snapshot",
        "#recycle",  # Synology
        "#snapshot",
        "~snapshot",  # NetApp
        "__macosx",  # archives made on macOS: resource forks named as the files
        "__pycache__",
        "$recycle.bin",  # Windows
        "recycler",
        "recycled",
        "system volume information",
        "lost+found",  # ext4
        "network trash folder",
        "temporary items",
    }
)
_SYSTEM_FILES = frozenset({"thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "icon\r"})
_SUFFIX = re.compile(r"\.[a-z][a-z0-9_-]{0,9}")
"""Endings of a name that say what is in the file; `.0001`, `.jpg?width=200` and the like say nothing."""


@cache
def image_suffixes() -> frozenset[str]:
    """Returns the suffixes of the formats that are read, in lower case, with their dots."""
    return frozenset(suffix for suffix, form in Image.registered_extensions().items() if form in FORMATS)


def suffix_of(name: str) -> str:
    """Returns the suffix of a name in lower case with its dot; empty if it has none that says what is in the file."""
    suffix = os.path.splitext(name)[1].lower()
    return suffix if _SUFFIX.fullmatch(suffix) else ""


def is_system(name: str, *, folder: bool) -> bool:
    """Returns True if a storage system, an operating system or a tool keeps something for itself under a name."""
    lower = name.lower()
    if folder:
        return lower in _SYSTEM_FOLDERS
    return lower in _SYSTEM_FILES or lower.startswith(("._", "~$"))


def is_image(head: bytes) -> bool:
    """Returns True if a file begins as an image of a format that is read does; `head` is 16 bytes or more."""
    Image.init()
    accepts = (Image.OPEN[form][1] for form in FORMATS if form in Image.OPEN)
    return any(accept is not None and accept(head[:16]) is True for accept in accepts)


def class_name(name: str) -> str:
    r"""Returns the class that a folder stands for: its name in the one form (NFC) that names are compared in.

    Bytes that are not UTF-8 are written as `\xe4`, so that the name can be printed, sent and put into a label map.
    """
    return unicodedata.normalize("NFC", os.fsencode(name).decode("utf-8", "backslashreplace"))


def shown(path: str) -> str:
    """Returns a path as it can be printed anywhere: what is not UTF-8 or not shown by a terminal is escaped."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
