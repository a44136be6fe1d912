"""The fold of other sections than the adapter: plain sums over the clients, whatever the strategy is."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from fedpeft.adapters import payload
from fedpeft.adapters.adapter_file import SECTIONS, open_adapter, open_state
from fedpeft.adapters.sections import initial, with_sections
from fedpeft.adapters.spec import AdapterSpec, Section, TensorSpec
from fedpeft.config import parse_config
from fedpeft.rounds.commit import Outcome, RunHeader, Stored, Update, fold_round, roll_back, write_version
from fedpeft.rounds.record import FULL, parse, verify_chain

N = 5
TUNED = AdapterSpec("lora", (TensorSpec("x.lora_A.weight", (2, 9)), TensorSpec("x.lora_B.weight", (7, 2))))
SPEC = with_sections(TUNED, [Section("control", float(N), "float32")])
RUN = {"model": {"name": "vit_tiny_patch16_224", "classes": ["a", "b"]}, "peft": {"method": "lora"}}
Arrays = dict[str, np.ndarray]


def header(strategy: str = "fedavg", spec: AdapterSpec = SPEC) -> RunHeader:
    config = parse_config({**RUN, "aggregation": {"strategy": strategy, "norm_factor": 0}})
    return RunHeader("run-1", config, spec, "ab" * 32)


def update(client: int, number: int, tensors: Arrays, spec: AdapterSpec = SPEC) -> Update:
    manifest, data = payload.encode(tensors, spec.sent(number), "float32")
    return Update(f"t-{number}-{client}", f"c{client}", 10 * (client + 1), {}, manifest, memoryview(data))


class Run:
    """Versions folded one from the other."""

    def __init__(self, run: RunHeader, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.run, self.folder, self.records = run, folder, list[str]()
        self.paths, self.number = [folder / "0"], 0
        self.state: Stored | None = None
        start = {t.name: np.zeros(t.shape, np.float32) for t in run.spec.shared} | initial(run.spec)
        self.shas = [write_version(run, start, self.paths[0]).sha256]
        self.record_sha256 = ""

    def fold(self, updates: list[Update]) -> Outcome:
        self.number += 1
        place = self.folder / f"round-{self.number}"
        place.mkdir()
        base = Stored(self.paths[-1], self.shas[-1])
        found = fold_round(self.run, self.number, updates, base, self.state, self.record_sha256, place)
        self.keep(found, place)
        self.state = Stored(place / "state", found.state_sha256) if found.state_sha256 else None
        return found

    def keep(self, found: Outcome, place: Path) -> None:
        self.paths.append(place / "adapter")
        self.shas.append(found.made.sha256)
        self.records.append(found.record)
        self.record_sha256 = found.record_sha256

    def version(self) -> Arrays:
        with open_adapter(self.paths[-1], self.shas[-1]) as file:
            return dict(file)


@pytest.mark.parametrize("strategy", ["fedavg", "fedadam", "median", "lora_fair"])
def test_the_section_stays_the_mean_of_what_all_clients_hold(tmp_path: Path, strategy: str) -> None:
    """As SCAFFOLD's c, in rounds of some clients only; the adapter is folded as without the section."""
    run, plain = Run(header(strategy), tmp_path / "with"), Run(header(strategy, TUNED), tmp_path / "without")
    held = [initial(SPEC) for _ in range(N)]
    for number, sampled in enumerate(([0, 1, 2], [4], [3, 1], [0, 2, 3, 4]), 1):
        updates, alone = [], []
        for client in sampled:
            rng = np.random.default_rng([number, client])
            delta = {t.name: rng.standard_normal(t.shape).astype(np.float32) for t in TUNED.tensors}
            change = {name: rng.standard_normal(v.shape).astype(np.float32) for name, v in held[client].items()}
            held[client] = {name: held[client][name] + change[name] for name in change}
            updates.append(update(client, number, delta | change))
            alone.append(update(client, number, delta, TUNED))
        run.fold(updates)
        plain.fold(alone)
        version = run.version()
        for name in held[0]:
            mean = sum(each[name].astype(float) for each in held) / N
            np.testing.assert_allclose(version[name], mean, rtol=0, atol=1e-6)
        assert all(np.array_equal(version[name], values) for name, values in plain.version().items())
    verify_chain(run.records)
    if run.state is not None:
        with open_state(run.state.path) as state:
            assert {name.split("/", 1)[1] for name in state} == {t.name for t in TUNED.tensors}


def test_the_record_and_the_file_say_what_sections_there_are(tmp_path: Path) -> None:
    run = Run(header(), tmp_path)
    changes = {t.name: np.full(t.shape, 0.5, np.float32) for t in SPEC.tensors}
    found = run.fold([update(client, 1, changes) for client in (2, 0, 1)])
    record = parse(found.record)
    assert record.sections == SPEC.sections and f'"format":{FULL}' in found.record
    with open_adapter(run.paths[-1]) as file:
        assert file.info.extra[SECTIONS] == '["control"]'
        assert file.adapter().keys() == {t.name for t in TUNED.tensors}
        assert set(file["control/x.lora_A.weight"].flat) == {np.float32(3 * 0.5 / N)}
    orders = []
    for i, order in enumerate(itertools.permutations((0, 1, 2))):
        again = Run(header(), tmp_path / f"order-{i}")
        orders.append(again.fold([update(client, 1, changes) for client in order]).record_sha256)
    assert set(orders) == {found.record_sha256}


def test_a_rollback_takes_the_sections_back(tmp_path: Path) -> None:
    run = Run(header(), tmp_path)
    changes = {t.name: np.ones(t.shape, np.float32) for t in SPEC.tensors}
    run.fold([update(0, 1, changes)])
    first = run.version()
    run.fold([update(1, 2, changes)])
    place = tmp_path / "back"
    place.mkdir()
    source = Stored(run.paths[1], run.shas[1])
    run.keep(roll_back(run.run, 3, 1, source, run.shas[-1], "", run.record_sha256, place), place)
    assert all(np.array_equal(values, first[name]) for name, values in run.version().items())
    verify_chain(run.records)
    assert parse(run.records[-1]).sections == SPEC.sections


def test_a_run_without_sections_has_records_and_files_as_before(tmp_path: Path) -> None:
    run = Run(header(spec=TUNED), tmp_path)
    found = run.fold([update(0, 1, {t.name: np.ones(t.shape, np.float32) for t in TUNED.tensors}, TUNED)])
    assert "sections" not in found.record and '"format":1' in found.record
    with open_adapter(run.paths[-1]) as file:
        assert SECTIONS not in file.info.extra and file.adapter().keys() == set(file)
