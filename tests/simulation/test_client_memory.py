"""State of simulated clients from round to round: nothing is written for who keeps nothing, a kill loses nothing."""

import numpy as np

from fedpeft.simulation.client_memory import ClientMemory

ONE, TWO = {"weight": np.ones(2, np.float32)}, {"weight": np.full(2, 2, np.float32)}


def files(folder):
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def values(memory, client="a"):
    return {group: arrays["weight"].tolist() for group, arrays in memory.state(client).items()}


def test_nothing_is_written_for_a_group_that_was_and_is_empty(tmp_path):
    memory = ClientMemory(tmp_path)
    memory.keep("a", {"residual": {}, "local": {}})
    assert files(tmp_path) == []
    memory.keep("a", {"residual": {}}, {"residual": ONE})
    assert files(tmp_path) == ["pending-1/a@residual.if-excluded"]
    memory.confirm("a")
    assert files(tmp_path) == []
    memory.settle(1)
    assert values(memory) == {}


def test_state_counts_in_its_round_and_after_it_is_settled(tmp_path):
    memory = ClientMemory(tmp_path)
    memory.keep("a", {"residual": ONE, "local": TWO})
    memory.keep("a.b", {"residual": TWO})
    assert values(memory) == {"local": [2, 2], "residual": [1, 1]}
    memory.settle(1)
    assert values(memory) == {"local": [2, 2], "residual": [1, 1]}
    assert values(memory, "a.b") == {"residual": [2, 2]}
    memory.keep("a", {"residual": {}})
    assert values(memory) == {"local": [2, 2]}
    memory.settle(2)
    assert values(memory) == {"local": [2, 2]}
    assert files(tmp_path) == ["kept/a.b/residual.safetensors", "kept/a/local.safetensors"]


def test_an_excluded_update_gives_back_what_was_held(tmp_path):
    memory = ClientMemory(tmp_path)
    memory.keep("a", {"residual": ONE, "control": TWO})
    memory.settle(1)
    memory.keep("a", {"residual": {}, "control": ONE}, {"residual": TWO, "control": {}})
    assert values(memory) == {"control": [1, 1]}
    memory.take_back("a")
    assert values(memory) == {"residual": [2, 2]}
    memory.settle(2)
    assert values(memory) == {"residual": [2, 2]}


def test_a_killed_round_leaves_nothing_and_a_committed_one_everything(tmp_path):
    memory = ClientMemory(tmp_path)
    memory.keep("a", {"residual": ONE})
    memory.settle(1)
    memory.keep("a", {"residual": TWO}, {"residual": ONE})
    assert values(ClientMemory(tmp_path, settled=1)) == {"residual": [1, 1]}
    memory = ClientMemory(tmp_path, settled=1)
    memory.keep("a", {"residual": TWO})
    assert values(ClientMemory(tmp_path, settled=2)) == {"residual": [2, 2]}
    memory = ClientMemory(tmp_path, settled=2)
    memory.keep("a", {"residual": {}})
    assert values(ClientMemory(tmp_path, settled=3)) == {}
