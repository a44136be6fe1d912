"""Random crop and flip of a batch as training does it, beside one gather over the whole batch; same pixels, one core.

python benchmarks/augmentation.py
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from fedpeft.data.sources.interface import Indices
from fedpeft.data.transforms import _PADDING_SHARE, Pixels, _draws, _shifts, augment

CASES = ((64, 32), (16, 56), (64, 96), (64, 224))
"""Images in a batch, and their side in pixels."""
REPEATS = 15


def gathered(pixels: Pixels, rows: Indices, seed: int, epoch: int) -> Pixels:
    """The alternative: all windows of the padded batch as a view, of which one an image is taken at once."""
    side = pixels.shape[-1]
    padding = round(side / _PADDING_SHARE)
    mirrored = (_draws(seed, epoch, rows, 0) >> np.uint64(63)).astype(bool)
    down, right = np.array(_shifts(seed, epoch, rows, padding)).T
    padded = np.pad(pixels, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    windows = sliding_window_view(padded, (side, side), axis=(2, 3))
    out: Pixels = windows[np.arange(len(rows)), :, padding - down, padding - right]
    out[mirrored] = out[mirrored][..., ::-1]
    return out


def copied(pixels: Pixels, rows: Indices, seed: int, epoch: int) -> Pixels:
    """As training does it."""
    return augment(pixels, rows, "crop", seed, epoch)


def shortest(work: Callable[[Pixels, Indices, int, int], Pixels], pixels: Pixels, rows: Indices) -> float:
    """Returns the shortest of some times, in seconds."""
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        work(pixels, rows, 1, 2)
        times.append(time.perf_counter() - began)
    return min(times)


def main() -> None:
    """Prints the shortest of some times for every case, and their ratio."""
    print("| images | side | one copy an image, ms | one gather, ms | ratio |\n|--:|--:|--:|--:|--:|")
    for count, side in CASES:
        pixels = np.random.default_rng(0).integers(0, 256, (count, 3, side, side), np.uint8)
        rows = np.arange(count)
        assert np.array_equal(copied(pixels, rows, 1, 2), gathered(pixels, rows, 1, 2))
        ours, other = (1000 * shortest(work, pixels, rows) for work in (copied, gathered))
        print(f"| {count} | {side} | {ours:.2f} | {other:.2f} | {other / ours:.1f} |")


if __name__ == "__main__":
    main()
