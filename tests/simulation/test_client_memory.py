"""State of simulated clients from round to round: nothing is written for who keeps nothing, a kill loses nothing."""

import re

import numpy as np
import pytest

from fedpeft.errors import BlobCorrupt
from fedpeft.process import durable
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
    assert files(tmp_path) == ["a@residual@1.if-excluded"]
    memory.confirm("a")
    assert files(tmp_path) == []
    memory.settle()
    assert values(memory) == {}


def test_state_counts_in_its_round_and_after_it_is_settled(tmp_path):
    memory = ClientMemory(tmp_path)
    memory.keep("a", {"residual": ONE, "local": TWO})
    memory.keep("a.b", {"residual": TWO})
    assert values(memory) == {"local": [2, 2], "residual": [1, 1]}
    memory.settle()
    assert values(memory) == {"local": [2, 2], "residual": [1, 1]}
    assert values(memory, "a.b") == {"residual": [2, 2]}
    memory.keep("a", {"residual": {}})
    assert values(memory) == {"local": [2, 2]}
    memory.settle()
    assert values(memory) == {"local": [2, 2]}
    assert files(tmp_path) == ["a.b@residual@1.safetensors", "a@local@1.safetensors"]


def test_an_excluded_update_gives_back_what_was_held(tmp_path):
    memory = ClientMemory(tmp_path)
    memory.keep("a", {"residual": ONE, "control": TWO})
    memory.settle()
    memory.keep("a", {"residual": {}, "control": ONE}, {"residual": TWO, "control": {}})
    assert values(memory) == {"control": [1, 1]}
    memory.take_back("a")
    assert values(memory) == {"residual": [2, 2]}
    memory.settle()
    assert values(memory) == {"residual": [2, 2]}


def test_a_killed_round_leaves_nothing_and_a_committed_one_everything(tmp_path):
    memory = ClientMemory(tmp_path)
    memory.keep("a", {"residual": ONE})
    rounds = [memory.changes]
    memory.settle()
    memory.keep("a", {"residual": TWO}, {"residual": ONE})
    memory = ClientMemory(tmp_path, rounds)
    assert values(memory) == {"residual": [1, 1]} and files(tmp_path) == ["a@residual@1.safetensors"]
    memory.keep("a", {"residual": TWO})
    rounds.append(memory.changes)  # killed right after its line
    memory = ClientMemory(tmp_path, rounds)
    assert values(memory) == {"residual": [2, 2]} and files(tmp_path) == ["a@residual@2.safetensors"]
    memory.keep("a", {"residual": {}})
    rounds.append(memory.changes)
    assert values(ClientMemory(tmp_path, rounds)) == {} and files(tmp_path) == []


def test_every_file_that_counts_has_its_digest_on_record(tmp_path):
    memory = ClientMemory(tmp_path)
    memory.keep("a", {"residual": ONE, "local": TWO})
    memory.keep("b", {"residual": ONE}, {"residual": TWO})
    memory.take_back("b")
    rounds = [memory.changes]
    memory.settle()
    memory.keep("a", {"residual": TWO})
    rounds.append(memory.changes)
    memory.settle()
    assert files(tmp_path) == ["a@local@1.safetensors", "a@residual@2.safetensors", "b@residual@1.safetensors"]
    ClientMemory(tmp_path, rounds).check()
    for file in sorted(tmp_path.iterdir()):
        whole = file.read_bytes()
        for damaged in (None, whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1])):
            file.unlink() if damaged is None else file.write_bytes(damaged)
            with pytest.raises(BlobCorrupt, match=re.escape(file.name)):
                ClientMemory(tmp_path, rounds).check()
        file.write_bytes(whole)


def test_what_a_round_changed_is_synced_and_nothing_else(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(durable, "sync", synced.append)
    memory = ClientMemory(tmp_path)
    memory.sync()
    assert synced == []
    memory.keep("a", {"residual": ONE})
    memory.settle()
    memory.keep("b", {"residual": ONE, "local": TWO}, {"residual": TWO})
    memory.sync()
    assert sorted(synced) == [tmp_path, tmp_path / "b@local@2.safetensors", tmp_path / "b@residual@2.safetensors"]
