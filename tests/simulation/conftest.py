"""Data of simulated clients."""

import pytest

from fedpeft.data import partitions
from fedpeft.data.partition_writer import write_parts
from fedpeft.data.sources.opening import open_source

from ..data.test_sources import table, write


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Four clients of different sizes, as `fedpeft partition` writes them."""
    root = tmp_path_factory.mktemp("data")
    whole = write(root / "whole.parquet", table(48))
    cut = partitions.dirichlet(open_source(whole).labels, 4, 1.0, 3)
    write_parts(whole, cut, root / "parts")
    return root / "parts"
