from __future__ import annotations

from pathlib import Path

import pytest

from fedpeft_client.relay.options import RelayOptions

SERVER = "127.0.0.1:7071"


@pytest.mark.parametrize(
    ("own", "parent", "deadline"),
    [(None, 600.0, 450.0), (60.0, 600.0, 60.0), (900.0, 600.0, 600.0), (None, 0.1, 0.1)],
)
def test_a_round_of_the_edge_ends_before_the_parents(own: float | None, parent: float, deadline: float) -> None:
    assert RelayOptions(SERVER, "north", 4, deadline_s=own).deadline_of(parent) == deadline


@pytest.mark.parametrize(
    "options", [RelayOptions(SERVER, "north", 4), RelayOptions(SERVER, "north", 4, 3, 9.5, 70, Path("identity"))]
)
def test_options_reach_the_worker_whole(options: RelayOptions) -> None:
    assert RelayOptions.from_json(options.as_json()) == options
