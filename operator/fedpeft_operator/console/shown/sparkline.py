"""A curve as small as a word."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT, EDGE = 120.0, 32.0, 3.0


@dataclass(frozen=True, slots=True)
class Sparkline:
    """Path of a line in a box of `WIDTH` by `HEIGHT`.

    Attributes:
        points: Of an SVG polyline.
        end_x: End of the line.
        end_y: End of the line.
    """

    points: str
    end_x: float
    end_y: float


def sparkline(values: Sequence[tuple[int, float]]) -> Sparkline | None:
    """Returns the line through some values, or None for fewer than two."""
    if len(values) < 2:
        return None
    first, last = values[0][0], values[-1][0]
    low, high = min(v for _, v in values), max(v for _, v in values)
    across, up = max(1, last - first), (high - low) or 1.0
    spots = [
        (
            round(EDGE + (x - first) / across * (WIDTH - 2 * EDGE), 1),
            round(HEIGHT - EDGE - (v - low) / up * (HEIGHT - 2 * EDGE), 1),
        )
        for x, v in values
    ]
    return Sparkline(" ".join(f"{x},{y}" for x, y in spots), *spots[-1])
