"""Whole simulated runs of a tiny model: repeatable, the same as plain FedAvg, and honest about what goes wrong."""

import json

import numpy as np
import pytest

from fedpeft import seeds
from fedpeft.adapters import payload
from fedpeft.adapters.adapter_file import open_adapter
from fedpeft.api import views
from fedpeft.data import pixel_cache, store
from fedpeft.data.dataset import open_dataset
from fedpeft.data.transforms import Preprocessing
from fedpeft.models.backbones import build
from fedpeft.models.tasks import task_of
from fedpeft.peft import spec_of, tune
from fedpeft.privacy.events import Clipped
from fedpeft.rounds import record, state_machine
from fedpeft.simulation import clients_of, simulate
from fedpeft.simulation.clients import ClientData
from fedpeft.training import local_round
from fedpeft.training.evaluation import evaluate
from fedpeft.training.loop import train
from fedpeft.v1 import run_pb2

from ..data.test_sources import NAMES, table, write
from .simulated_runs import clients, config, same, tensors, without_clock


def test_a_repetition_has_the_same_bytes_whatever_the_order_of_clients(tmp_path, folders):
    settings = config(codec={"up": "sparse", "density": 0.2}, aggregation={"strategy": "fedadam"})
    names = clients(folders)
    first = simulate(settings, names, tmp_path / "first")
    second = simulate(settings, dict(reversed(names.items())), tmp_path / "second")
    assert without_clock(first) == without_clock(second)
    for file in ("adapter.safetensors", "records.jsonl"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()
    assert json.loads((tmp_path / "first" / "report.json").read_text()) == first
    assert sorted(p.name for p in (tmp_path / "first").iterdir()) == [
        "adapter.safetensors",
        "records.jsonl",
        "report.json",
    ]
    other = settings.model_copy(update={"rounds": settings.rounds.model_copy(update={"seed": 8})})
    simulate(other, names, tmp_path / "other")
    assert not same(tensors(tmp_path / "first")[1], tensors(tmp_path / "other")[1])


def test_the_norm_of_an_update_is_measured_once(tmp_path, folders, monkeypatch):
    measured = []
    for name in ("squared_norm", "checked_squared_norm"):
        measure = getattr(payload, name)

        def counted(manifest, data, release=None, measure=measure):
            measured.append(manifest.sha256)
            return measure(manifest, data, release)

        monkeypatch.setattr(payload, name, counted)
    simulate(config(), clients(folders), tmp_path)
    assert len(measured) == len(set(measured)) == 2 * 3


@pytest.mark.parametrize("method", ["bias", "lora", "vera"])
def test_it_is_plain_fedavg_bit_for_bit(tmp_path, folders, method):
    settings, names = config(method, rounds={"count": 3, "clients": 4, "seed": 7}), clients(folders)
    report = simulate(settings, names, tmp_path, evaluate=folders / "client-0")
    # The same with a model of its own for each client, and the mean written out.
    backbones = {name: build(settings.model, 7) for name in names}
    models = {name: tune(backbone, method, {}, 7) for name, backbone in backbones.items()}
    inputs = Preprocessing.of(backbones["client-0"])
    data = {name: open_dataset(path, NAMES, inputs) for name, path in names.items()}
    adapter = models["client-0"].state()
    scores = []
    for number in (1, 2, 3):
        deltas = {}
        for name, model in models.items():
            model.load(adapter)
            seed = seeds.training(7, number, name)
            deltas[name] = train(task_of(""), model, data[name], settings.training, seed, number)
        total = sum(d.examples for d in deltas.values())
        for key, base in adapter.items():
            mean = np.zeros(base.shape)
            for name in sorted(deltas):
                mean += deltas[name].delta[key].astype(np.float64) * float(deltas[name].examples)
            adapter[key] = (base.astype(np.float64) + 1.0 * (mean / total)).astype(np.float32)
        models["client-0"].load(adapter)
        scores.append(evaluate(task_of(""), models["client-0"], data["client-0"])["accuracy"])
    info, found = tensors(tmp_path)
    assert same(found, adapter)
    assert (info.run, info.version, info.method) == ("simulation", 3, method)
    assert [row["metrics"]["accuracy"] for row in report["rounds"]] == scores
    assert report["rounds"][0]["tickets"][0]["weight"] == len(data["client-0"]) / 48
    assert "accuracy" in report["initial_metrics"]
    assert report["state"] == "completed"
    assert report["facts"]["threads"] == "1"


def test_what_a_client_trains_does_not_depend_on_what_is_kept_open(tmp_path, folders, monkeypatch):
    opened = []
    real = ClientData.open

    def counted(self, data, who):
        opened.append(who)
        return real(self, data, who)

    monkeypatch.setattr(ClientData, "open", counted)
    settings, names = config(rounds={"count": 3, "clients": 4}), clients(folders)
    simulate(settings, names, tmp_path / "kept")
    assert sorted(opened) == [f"client {name}" for name in names]
    opened.clear()
    monkeypatch.setattr(ClientData.__init__, "__defaults__", (1,))
    simulate(settings, names, tmp_path / "not")
    assert 9 < len(opened) <= 12  # the last of a round may be the first of the next
    assert same(tensors(tmp_path / "kept")[1], tensors(tmp_path / "not")[1])


def test_each_round_samples_some_of_all_as_a_server_would(tmp_path, folders):
    settings = config(rounds={"count": 4, "clients": 2, "seed": 11})
    report = simulate(settings, clients(folders), tmp_path)
    names = sorted(clients(folders))
    for row in report["rounds"]:
        assert row["clients"] == state_machine.sample(names, 2, 11, row["version"])
        assert [t["state"] for t in row["tickets"]] == ["received", "received"]
    assert len({tuple(row["clients"]) for row in report["rounds"]}) > 1
    assert report["rounds"][0]["tickets"][0]["ticket"] == state_machine.ticket_id(
        "simulation", 1, report["rounds"][0]["clients"][0]
    )


def test_sparse_updates_with_error_feedback_are_smaller_and_the_residual_is_added(tmp_path, folders, monkeypatch):
    names = clients(folders)
    residuals = []
    real = local_round.prepare

    def watched(delta, residual, specs, *arguments):
        update = real(delta, residual, specs, *arguments)
        sent = payload.decode(update.manifest, memoryview(update.payload))
        for spec in specs:
            target = delta[spec.name] + residual.get(spec.name, np.float32(0))
            left = update.residual_if_counted.get(spec.name, np.float32(0))
            assert np.array_equal(sent[spec.name] + left, target)
        residuals.append(sum(float(np.abs(r).sum()) for r in residual.values()))
        return update

    monkeypatch.setattr(local_round, "prepare", watched)
    settings = config(codec={"up": "sparse", "density": 0.05}, rounds={"count": 3, "clients": 4})
    report = simulate(settings, names, tmp_path / "sparse")
    assert residuals[:4] == [0.0] * 4
    assert min(residuals[4:]) > 0
    dense = simulate(config(rounds={"count": 3, "clients": 4}), names, tmp_path / "dense")
    size = 4 * dense["adapter_parameters"] * 4
    for small, large in zip(report["rounds"], dense["rounds"], strict=True):
        assert large["payload_bytes_up"] == large["payload_bytes_down"] == size
        assert small["payload_bytes_down"] == size
        assert 0 < small["payload_bytes_up"] < size / 10
        assert small["payload_bytes_up"] == sum(t["payload_bytes_up"] for t in small["tickets"])
    # Without feedback the runs part as soon as there is something left over.
    deaf = config(codec={"up": "sparse", "density": 0.05, "error_feedback": False}, rounds={"count": 3, "clients": 4})
    monkeypatch.setattr(local_round, "prepare", real)
    simulate(deaf, names, tmp_path / "deaf")
    assert not same(tensors(tmp_path / "sparse")[1], tensors(tmp_path / "deaf")[1])


def test_records_are_a_chain_that_names_what_was_folded(tmp_path, folders):
    settings = config(aggregation={"strategy": "fedavgm"}, rounds={"count": 3, "clients": 2})
    report = simulate(settings, clients(folders), tmp_path, run="run-0123456789ab")
    lines = (tmp_path / "records.jsonl").read_text().splitlines()
    record.verify_chain(lines)
    last = record.parse(lines[-1])
    assert last.run == "run-0123456789ab"
    assert last.state_sha256
    with open_adapter(tmp_path / "adapter.safetensors", last.adapter_sha256) as file:
        assert file.info.version == 3
    assert [row["record_sha256"] for row in report["rounds"]] == [record.digest(line) for line in lines]
    assert [c.sha256 for c in last.contributions] == [t["payload_sha256"] for t in report["rounds"][-1]["tickets"]]


def test_the_report_has_the_keys_of_run_show(tmp_path, folders):
    report = simulate(config(), clients(folders), tmp_path)
    run = run_pb2.Run()
    shown = views.run_json(run, [], None)
    assert report.keys() - shown.keys() == {"partition", "overlap", "facts", "seconds", "squared_distances"}
    assert shown.keys() <= report.keys()
    row = views.round_json(run_pb2.Round(tickets=[run_pb2.Ticket()]), run)
    assert report["rounds"][0].keys() == row.keys()
    assert report["rounds"][0]["tickets"][0].keys() == row["tickets"][0].keys()
    for holder in (report["rounds"][0], report["rounds"][0]["tickets"][0]):
        assert holder["wire_bytes_up"] is None
        assert holder["wire_bytes_down"] is None


def test_what_is_encoded_on_the_way_down_is_what_clients_start_from(tmp_path, folders):
    names = clients(folders)
    half = simulate(config(codec={"down": "bfloat16"}), names, tmp_path / "half")
    simulate(config(), names, tmp_path / "full")
    assert half["rounds"][0]["payload_bytes_down"] * 2 == half["rounds"][0]["payload_bytes_up"]
    assert not same(tensors(tmp_path / "half")[1], tensors(tmp_path / "full")[1])


def test_a_tensor_that_no_round_changed_is_not_sent_again(tmp_path, folders):
    """Each client gets all of its first version, and then what rounds changed since the last that it held."""
    rounds = {"count": 5, "clients": 2, "quorum": 2, "seed": 3}
    run = config(rounds=rounds, peft={"method": "rolora", "rank": 2}, training={"steps": 1, "batch_size": 2})
    report = simulate(run, clients(folders), tmp_path / "out")
    spec = spec_of(run.model, "rolora", {"rank": 2})
    holds, missed = dict[str, int](), 0
    for number, row in enumerate(report["rounds"], 1):
        down = 0
        for client in row["clients"]:
            have = holds.get(client)
            down += sum(4 * t.size for t in (spec.shared if have is None else spec.changed(have, number - 1)))
            missed += have is not None and have < number - 2
            holds[client] = number - 1
        assert row["payload_bytes_down"] == down
        assert row["payload_bytes_up"] == 2 * sum(4 * t.size for t in spec.sent(number))
    assert missed, "the seed lets no client miss a round"
    assert spec.changed(1, 3) == spec.shared


def test_clipped_updates_are_within_the_bound_and_say_by_how_much(tmp_path, folders):
    sections = {"codec": {"up": "float16"}, "privacy": {"clip_norm": 0.01}}
    report = simulate(config(**sections), clients(folders), tmp_path / "out")
    plain = simulate(config(codec={"up": "float16"}), clients(folders), tmp_path / "plain")
    assert report["state"] == "completed"
    records = [record.parse(line) for line in (tmp_path / "out" / "records.jsonl").read_text().splitlines()]
    for number, row in enumerate(report["rounds"], 1):
        norms = [ticket["update_norm"] for ticket in row["tickets"]]
        assert all(0.0099 < norm <= 0.01 for norm in norms)
        assert row["metrics"]["clipped_updates"] == len(norms) == 3
        assert row["events"] == [{"kind": "clipped", "bound": 0.01, "count": 3}]
        assert record.ledger(records)[number - 1] == (number, Clipped(0.01, 3))
    first = {t["client"]: t for t in plain["rounds"][0]["tickets"]}
    for ticket in report["rounds"][0]["tickets"]:  # both trained from version 0
        factor = 0.01 / first[ticket["client"]]["update_norm"]
        assert ticket["metrics"]["clip_factor"] == pytest.approx(factor, rel=1e-2)
    assert "events" not in plain["rounds"][0] and "clip_factor" not in plain["rounds"][0]["tickets"][0]["metrics"]


def test_a_second_simulation_decodes_nothing_and_has_the_same_bits(tmp_path, monkeypatch):
    whole = write(tmp_path / "whole.parquet", table(40))
    real, decoded = store.decode_rows, []
    monkeypatch.setattr(store, "decode_rows", lambda *arguments: decoded.append(1) or real(*arguments))
    run = config(simulation={"clients": 3})
    for name, place in (("plain", "off"), ("first", str(tmp_path / "cache")), ("second", str(tmp_path / "cache"))):
        monkeypatch.setenv("FEDPEFT_PIXEL_CACHE", place)
        decoded.clear()
        simulate(run, clients_of(whole, run)[0], tmp_path / name, evaluate=whole)
        assert (len(decoded) == 0) == (name == "second")
        for file in ("adapter.safetensors", "records.jsonl"):
            assert (tmp_path / name / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()


NOTED_DIGESTS = """
from fedpeft.data import contents, pixel_cache


def noted(source):
    with open({file!r}, "a") as file:
        file.write("known\\n" if source in contents._images else "read\\n")
    return contents.images_digest(source)


pixel_cache.images_digest = noted
"""


def test_worker_processes_read_no_image_for_a_name_that_is_known_here(tmp_path, monkeypatch):
    """Each would read all images of the data set for the few that it trains on."""
    whole = write(tmp_path / "whole.parquet", table(40))
    monkeypatch.setenv("FEDPEFT_PIXEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pixel_cache, "images_digest", pixel_cache.images_digest)
    module = tmp_path / "noted_digests.py"
    module.write_text(NOTED_DIGESTS.format(file=str(tmp_path / "digests")))
    monkeypatch.setenv("FEDPEFT_IMPORT", str(module))
    run = config(simulation={"clients": 3, "engine": "processes", "workers": 2})
    simulate(run, clients_of(whole, run)[0], tmp_path / "out")
    assert len(list((tmp_path / "cache").iterdir())) == 1, "the workers kept pixels"
    assert (tmp_path / "digests").read_text() == "known\nknown\n"
