"""Stacked factors: a sum of low-rank products as two tall matrices, and its singular values from a thin QR of them.

    M = sum p_i B_i A_i = up^T down,    up = R_b Q_b,  down = R_a Q_a,    M = Q_b^T (R_b^T R_a) Q_a

`up` is [terms, out] and `down` [terms, in], so a factor's vectors are rows. Only the core R_b^T R_a, of [terms, terms]
at most, is decomposed: by one-sided Jacobi rotations (Hestenes 1958), which find small singular values as exactly as
large ones. Nothing of the size out x in is formed.

Nothing here calls BLAS or LAPACK: they start threads of their own, and the order of their additions depends on the
number of these. A fold must give the same bits everywhere (`fedpeft.rounds.folding.fold`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]

EPSILON = float(np.finfo(np.float64).eps)
SWEEPS = 60
"""Most passes over all pairs of rows; about ten are needed."""


@dataclass(frozen=True, slots=True)
class Stack:
    """A matrix up^T down of [out, in], as its factors.

    Attributes:
        up: Float64 [terms, out].
        down: Float64 [terms, in].
    """

    up: Doubles
    down: Doubles

    @classmethod
    def of(cls, products: Iterable[tuple[float, Doubles, Doubles]], out: int, inputs: int) -> Stack:
        """Stacks products.

        A stack of more than twice as many terms as the smaller of `out` and `inputs` is brought back to that many,
        which changes the matrix by rounding only; so memory is bounded, however many products there are.

        Args:
            products: Each as (p, B [out, rank], A [rank, in]), for the matrix sum p B A.
            out: Rows of the matrix.
            inputs: Columns of the matrix.
        """
        most, terms, pieces = 2 * min(out, inputs), 0, [cls(np.empty((0, out)), np.empty((0, inputs)))]
        for share, b, a in products:
            pieces.append(cls(b.T, share * a))
            terms += len(a)
            if terms > most:
                pieces = [cls._joined(pieces).shortened()]
                terms = len(pieces[0].up)
        return cls._joined(pieces)

    @classmethod
    def _joined(cls, pieces: list[Stack]) -> Stack:
        return cls(np.concatenate([each.up for each in pieces]), np.concatenate([each.down for each in pieces]))

    def shortened(self) -> Stack:
        """Returns the same matrix with at most as many terms as the smaller of its sides."""
        if self.up.shape[1] <= self.down.shape[1]:
            core, rows = thin(self.up)
            return Stack(rows, times(core.T, self.down))
        core, rows = thin(self.down)
        return Stack(times(core.T, self.up), rows)

    def plus(self, other: Stack) -> Stack:
        """Returns the sum of two matrices."""
        return self._joined([self, other])

    def minus(self, other: Stack) -> Stack:
        """Returns the difference of two matrices."""
        return self._joined([self, Stack(other.up, -other.down)])

    def squared_norm(self) -> float:
        """Returns the squared Frobenius norm."""
        cores = [thin(rows)[0] for rows in (self.up, self.down)]
        return float(np.square(times(cores[0].T, cores[1])).sum())

    def of_rank(self, rank: int) -> Stack:
        """Returns the nearest matrix of a rank, with orthonormal rows in `down`."""
        u, s, v = self.svd()
        return Stack(u[:rank] * s[:rank, None], v[:rank])

    def svd(self) -> tuple[Doubles, Doubles, Doubles]:
        """Returns u [rank, out], s [rank], v [rank, in] with M = sum s_j u_j v_j^T, the largest s first.

        Rows of u and of v are orthonormal. Singular values that rounding cannot tell from zero are left out. Signs are
        those with which the largest value of each row of v is positive.
        """
        cores, bases = zip(*(thin(rows) for rows in (self.up, self.down)), strict=True)
        turned, rotation = orthogonal_rows(times(cores[0].T, cores[1]))
        s = np.sqrt(np.square(turned).sum(axis=1))
        order = np.argsort(-s, kind="stable")
        order = order[s[order] > s.max(initial=0.0) * EPSILON * max(*turned.shape, 1)]
        u, v = times(rotation[order], bases[0]), times(turned[order] / s[order, None], bases[1])
        signs = np.array([1.0 if row[np.abs(row).argmax()] >= 0 else -1.0 for row in v])[:, None]
        return u * signs, s[order], v * signs


def thin(rows: Doubles) -> tuple[Doubles, Doubles]:
    """Returns core [n, rank] and orthonormal rows q [rank, width] with rows = core q, by Gram-Schmidt, each row twice.

    Args:
        rows: Float64 [n, width], which may depend on each other: `rank` is how many do not, up to rounding.
    """
    n, width = rows.shape
    core, q, rank = np.zeros((n, min(n, width))), np.empty((min(n, width), width)), 0
    for place, row in enumerate(rows):
        length, rest = math.sqrt(np.square(row).sum()), row.copy()
        for _ in range(2):  # "twice is enough" (Kahan): then the rows are orthogonal up to rounding
            parts = (q[:rank] * rest).sum(axis=1)
            core[place, :rank] += parts
            rest -= (q[:rank] * parts[:, None]).sum(axis=0)
        left = math.sqrt(np.square(rest).sum())
        if rank < len(q) and left > 8 * EPSILON * math.sqrt(width) * length:
            core[place, rank], q[rank] = left, rest / left
            rank += 1
    return core[:, :rank], q[:rank]


def times(left: Doubles, right: Doubles) -> Doubles:
    """Returns left right, [n, m] by [m, width], one term after the other."""
    total = np.zeros((len(left), right.shape[1]))
    for place, row in enumerate(right):
        total += left[:, place, None] * row
    return total


def orthogonal_rows(matrix: Doubles) -> tuple[Doubles, Doubles]:
    """Returns (W M, W) of [n, width] and [n, n] with W orthogonal and the rows of W M orthogonal to each other.

    Each pass turns all pairs of rows, disjoint ones together, until none needs it.
    """
    n = len(matrix)
    both = np.concatenate([matrix, np.eye(n)], axis=1)
    width, pairings = matrix.shape[1], _pairings(n)
    for _ in range(SWEEPS):
        if not sum([_turn(both, width, *pairs) for pairs in pairings]):
            break
    return both[:, :width], both[:, width:]


def _pairings(n: int) -> list[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """Returns the rounds of a tournament of n rows: in each, all are in disjoint pairs; over all, each pair once."""
    size, found = n + n % 2, []
    ring = list(range(size))
    for _ in range(size - 1):
        pairs = [(min(p), max(p)) for p in zip(ring[: size // 2], ring[: size // 2 - 1 : -1], strict=True)]
        real = np.array([pair for pair in pairs if pair[1] < n], np.intp).reshape(-1, 2)
        found.append((real[:, 0], real[:, 1]))
        ring = [ring[0], ring[-1], *ring[1:-1]]
    return found


def _turn(both: Doubles, width: int, first: NDArray[np.intp], second: NDArray[np.intp]) -> bool:
    """Turns disjoint pairs of rows in place so that each is orthogonal; returns whether any needed it."""
    one, other = both[first], both[second]
    own, its = np.square(one[:, :width]).sum(axis=1), np.square(other[:, :width]).sum(axis=1)
    common = (one[:, :width] * other[:, :width]).sum(axis=1)
    needs = np.abs(common) > EPSILON * len(both) * np.sqrt(own) * np.sqrt(its)
    if not needs.any():
        return False
    with np.errstate(over="ignore"):  # an infinite zeta is a tangent of zero
        zeta = (its - own) / np.where(needs, 2 * common, 1.0)
        size = 1 / (np.abs(zeta) + np.hypot(1.0, zeta))
    tangent = np.where(needs, np.copysign(size, zeta), 0.0)[:, None]
    cosine = 1 / np.sqrt(1 + np.square(tangent))
    both[first] = cosine * (one - tangent * other)
    both[second] = cosine * (tangent * one + other)
    return True
