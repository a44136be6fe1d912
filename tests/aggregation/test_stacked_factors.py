"""Stacked factors: singular values and norms of sums of products, without the matrix and without BLAS."""

from __future__ import annotations

import numpy as np
import pytest

from fedpeft.aggregation.low_rank.stacked_factors import Stack, thin, times


def stack(terms: int, out: int = 7, inputs: int = 11, scale: float = 1.0) -> Stack:
    draw = np.random.default_rng([terms, out, inputs])
    return Stack(scale * draw.standard_normal((terms, out)), draw.standard_normal((terms, inputs)))


def rebuilt(found: tuple[np.ndarray, np.ndarray, np.ndarray]) -> np.ndarray:
    u, s, v = found
    return (u.T * s) @ v


@pytest.mark.parametrize("shape", [(1, 7, 11), (4, 7, 11), (12, 7, 11), (12, 11, 7), (40, 9, 64), (3, 1, 5)])
@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e9])
def test_singular_values_and_vectors_are_those_of_the_matrix(shape: tuple[int, int, int], scale: float) -> None:
    given = stack(*shape, scale)
    whole, found = given.up.T @ given.down, given.svd()
    u, s, v = found
    exact = np.linalg.svd(whole, compute_uv=False)
    assert len(s) == np.linalg.matrix_rank(whole)
    np.testing.assert_allclose(s, exact[: len(s)], rtol=0, atol=1e-14 * exact[0])
    np.testing.assert_allclose(rebuilt(found), whole, rtol=0, atol=1e-13 * exact[0])
    for rows in (u, v):
        np.testing.assert_allclose(rows @ rows.T, np.eye(len(s)), rtol=0, atol=1e-13)
    assert given.squared_norm() == pytest.approx(float((whole**2).sum()), rel=1e-12)


def test_small_singular_values_are_as_exact_as_large_ones() -> None:
    draw = np.random.default_rng(1)
    u, v = (np.linalg.qr(draw.standard_normal((n, 4)))[0] for n in (20, 30))
    s = np.array([1.0, 1e-4, 1e-8, 1e-12])
    np.testing.assert_allclose(Stack((u * s).T, v.T).svd()[1], s, rtol=1e-3)


def test_terms_that_depend_on_each_other_and_terms_of_zero() -> None:
    given = stack(4)
    twice = Stack(np.concatenate([given.up, given.up]), np.concatenate([given.down, given.down]))
    assert len(twice.svd()[1]) == 4
    np.testing.assert_allclose(rebuilt(twice.svd()), 2 * given.up.T @ given.down, atol=1e-13)
    nothing = given.minus(given)
    assert nothing.squared_norm() < 1e-24
    zero = Stack(np.zeros((3, 7)), np.zeros((3, 11)))
    assert [each.shape for each in zero.svd()] == [(0, 7), (0,), (0, 11)] and zero.squared_norm() == 0
    assert Stack.of([], 7, 11).svd()[1].size == 0


def test_a_stack_does_not_grow_with_the_products() -> None:
    draw = np.random.default_rng(2)
    products = [(0.1 * p, draw.standard_normal((6, 2)), draw.standard_normal((2, 9))) for p in range(50)]
    for out, inputs, some in ((6, 9, products), (9, 6, [(p, a.T, b.T) for p, b, a in products])):
        given = Stack.of(some, out, inputs)
        assert len(given.up) <= 2 * 6
        np.testing.assert_allclose(given.up.T @ given.down, sum(p * b @ a for p, b, a in some), atol=1e-11)


def test_thin_factors_and_products_are_plain_ones() -> None:
    rows = np.random.default_rng(4).standard_normal((5, 3))
    core, q = thin(rows)
    np.testing.assert_allclose(times(core, q), rows, atol=1e-14)
    assert q.shape == (3, 3) and not np.triu(core, 1).any()
