"""Names of what the first bytes of a file show, for messages about a file that is not what it should be."""

from __future__ import annotations

HEAD_BYTES = 512
"""Bytes from a file's beginning that are enough to name it."""

_CONVERT = ", which is not read as an image (convert it to PNG or JPEG)"
_MAGIC: tuple[tuple[int, bytes, str], ...] = (
    (
        0,
        b"version https://git-lfs.github.com/spec/",
        "a Git LFS pointer, not the file (git lfs pull fetches it)",
    ),
    (0, b"/annex/objects/", "a git-annex pointer, not the file (git annex get fetches it)"),
    (0, b"%!PS", f"PostScript{_CONVERT}"),
    (0, b"\xc5\xd0\xd3\xc6", f"PostScript{_CONVERT}"),
    (0, b"%PDF", f"PDF{_CONVERT}"),
    (128, b"DICM", f"DICOM{_CONVERT}"),
    (0, b"\x93NUMPY", "a NumPy array"),
    (0, b"\x89HDF", "HDF5"),
    (0, b"PAR1", "parquet"),
    (0, b"ARROW1", "an Arrow or Feather file"),
    (0, b"PK\x03\x04", "a zip archive"),
    (0, b"\x1f\x8b", "compressed by gzip"),
    (0, b"\x28\xb5\x2f\xfd", "compressed by Zstandard"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (0, b"GGUF", "GGUF"),
    (0, b"\0\0\1\0", f"ICO{_CONVERT}"),
    (0, b"8BPS", f"PSD{_CONVERT}"),
    (0, b"II*\0\x10\0\0\0CR", f"a raw photograph (CR2){_CONVERT}"),
    (0, b"\xff\x0a", f"JPEG XL{_CONVERT}"),
    (0, b"\0\0\0\x0cJXL ", f"JPEG XL{_CONVERT}"),
)
_HEIF = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"})
_DVC = (b"outs:\n", b"md5: ")


def kind_of(head: bytes) -> str | None:
    """Returns the kind of a file in words that follow "it is", or None where its first bytes show none.

    Args:
        head: Its first `HEAD_BYTES`, or all of it if it is shorter.
    """
    if not head:
        return "empty"
    for at, magic, name in _MAGIC:
        if head[at : at + len(magic)] == magic:
            return name
    if head[4:8] == b"ftyp":
        return f"HEIC{_CONVERT}" if head[8:12] in _HEIF else "a video, or another ISO media file"
    if not head.strip(b"\0"):
        return "nothing but zero bytes, as a download or copy that did not end leaves"
    return _text_of(head.removeprefix(b"\xef\xbb\xbf").lstrip())


def _text_of(head: bytes) -> str | None:
    """Returns the kind of a text file, or None where it is none that has a name."""
    lower = head[:HEAD_BYTES].lower()
    if lower.startswith((b"<!doctype html", b"<html", b"<head")):
        return "a web page (HTML)"
    if b"<svg" in lower:
        return f"SVG{_CONVERT}"
    if lower.startswith(b"<?xml") or lower.startswith(b"<error"):
        return "XML"
    if lower.startswith((b"{", b"[")):
        return "JSON"
    if lower.startswith(_DVC):
        return "a DVC pointer, not the file (dvc pull fetches it)"
    return None
