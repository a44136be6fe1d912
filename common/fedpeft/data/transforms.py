"""Steps from an image to the model's input: decode and resize, augment, normalise.

Decoding and resizing give the same uint8 pixels every time and may be kept. Augmentation works on those pixels, and its
draws are a pure function of (seed, epoch, row): neither batch, order nor worker processes can change them. Training and
evaluation normalise with the same figures, the model's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from fedpeft.config import ModelConfig
from fedpeft.data.images import MAX_PIXELS, ImageUnreadable, read_rgb
from fedpeft.data.sources.interface import DEEP_BITS, Indices
from fedpeft.errors import DataInvalid

__all__ = ["Augmentation", "ImageInputs", "ImageUnreadable", "Pixels", "Preprocessing", "RunModel", "augment"]

Augmentation = Literal["none", "flip", "crop"]
Pixels = NDArray[np.uint8]
"""Images uint8[n, 3, side, side], red green blue."""

_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_PADDING_SHARE = 8
"""Random crop pads by an eighth of the side: 4 pixels at 32, as the paper does on CIFAR-100."""


@dataclass(frozen=True)
class ImageInputs:
    """The images that a model takes.

    Attributes:
        image_size: Side of the square input in pixels.
        mean: Of each channel, for inputs scaled to 0..1.
        std: Likewise.
        interpolation: Interpolation by which images are resized: bicubic, bilinear...
    """

    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str


class RunModel(Protocol):
    """A run's model, as far as its data depend on it; `fedpeft.models.backbones.Backbone` is one."""

    @property
    def config(self) -> ModelConfig:
        """`[model]`."""
        ...

    @property
    def images(self) -> ImageInputs | None:
        """The images that it takes; None if it takes something else."""
        ...


@dataclass(frozen=True)
class Preprocessing:
    """The input that a model wants.

    Attributes:
        image_size: Side of the square input in pixels.
        mean: Of each channel, for pixels scaled to 0..1.
        std: Likewise.
        interpolation: nearest, bilinear, bicubic or lanczos.
        max_pixels: Pixels of the largest image that is opened.
        bits: Number of the 16 bits of a channel that the data set uses, for images with so many; None if not known.
    """

    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"
    max_pixels: int = MAX_PIXELS
    bits: int | None = DEEP_BITS

    def __post_init__(self) -> None:
        if self.interpolation not in _RESAMPLING:
            raise DataInvalid(f"there is no interpolation {self.interpolation!r}; there are: {', '.join(_RESAMPLING)}")

    @classmethod
    def of(cls, backbone: RunModel, max_pixels: int = MAX_PIXELS) -> Self:
        """Returns what a backbone wants, of images that have at most so many pixels.

        Raises:
            DataInvalid: If it does not take images.
        """
        images = backbone.images
        if images is None:
            raise DataInvalid(f"{backbone.config.name} does not take images")
        return cls(images.image_size, images.mean, images.std, images.interpolation, max_pixels)

    def decode(self, data: bytes | memoryview) -> Pixels:
        """Decodes one image and resizes it to the square, without keeping its proportions, as the paper does.

        Returns:
            uint8[3, image_size, image_size].

        Raises:
            ImageUnreadable: If `data` is not an image that is read whole; see `fedpeft.data.images`.
            BitsUnknown: If it has 16 bits a channel and `bits` is None.
        """
        rgb = read_rgb(data, self.bits, self.max_pixels)
        if rgb.size != (self.image_size, self.image_size):
            rgb = rgb.resize((self.image_size, self.image_size), _RESAMPLING[self.interpolation])
        return np.ascontiguousarray(np.asarray(rgb, np.uint8).transpose(2, 0, 1))

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """Returns uint8[n, 3, side, side] as float32, (x / 255 - mean) / std in each channel, on the same device."""
        scale, shift = _scale_and_shift(self.mean, self.std, pixels.device)
        return torch.addcmul(shift, pixels.float(), scale)


@lru_cache(maxsize=16)
def _scale_and_shift(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns factor and summand, float32[1, 3, 1, 1] each; kept, because a copy to a GPU waits for its work to end."""
    with torch.inference_mode(mode=False):  # scoring may ask first, and training cannot use what inference mode makes
        scale = torch.tensor([1 / (255 * s) for s in std], device=device)
        shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=device)
        return scale.view(1, 3, 1, 1), shift.view(1, 3, 1, 1)


def augment(pixels: Pixels, rows: Indices, kind: Augmentation, seed: int, epoch: int) -> Pixels:
    """Augments images as the paper does: `flip` mirrors half of them; `crop` also shifts them within black borders.

    Args:
        pixels: uint8[n, 3, side, side]; not changed.
        rows: The number of each image in its data set, int64[n].
        kind: The augmentation.
        seed: Seed of the training.
        epoch: Number of the pass over the data.

    Returns:
        uint8[n, 3, side, side].
    """
    if kind == "none":
        return pixels
    mirrored = (_draws(seed, epoch, rows, 0) >> np.uint64(63)).astype(bool)
    if kind == "flip":
        out = pixels.copy()
        out[mirrored] = pixels[mirrored][..., ::-1]
        return out
    side = pixels.shape[-1]
    padding = round(side / _PADDING_SHARE)
    out = np.zeros_like(pixels)
    # One copy an image: a gather over the whole batch is up to three times slower (benchmarks/augmentation.py).
    for i, (down, right) in enumerate(_shifts(seed, epoch, rows, padding)):
        height, width = side - abs(down), side - abs(right)
        top, left = max(-down, 0), max(-right, 0)
        kept = pixels[i, :, top : top + height, left : left + width]
        below, beside = max(down, 0), max(right, 0)
        if mirrored[i]:
            kept, beside = kept[..., ::-1], side - beside - width
        out[i, :, below : below + height, beside : beside + width] = kept
    return out


def _shifts(seed: int, epoch: int, rows: Indices, padding: int) -> list[tuple[int, int]]:
    """Returns (down, right) in pixels of every image, each uniform in -padding..padding."""
    choices = np.uint64(2 * padding + 1)
    down, right = ((_draws(seed, epoch, rows, k) >> np.uint64(32)) % choices for k in (1, 2))
    return [(int(d) - padding, int(r) - padding) for d, r in zip(down, right, strict=True)]


def _draws(seed: int, epoch: int, rows: Indices, which: int) -> NDArray[np.uint64]:
    """Returns 64 random bits for every row: splitmix64's mixer over seed, epoch, draw and row in turn."""
    state = np.zeros(len(rows), np.uint64)
    for value in (seed, epoch, which, rows):
        word = np.asarray(value).astype(np.uint64)
        state = state + word + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return state
