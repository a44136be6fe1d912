"""A section that a part of the run declares: from its changes at the clients to the version, in a simulation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedpeft.adapters.adapter_file import open_adapter
from fedpeft.adapters.spec import Section
from fedpeft.config import RunConfig
from fedpeft.models.tasks import task_of
from fedpeft.peft import methods
from fedpeft.peft.bias import Bias
from fedpeft.rounds.record import parse
from fedpeft.simulation import simulate
from fedpeft.training import local_round
from fedpeft.training.devices import device_of
from fedpeft.training.local_round import LoadedRun, load_run
from fedpeft.training.result import TrainingResult

from ..simulation.conftest import folders as folders
from ..simulation.simulated_runs import clients, config

N = 4


@pytest.fixture
def controlled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, np.ndarray]]]:
    """A method with a section, and clients that send half of their change in it; yields the sections that came."""

    class Controlled(Bias):
        def sections(self, config: RunConfig) -> tuple[Section, ...]:
            return (Section("control", float(N), "float32"),)

    methods.names()
    methods.register("controlled")(Controlled)
    came: list[dict[str, np.ndarray]] = []
    train, put = local_round.train, LoadedRun._set

    def sending(*arguments: Any, **options: Any) -> TrainingResult:
        result = train(*arguments, **options)
        return replace(result, sections={"control": {name: each / 2 for name, each in result.delta.items()}})

    def noting(self: LoadedRun, *arguments: Any) -> dict[str, dict[str, np.ndarray]]:
        beside = put(self, *arguments)
        if beside:
            came.append(beside["control"])
        return beside

    monkeypatch.setattr(local_round, "train", sending)
    monkeypatch.setattr(LoadedRun, "_set", noting)
    yield came
    del methods._items["controlled"]


def test_a_section_goes_up_and_comes_down(
    tmp_path: Path, folders: Path, controlled: list[dict[str, np.ndarray]]
) -> None:
    rounds = {"count": 2, "clients": 2, "quorum": 2, "seed": 3}
    settings = {"rounds": rounds, "training": {"steps": 2, "batch_size": 4}}
    report = simulate(config(peft={"method": "controlled"}, **settings), clients(folders), tmp_path / "with")
    plain = simulate(config(**settings), clients(folders), tmp_path / "without")
    records = [parse(line) for line in (tmp_path / "with" / "records.jsonl").read_text().splitlines()]
    assert all(each.sections == (Section("control", 4.0, "float32"),) for each in records)
    with (
        open_adapter(tmp_path / "with" / "adapter.safetensors") as ours,
        open_adapter(tmp_path / "without" / "adapter.safetensors") as theirs,
    ):
        assert {name for name in ours if name.startswith("control/")} == {f"control/{name}" for name in theirs}
        assert all(np.array_equal(ours[name], theirs[name]) for name in theirs), "the adapter is as without the section"
        assert ours.adapter().keys() == set(theirs)
        assert any(np.abs(ours[f"control/{name}"]).max() > 1e-5 for name in theirs)
        newest = {name: ours[f"control/{name}"] for name in theirs}
    for row, alone in zip(report["rounds"], plain["rounds"], strict=True):
        assert row["payload_bytes_up"] == 2 * alone["payload_bytes_up"]
        assert row["payload_bytes_down"] == 2 * alone["payload_bytes_down"]
    assert report["adapter_parameters"] == plain["adapter_parameters"]
    assert all(not values.any() for values in controlled[0].values()), "a section begins with zeros"
    trained = controlled[2]  # after version 0 went to two clients: of the first in round 2
    assert trained.keys() == newest.keys() and any(values.any() for values in trained.values())


def test_who_creates_a_run_and_who_trains_for_it_know_the_same_spec(controlled: object) -> None:
    from fedpeft.api.initial_version import first_version

    run = config(peft={"method": "controlled"})
    first = first_version(run)
    loaded = load_run(run, task_of(""), None, device_of("cpu"))
    assert first.spec == loaded.spec != loaded.model.spec
    assert first.tensors.keys() == {tensor.name for tensor in first.spec.tensors}
    assert first.fingerprint == loaded.fingerprint
