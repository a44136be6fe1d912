"""A LoRA layer and the changes of some clients, and what they mean in plain NumPy."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fedpeft.aggregation import Doubles

RANK, INPUTS, OUTPUTS = 3, 11, 7
SHARES = (0.2, 0.5, 0.3)


class Layer:
    """A LoRA layer, and the changes of three clients; out and in differ, so that nothing is transposed unnoticed."""

    def __init__(self, same_a: bool = False, seed: int = 3) -> None:
        draw = np.random.default_rng(seed)
        self.base = [draw.standard_normal((RANK, INPUTS)), draw.standard_normal((OUTPUTS, RANK))]
        self.changes = [[draw.standard_normal(values.shape) for values in self.base] for _ in SHARES]
        if same_a:
            for change in self.changes:
                change[0] = self.changes[0][0]

    def read(self) -> Iterator[tuple[float, list[Doubles]]]:
        yield from zip(SHARES, self.changes, strict=True)

    @property
    def wanted(self) -> Doubles:
        """The mean of the clients' products B A."""
        return sum(p * (self.base[1] + b) @ (self.base[0] + a) for p, (a, b) in self.read())  # type: ignore[return-value]

    def after(self, deltas: list[Doubles]) -> tuple[Doubles, Doubles]:
        a, b = (x + delta for x, delta in zip(self.base, deltas[:2], strict=True))
        return a, b

    def means(self) -> list[Doubles]:
        return [sum(p * change[i] for p, change in self.read()) for i in (0, 1)]  # type: ignore[misc]
