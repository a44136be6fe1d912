"""Buffered rounds in a simulation: a clock of the seed says whose update is next, whatever computes it."""

import numpy as np
import pytest

from fedpeft.rounds import record
from fedpeft.rounds.state_machine import sample
from fedpeft.simulation import clients_of, simulate
from fedpeft.simulation.at_work import duration

from ..data.test_sources import table, write
from .simulated_runs import config, failing, same, tensors, without_clock

pytestmark = pytest.mark.usefixtures("preloaded")
SEED = 5


@pytest.fixture
def whole(tmp_path):
    return write(tmp_path / "whole.parquet", table(60))


def run_file(engine="inprocess", simulated=6, codec=None, **rounds):
    rounds = {"policy": "buffered", "count": 6, "clients": 2, "concurrency": 4, "seed": SEED, "quorum": 1, **rounds}
    return config(
        rounds=rounds,
        aggregation={"strategy": "fedbuff"},
        codec=codec or {},
        simulation={"clients": simulated, "engine": engine, **({"workers": 2} if engine != "inprocess" else {})},
    )


def held(run, whole, out):
    report = simulate(run, clients_of(whole, run)[0], out)
    return report, [record.parse(line) for line in (out / "records.jsonl").read_text().splitlines()]


def expected(names, count, goal, concurrency):
    """Returns, by version, the time of its commit and the staleness of each client in it: no round is held here."""
    now, at_work, versions = 0.0, {}, []
    for number in range(1, count + 1):
        received = {}
        while len(received) < goal:
            free = set(names) - at_work.keys() - received.keys()
            for client in sample(free, concurrency - len(at_work), SEED, number):
                at_work[client] = now + duration(SEED, number, client), number
            first = min(at_work, key=lambda client: (at_work[client][0], client))
            now, issued = at_work.pop(first)
            received[first] = number - issued
        versions.append((now, received))
    return versions


def test_updates_count_in_the_order_of_the_clock_with_the_staleness_that_it_gives_them(tmp_path, whole):
    run = run_file()
    report, records = held(run, whole, tmp_path / "out")
    names = [f"client-{k}" for k in range(6)]
    versions = expected(names, 6, 2, 4)
    assert [{c.client: c.staleness for c in each.contributions} for each in records] == [who for _, who in versions]
    assert report["clock"] == [now for now, _ in versions]
    assert report["state"] == "completed"
    stale = [c.staleness for each in records for c in each.contributions]
    assert max(stale) > 0
    for each in records:
        weights = [(1 + c.staleness) ** -0.5 for c in each.contributions]
        assert [c.weight for c in each.contributions] == pytest.approx(weights)
    assert [sorted(row["clients"]) for row in report["rounds"]] == [sorted(who) for _, who in versions]
    again, _ = held(run, whole, tmp_path / "again")
    assert without_clock(again) == without_clock(report)


def test_processes_make_the_same_bits_with_residuals_and_updates_that_are_too_stale(tmp_path, whole):
    reports = {}
    for engine in ("inprocess", "processes"):
        run = run_file(engine, max_staleness=1, codec={"up": "sparse", "density": 0.1, "values": "float16"})
        reports[engine], _ = held(run, whole, tmp_path / engine)
    assert without_clock(reports["inprocess"]) == without_clock(reports["processes"])
    states = [t["state"] for row in reports["processes"]["rounds"] for t in row["tickets"]]
    assert "late" in states and "received" in states
    for file in ("adapter.safetensors", "records.jsonl"):
        assert (tmp_path / "inprocess" / file).read_bytes() == (tmp_path / "processes" / file).read_bytes()


def test_one_client_at_a_time_and_a_buffer_of_one_is_a_synchronous_run(tmp_path, whole):
    buffered = run_file(clients=1, concurrency=1)
    synchronous = buffered.model_copy(
        update={"rounds": buffered.rounds.model_copy(update={"policy": None, "concurrency": None})}
    )
    first, _ = held(buffered, whole, tmp_path / "buffered")
    second, records = held(synchronous, whole, tmp_path / "synchronous")
    assert [row["clients"] for row in first["rounds"]] == [row["clients"] for row in second["rounds"]]
    assert same(tensors(tmp_path / "buffered")[1], tensors(tmp_path / "synchronous")[1])
    assert "clock" in first and "clock" not in second
    assert all(c.staleness == 0 for each in records for c in each.contributions)


def test_an_update_starts_from_the_version_that_its_client_pulled(tmp_path, whole, monkeypatch):
    """The first two versions are made of updates to version 0: their sum is what two trainings from it change."""
    from fedpeft.training import local_round

    real, started = local_round.LoadedRun.train, {}

    def watched(self, job, *arguments, **options):
        started[job.client, job.round] = job.version.tensors()
        return real(self, job, *arguments, **options)

    monkeypatch.setattr(local_round.LoadedRun, "train", watched)
    run = run_file(count=4)
    versions = {}

    def committed(row):
        versions[row["version"]] = tensors(tmp_path / "out")[1]

    simulate(run, clients_of(whole, run)[0], tmp_path / "out", committed=committed)
    assert {number for _, number in started} > {1}
    for (_, number), begun in started.items():
        if number > 1:
            assert same(begun, versions[number - 1])
    # Four at once, and the one that took the first place that became free.
    zero = [begun for (_, number), begun in started.items() if number == 1]
    assert len(zero) == 5 and all(same(zero[0], each) for each in zero)
    assert not any(np.array_equal(zero[0][name], versions[1][name]) for name in zero[0])


def test_a_client_that_trains_in_vain_makes_room_for_another(tmp_path, whole, monkeypatch):
    failing(monkeypatch, {"client-0", "client-1"})
    report, records = held(run_file(), whole, tmp_path / "out")
    assert report["state"] == "completed"
    assert "withdrawn" in [t["state"] for row in report["rounds"] for t in row["tickets"]]
    assert not {"client-0", "client-1"} & {c.client for each in records for c in each.contributions}


def test_durations_are_half_normal_and_of_the_seed():
    drawn = [duration(SEED, number, f"client-{client}") for number in range(100) for client in range(40)]
    assert min(drawn) >= 0
    assert np.mean(drawn) == pytest.approx((2 / np.pi) ** 0.5, rel=0.05)
    assert np.mean(np.square(drawn)) == pytest.approx(1, rel=0.08)
    assert duration(SEED, 1, "client-0") == drawn[40]
    assert duration(SEED + 1, 1, "client-0") != drawn[40]
