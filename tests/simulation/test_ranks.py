"""Simulated clients of unequal ranks: their bytes, and the same bits from processes, what they keep unsent included."""

from __future__ import annotations

import numpy as np
import pytest

from fedpeft.aggregation.low_rank.ranks import of_rank
from fedpeft.peft import spec_of
from fedpeft.simulation import simulate

from .simulated_runs import clients, config, same, tensors, without_clock

RANKS = (1, 3, 99)


def settings(strategy, method, options, codec, **simulation):
    return config(
        peft={"method": method, **options},
        aggregation={"strategy": strategy},
        codec=codec,
        simulation={"ranks": RANKS, **simulation},
        rounds={"count": 3, "clients": 3, "seed": 7},
    )


@pytest.mark.parametrize(
    ("strategy", "method", "options"),
    [("flora", "lora_residual", {"rank": 4, "residual_rank": 24}), ("flexlora", "lora", {"rank": 4})],
)
def test_a_client_sends_the_rank_that_it_bears(tmp_path, folders, strategy, method, options):
    run, names = settings(strategy, method, options, {"error_feedback": False}), clients(folders)
    report = simulate(run, names, tmp_path)
    spec = spec_of(run.model, method, options)
    rank = dict(zip(sorted(names), RANKS * len(names), strict=False))
    sizes = {client: sum(4 * t.size for t in of_rank(spec.sent(1), rank[client])) for client in names}
    assert len(set(sizes.values())) == 3
    for row in report["rounds"]:
        assert row["payload_bytes_up"] == sum(sizes[client] for client in row["clients"])
        assert row["payload_bytes_down"] == 3 * sum(4 * t.size for t in spec.shared)
    learned = tensors(tmp_path)[1][f"blocks.0.attn.qkv.{'residual.up' if spec.derived else 'lora_B.weight'}"]
    assert np.linalg.matrix_rank(learned) > max(RANKS[:2])


def test_processes_give_the_same_bits_with_updates_that_are_cut_and_sparse(tmp_path, folders):
    given = "fedex_lora", "lora_residual", {"rank": 4, "residual_rank": 8}, {"up": "sparse", "density": 0.5}
    names = clients(folders)
    one = simulate(settings(*given), names, tmp_path / "one")
    other = simulate(settings(*given, engine="processes", workers=2), names, tmp_path / "two")
    assert without_clock(one)["rounds"] == without_clock(other)["rounds"]
    assert same(tensors(tmp_path / "one")[1], tensors(tmp_path / "two")[1])
