"""The rule by which data are divided: shards, variants, and examples drawn first."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.data.division import Division, drawn_rows
from fedpeft.data.partitions import dirichlet, quantity, shards, skew
from fedpeft.data.sources.opening import open_source
from fedpeft.errors import DataInvalid

from .test_sources import table, write

CIFAR = np.repeat(np.arange(10), 500)


@given(
    labels=st.lists(st.integers(0, 6), min_size=1, max_size=200),
    clients=st.integers(1, 8),
    per_client=st.integers(1, 4),
    seed=st.integers(0, 2**63 - 1),
)
def test_shards_are_disjoint_complete_and_of_equal_size(labels, clients, per_client, seed):
    labels = np.array(labels)
    if len(labels) < clients * per_client:
        with pytest.raises(DataInvalid, match="too few"):
            shards(labels, clients, per_client, seed)
        return
    parts = shards(labels, clients, per_client, seed).parts
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(len(labels)))
    assert max(map(len, parts)) - min(map(len, parts)) <= per_client


def test_a_client_has_as_many_classes_as_shards_where_these_divide_the_classes():
    parts = shards(CIFAR, 10, 2, 3).parts
    assert all(len(np.unique(CIFAR[part])) <= 2 for part in parts)
    assert all(len(part) == 500 for part in parts)
    assert skew(CIFAR, parts, 10).total_variation > 0.75
    other = shards(CIFAR, 10, 2, 4).parts
    assert any(not np.array_equal(a, b) for a, b in zip(parts, other, strict=True)), "another seed, another deal"


def test_examples_are_drawn_first_and_divided_as_they_came(tmp_path):
    source = open_source(write(tmp_path / "whole.parquet", table(60)))
    split = Division("dirichlet", 3, 0.5, "balanced", examples=30).of(source, 7)
    rows = drawn_rows(60, 30, 7)
    assert np.array_equal(np.sort(np.concatenate(split.parts)), rows), "no row beyond those that were drawn"
    inner = dirichlet(source.labels[rows], 3, 0.5, 7, "balanced").parts
    assert all(np.array_equal(part, rows[own]) for part, own in zip(split.parts, inner, strict=True))
    assert split.variant == "dirichlet/balanced"


def test_the_skew_that_was_drawn_is_the_skew_that_is_read(tmp_path):
    """A division that was drawn on one subset and read on another would be nearly IID."""
    source = open_source(write(tmp_path / "whole.parquet", table(600)))
    split = Division("dirichlet", 8, 0.1, examples=300).of(source, 1)
    drawn = source.labels[drawn_rows(600, 300, 1)]
    meant = skew(drawn, dirichlet(drawn, 8, 0.1, 1).parts, 3)
    read = skew(source.labels, split.parts, 3)
    assert read.total_variation == pytest.approx(meant.total_variation, abs=0.02)
    assert read.total_variation > 0.4


def test_variants_are_those_of_the_scheme(tmp_path):
    source = open_source(write(tmp_path / "whole.parquet", table(60)))
    usual = Division("quantity", 4, 1.0).of(source, 5)
    assert [list(p) for p in usual.parts] == [list(p) for p in quantity(60, 4, 1.0, 5).parts]
    assert Division("quantity", 4, 1.0, "lognormal").of(source, 5).variant == "quantity/lognormal"
    with pytest.raises(DataInvalid, match="there are 60 rows, fewer than the 61"):
        Division("iid", 4, examples=61).of(source, 0)


def test_draws_depend_on_the_seed_alone_and_are_not_those_of_the_division():
    assert np.array_equal(drawn_rows(1000, 10, 3), drawn_rows(1000, 10, 3))
    assert not np.array_equal(drawn_rows(1000, 10, 3), drawn_rows(1000, 10, 4))
    division = np.random.Generator(np.random.PCG64(3)).permutation(1000)[:10]
    assert not np.array_equal(drawn_rows(1000, 10, 3), np.sort(division))
