"""Images on which a model is trained and scored at once: the same bytes among the training and the held-out images.

Notable: an image that was encoded anew, cut or scaled is another image here; only equal bytes are found. What it costs
is bounded: of data that are larger than the budget, images at even distances are looked at.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from hashlib import blake2b
from typing import Any, Self

from fedpeft.data.sources.interface import ImageUnreadable, Source
from fedpeft.formatting import counted

BUDGET_BYTES = 4 * 1024 * 1024 * 1024
"""Encoded images that are read at most, about: some seconds of one processor."""

EXAMPLES = 5
_DIGEST_BYTES = 16


@dataclass(frozen=True)
class Overlap:
    """Held-out images that are among the training images too.

    Attributes:
        images: Number of images.
        held_out: Held-out images that were looked at.
        held_out_of: Held-out images that there are; more than `held_out` where not all were looked at.
        training: Training images that were looked at.
        of: Training images that there are, likewise.
        examples: The names of some, among the training and among the held-out images.
        unopened: Clients whose data cannot be opened; their images are in no other figure.
    """

    images: int
    held_out: int
    held_out_of: int
    training: int
    of: int
    examples: tuple[tuple[str, str], ...]
    unopened: int = 0

    def __str__(self) -> str:
        found = (
            f"{self.images:,} of {counted(self.held_out, 'held-out image')} "
            f"{'is' if self.images == 1 else 'are'} among the training images"
        )
        if self.images:
            named = ", ".join(f"{held} is {trained}" for trained, held in self.examples[:2])
            found += f", with the same bytes: {named}; accuracy on these does not say how new images fare"
        return "; ".join(filter(None, (found, self.not_compared)))

    @property
    def not_compared(self) -> str:
        """A clause that says how much was compared; empty if everything was."""
        clauses = []
        if self.held_out < self.held_out_of or self.training < self.of:
            clauses.append(
                f"{self.held_out:,} of {self.held_out_of:,} held-out and {self.training:,} of {self.of:,} training "
                "images were compared"
            )
        if self.unopened:
            clauses.append(f"the data of {counted(self.unopened, 'client')} cannot be opened, and were not compared")
        return "; ".join(clauses)

    def as_dict(self) -> dict[str, Any]:
        """Returns it for JSON, by the names of the attributes."""
        return {**asdict(self), "examples": [list(each) for each in self.examples]}

    @classmethod
    def of_dict(cls, data: Mapping[str, Any]) -> Self:
        """Returns what `as_dict` wrote."""
        return cls(**{**data, "examples": tuple((trained, held) for trained, held in data["examples"])})


def overlap(
    training: Iterable[tuple[str, Source]], parts: int, held_out: Source, budget_bytes: int = BUDGET_BYTES
) -> Overlap:
    """Finds held-out images among training images by digest.

    Args:
        training: The training images in parts, each with what its names begin with; opened one after the other.
        parts: Number of parts.
        held_out: The held-out images; all of them are looked at where they take up to half of the budget.
        budget_bytes: Encoded bytes to be read at most, about; a part has an equal share of half of it.

    Raises:
        DataInvalid: If data went away.
    """
    rows_of: dict[bytes, list[int]] = {}
    looked_at = 0
    for row, digest in _digests(held_out, budget_bytes // 2):
        looked_at += 1
        if digest is not None:
            rows_of.setdefault(digest, []).append(row)
    found: dict[bytes, str] = {}
    trained = there = 0
    for who, source in training:
        there += len(source)
        for row, digest in _digests(source, budget_bytes // 2 // max(parts, 1)):
            trained += 1
            if digest is not None and digest in rows_of and digest not in found:
                found[digest] = who + source.name(row)
    examples = sorted((rows_of[digest][0], name) for digest, name in found.items())[:EXAMPLES]
    return Overlap(
        sum(len(rows_of[digest]) for digest in found),
        looked_at,
        len(held_out),
        trained,
        there,
        tuple((name, held_out.name(row)) for row, name in examples),
    )


def _digests(source: Source, budget_bytes: int) -> Iterator[tuple[int, bytes | None]]:
    """Yields row and digest of images at even distances; None for those that cannot be read."""
    step = max(-(-source.image_bytes_total // max(budget_bytes, 1)), 1)
    for row in range(0, len(source), step):
        try:
            data = source.image_bytes(row)
        except ImageUnreadable:
            data = b""
        yield row, blake2b(data, digest_size=_DIGEST_BYTES).digest() if len(data) else None
