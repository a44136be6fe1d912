"""One encoded image to a picture of 8 bits in red, green and blue, as other tools show it.

Notable: only the formats of `FORMATS` are tried, because some of Pillow's others start programs (PostScript starts
Ghostscript). The orientation of EXIF is applied. Of an image of several frames the first is read. Grey or coloured
channels of 16 bits are scaled by the bits that the whole data set uses, which only its reader knows (see
`fedpeft.data.store`): cameras and scanners store 10 or 12 bits in 16, which by themselves would be nearly black.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from fedpeft.data.reading import MAX_PIXELS
from fedpeft.data.sources.file_names import FORMATS
from fedpeft.data.sources.interface import DEEP_BITS, ImageUnreadable
from fedpeft.process.file_formats import HEAD_BYTES, kind_of

__all__ = ["FORMATS", "MAX_PIXELS", "BitsUnknown", "ImageUnreadable", "peak", "read_rgb"]

_EXIF_ORIENTATION = 0x0112
_TRANSPOSED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TIFF_BITS, _TIFF_PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0
_PNG_COLOURS = {2: "RGB", 4: "LA", 6: "RGBA"}
"""Colour types of PNG of which Pillow keeps the upper 8 of 16 bits."""

_OF_A_STREAM = re.compile(r" <_io\.BytesIO object at 0x[0-9a-f]+>")
"""Pillow's text in place of a file's name, which is no help: the caller names the image."""

_OF_DECODERS = ("ignore", None, Warning, re.compile(r"(PIL|torchvision\.io)\."), 0)
"""Filter of `warnings` for all that the modules that decode warn of."""


class BitsUnknown(Exception):
    """An image has 16 bits a channel, and which of them the data set uses was not said."""


def read_rgb(data: bytes | memoryview, bits: int | None = DEEP_BITS, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decodes one image.

    Args:
        data: The encoded image.
        bits: Number of the 16 bits of a channel that the data set uses, 1 to 16; None if that is not known yet.
        max_pixels: Pixels of the largest image that is opened.

    Returns:
        A picture of mode RGB: transparent pixels on white, turned as its EXIF says.

    Raises:
        ImageUnreadable: If `data` is not a whole image of one of `FORMATS`, or too large.
        BitsUnknown: If the image has 16 bits a channel and `bits` is None.
    """
    with _opened(data, max_pixels) as image:
        values = _deep(image, data)
        if values is not None:
            if bits is None:
                raise BitsUnknown
            flat = _eight_bits(image, values, bits)
        elif image.mode in ("I", "F"):
            raise ImageUnreadable(f"pixels of mode {image.mode} have no known range; 8 or 16 bits a channel are read")
        else:
            flat = image
        rgb = _rgb(flat)
        turned = _TRANSPOSED.get(_orientation(image))
    return rgb if turned is None else rgb.transpose(turned)


def peak(data: bytes | memoryview, max_pixels: int = MAX_PIXELS) -> int:
    """Returns the largest value of an image of 16 bits a channel; 0 for every other image, readable or not."""
    try:
        with _opened(data, max_pixels) as image:
            values = _deep(image, data)
            return 0 if values is None else int(values.max(initial=0))
    except ImageUnreadable:
        return 0


@contextmanager
def _opened(data: bytes | memoryview, max_pixels: int) -> Iterator[Image.Image]:
    """Opens and loads an image; the warnings of decoders, for which no log has a place, are not shown."""
    _silence()
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > 2 * Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels  # Pillow's own check refuses twice this
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise _too_large(f"{image.width} x {image.height}", max_pixels)
            image.load()
            yield image
    except (ImageUnreadable, BitsUnknown):
        raise
    except Image.DecompressionBombError:
        raise _too_large("", max_pixels) from None
    except UnidentifiedImageError:
        kind = kind_of(bytes(data[:HEAD_BYTES]))
        known = f"in none of the supported formats: {', '.join(FORMATS)}"
        raise ImageUnreadable(f"it is {kind or known}") from None
    except Exception as error:  # Pillow's plugins raise whatever a malformed file makes them raise
        raise ImageUnreadable(_OF_A_STREAM.sub("", str(error)) or type(error).__name__) from None


def _silence() -> None:
    """Puts the filter for warnings of decoders first, for the whole process, unless it is first already.

    `warnings.catch_warnings` would be for the whole process too: of two threads, the one that ends last puts back the
    filters that it met, which may be those of the other.
    """
    if warnings.filters[:1] != [_OF_DECODERS]:
        warnings.filterwarnings("ignore", module=_OF_DECODERS[3].pattern)


def _too_large(size: str, limit: int) -> ImageUnreadable:
    has = f"it has {size} pixels, " if size else "it has "
    return ImageUnreadable(f"{has}more than {limit:,} pixels; --max-image-pixels raises the limit")


def _orientation(image: Image.Image) -> int:
    """Returns the orientation that an image's EXIF names, 1 where it has none or a damaged one."""
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # the reader of EXIF raises anything at all on a malformed one
        return 1


def _deep(image: Image.Image, data: bytes | memoryview) -> NDArray[np.uint16] | None:
    """Returns an image of 16 bits a channel, uint16[height, width] or [height, width, channels]; None for another."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        grey: NDArray[np.uint16] = np.asarray(image).astype(np.uint16)
        return grey
    if image.format == "PNG" and data[24] == DEEP_BITS and data[25] in _PNG_COLOURS:
        import torch
        from torchvision.io import ImageReadMode, decode_png  # seconds, and few data sets have such images

        raw = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return np.ascontiguousarray(decode_png(raw, ImageReadMode.UNCHANGED).numpy().transpose(1, 2, 0))
    if _is_deep_colour_tiff(image):
        return np.asarray(image).astype(np.uint16) * np.uint16(256) + np.uint16(255)  # all that Pillow keeps of it
    return None


def _is_deep_colour_tiff(image: Image.Image) -> bool:
    tags = getattr(image, "tag_v2", {})
    return image.format == "TIFF" and image.mode in ("RGB", "RGBA", "CMYK") and max(tags.get(_TIFF_BITS, (8,))) > 8


def _eight_bits(image: Image.Image, values: NDArray[np.uint16], bits: int) -> Image.Image:
    """Scales 16-bit channels by a power of two, so that the highest bit used becomes the highest of 8."""
    if _is_deep_colour_tiff(image):
        if bits < DEEP_BITS:
            raise ImageUnreadable(
                f"it is TIFF with 16 bits a channel in colour, of which the data uses {bits}; only the upper 8 can be "
                "read: convert it to 8 bits a channel"
            )
        return image
    scaled = values >> (bits - 8) if bits >= 8 else values << (8 - bits)
    eight = np.minimum(scaled, 255).astype(np.uint8)
    if image.format == "TIFF" and getattr(image, "tag_v2", {}).get(_TIFF_PHOTOMETRIC) == _WHITE_IS_ZERO:
        eight = 255 - eight
    return Image.fromarray(eight)


def _rgb(image: Image.Image) -> Image.Image:
    """Returns three channels of 8 bits: transparent pixels on white."""
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")
