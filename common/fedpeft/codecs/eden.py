"""eden1 to eden4: 1 to 4 bits a value after a random rotation (DRIVE, arXiv 2105.08339; EDEN, arXiv 2108.08842).

Layout of one tensor of n values:

    seed        4 bytes, of the rotation
    scales      float32 s of each chunk, at least 0
    codes       b bits of each rotated value, chunk by chunk, see `fedpeft.codecs.packing`

Chunks are 1,024 values each; the rest is cut into the powers of two it is the sum of, down to 64, and what is left of
it gets zeros up to a power of two, 8 at least. So a chunk fits into a core's cache, and little is padding.

A chunk x becomes r = H (signs * x), whose values are nearly normal; each becomes the nearest centroid c of Lloyd and
Max for r / ||x||. Decoded are signs * (H c) s, with s = ||x||^2 / <r, c>: then <decoded, x> = ||x||^2, so
the mean over all rotations is x (EDEN, theorem 2.1; over these, nearly). One bit is DRIVE with that scale: c is a sign.

The squared error is near 0.57, 0.13, 0.036 and 0.010 of ||x||^2, and for one bit at most 1 by Khintchine's inequality.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from fedpeft.codecs import BLOCK_ELEMENTS, Codec, Values, codecs, packing
from fedpeft.codecs.random_bytes import SEED_BITS
from fedpeft.codecs.rotation import Doubles, column_sums, hadamard, signs
from fedpeft.errors import PayloadInvalid

CHUNK = 1024
SMALLEST_WHOLE, SMALLEST = 64, 8
AT_ONCE = 64
"""Chunks that are transformed together: 512 KiB of float64."""

CENTROIDS = {
    1: (0.7979,),
    2: (0.4528, 1.5104),
    3: (0.2451, 0.7560, 1.3439, 2.1519),
    4: (0.1284, 0.3880, 0.6568, 0.9423, 1.2562, 1.6180, 2.0690, 2.7326),
}
"""Positive ones of the quantiser with the least squared error for N(0, 1), by bits; Max, 1960, table I."""

LARGEST = np.float32(np.finfo(np.float32).max)


class Eden(Codec):
    """Values rotated and rounded to b bits.

    Args:
        bits: b, 1 to 4.
        seed: Of the rotation, at most 32 bits.
    """

    is_random = True

    def __init__(self, bits: int, seed: int = 0) -> None:
        self.name = f"eden{bits}"
        self._bits = bits
        self._seed = seed
        positive = np.array(CENTROIDS[bits])
        self._centroids = np.concatenate([-positive[::-1], positive])
        self._borders = (self._centroids[1:] + self._centroids[:-1]) / 2

    def seeded(self, seed: int) -> Codec:
        """See `Codec.seeded`."""
        return Eden(self._bits, seed % (1 << SEED_BITS))

    def encode(self, values: Values) -> bytes:
        """See `Codec.encode`."""
        heads, bodies = [self._seed.to_bytes(4, "little")], []
        for first, m, size, start in _groups(values.size, 0, values.size):
            taken = values[start : start + m * size]
            chunks = np.zeros(m * size)
            chunks[: taken.size] = taken
            scales, codes = self._encode(np.ascontiguousarray(chunks.reshape(m, size).T), first)
            heads.append(scales.astype("<f4").tobytes())
            bodies.append(packing.pack(np.ascontiguousarray(codes.T).reshape(-1), self._bits).tobytes())
        return b"".join([*heads, *bodies])

    def _encode(self, chunks: Doubles, first: int) -> tuple[Values, NDArray[np.uint8]]:
        """Returns the scales, float32 [m], and codes, uint8 [size, m], of chunks, float64 [size, m]."""
        rotated = hadamard(chunks * signs(self._seed, first, chunks.shape[1], len(chunks)))
        square = column_sums(chunks * chunks)
        norm = np.where(square > 0, np.sqrt(square), 1.0)
        codes = np.searchsorted(self._borders, rotated / norm, side="right")
        product = column_sums(rotated * self._centroids[codes])
        scales = np.minimum(square / np.where(product > 0, product, 1.0), LARGEST)
        return scales.astype(np.float32), codes.astype(np.uint8)

    def check(self, data: memoryview, n: int) -> None:
        """See `Codec.check`."""
        size = self.length_bounds(n)[0]
        if len(data) != size:
            raise PayloadInvalid(f"{n} values in {self.name} take {size} bytes, not {len(data)}")
        _, scales, _ = self._split(data, n)
        fits = (scales >= 0) & (scales <= LARGEST)
        if not fits.all():
            i = int(fits.argmin())
            raise PayloadInvalid(f"scale {i} is {scales[i]}, not a finite number that is at least 0")

    def blocks(self, data: memoryview, n: int, size: int = BLOCK_ELEMENTS) -> Iterator[tuple[int, Values]]:
        """See `Codec.blocks`; a chunk that two blocks share is computed for each, so that nothing is kept."""
        for start in range(0, n, size):
            yield start, self._read(data, n, start, min(start + size, n))

    def _read(self, data: memoryview, n: int, start: int, stop: int) -> Values:
        seed, scales, raw = self._split(data, n)
        pieces = []
        begin = None
        for first, m, size, at in _groups(n, start, stop):
            codes = packing.unpack(raw, self._bits, at, at + m * size)
            chunks = np.ascontiguousarray(self._centroids[codes].reshape(m, size).T)
            decoded = hadamard(chunks) * signs(seed, first, m, size) * scales[first : first + m].astype(np.float64)
            pieces.append(np.clip(decoded, -LARGEST, LARGEST).T.reshape(-1).astype(np.float32))
            begin = at if begin is None else begin
        return np.concatenate(pieces)[start - (begin or 0) :][: stop - start]

    def length_bounds(self, n: int) -> tuple[int, int]:
        """See `Codec.length_bounds`."""
        rest = _rest(n)
        padded = n // CHUNK * CHUNK + sum(rest)
        size = 4 + 4 * (n // CHUNK + len(rest)) + padded * self._bits // 8
        return size, size

    def _split(self, data: memoryview, n: int) -> tuple[int, Values, NDArray[np.uint8]]:
        """Returns the seed, the scales of all chunks, and the bytes of the codes."""
        head = 4 + 4 * (n // CHUNK + len(_rest(n)))
        scales = np.frombuffer(data[4:head], "<f4").astype(np.float32, copy=False)
        return int.from_bytes(data[:4], "little"), scales, np.frombuffer(data[head:], np.uint8)


def _rest(n: int) -> list[int]:
    """Returns the sizes of the chunks after the whole ones."""
    left, sizes = n % CHUNK, []
    size = CHUNK // 2
    while size >= SMALLEST_WHOLE:
        if left >= size:
            sizes.append(size)
            left -= size
        size //= 2
    if left:
        sizes.append(max(SMALLEST, 1 << (left - 1).bit_length()))
    return sizes


def _groups(n: int, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
    """Yields chunks of a size that hold values from `start` to `stop` of n: index of the first, number, size, place.

    All but the last chunk of a tensor are full, so a chunk's place is the same among values and codes.
    """
    whole = n // CHUNK
    last = min(whole, -(-stop // CHUNK))
    for first in range(start // CHUNK, last, AT_ONCE):
        yield first, min(AT_ONCE, last - first), CHUNK, first * CHUNK
    at = whole * CHUNK
    for index, size in enumerate(_rest(n), whole):
        if at < stop and at + size > start:
            yield index, 1, size, at
        at += size


for _bits in CENTROIDS:
    _codec = Eden(_bits)
    codecs.register(_codec.name)(_codec)
