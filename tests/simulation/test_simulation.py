"""Whole simulated runs of a tiny model: repeatable, the same as plain FedAvg, and honest about what goes wrong."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from fedpeft import seeds
from fedpeft.adapters import payload
from fedpeft.adapters.adapter_file import open_adapter
from fedpeft.api import views
from fedpeft.config import load_run_file
from fedpeft.data import partitions
from fedpeft.data.dataset import open_dataset
from fedpeft.data.partition_writer import write_parts
from fedpeft.data.sources.opening import open_source
from fedpeft.data.transforms import Preprocessing
from fedpeft.errors import ConfigInvalid, DataInvalid, SettingsInvalid, StateInvalid
from fedpeft.models.backbones import build
from fedpeft.models.tasks import task_of
from fedpeft.peft import spec_of, tune
from fedpeft.privacy.events import Clipped
from fedpeft.rounds import conduct, record, state_machine
from fedpeft.rounds.commit import RoundEmptied
from fedpeft.simulation import clients_of, simulate
from fedpeft.simulation.clients import ClientData, reading_of
from fedpeft.simulation.versions import Versions
from fedpeft.training import local_round
from fedpeft.training.evaluation import evaluate
from fedpeft.training.loop import train
from fedpeft.v1 import run_pb2

from ..data.test_sources import NAMES, table, write
from .simulated_runs import clients, config, failing, same, tensors, without_clock


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Four clients of different sizes, as `fedpeft partition` writes them."""
    root = tmp_path_factory.mktemp("data")
    whole = write(root / "whole.parquet", table(48))
    cut = partitions.dirichlet(open_source(whole).labels, 4, 1.0, 3)
    write_parts(whole, cut, root / "parts")
    return root / "parts"


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


@pytest.mark.parametrize("method", ["bias", "lora"])
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

    def watched(delta, residual, specs, codec, transforms):
        update = real(delta, residual, specs, codec, transforms)
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


def test_a_partition_of_one_data_set_is_what_fedpeft_partition_writes(tmp_path):
    whole = write(tmp_path / "whole.parquet", table(60))
    settings = config(simulation={"clients": 4, "partition": "dirichlet", "alpha": 0.5})
    inside, about = clients_of(whole, settings)
    cut = partitions.dirichlet(open_source(whole).labels, 4, 0.5, 7)
    written = write_parts(whole, cut, tmp_path / "parts")
    assert about["digest"] == written["digest"]
    assert about["skew"] == written["skew"]
    assert about["skew"]["total_variation"] > 0.1
    assert {name: len(source) for name, source in inside.items()} == {
        c["name"]: c["examples"] for c in written["clients"]
    }
    report = simulate(settings, inside, tmp_path / "inside", partition=about)
    outside, nothing = clients_of(tmp_path / "parts", settings)
    assert nothing is None
    assert sorted(outside) == sorted(inside) == ["client-0", "client-1", "client-2", "client-3"]
    simulate(settings, outside, tmp_path / "outside")
    assert same(tensors(tmp_path / "inside")[1], tensors(tmp_path / "outside")[1])
    assert report["partition"]["variant"] == "dirichlet/class-first"
    write_parts(whole, cut, tmp_path / "indexed", index=True)
    simulate(settings, clients_of(tmp_path / "indexed", settings)[0], tmp_path / "by-index")
    assert same(tensors(tmp_path / "inside")[1], tensors(tmp_path / "by-index")[1])


@pytest.mark.parametrize(
    ("simulation", "sizes"),
    [
        ({"clients": 7}, {f"client-{k}": n for k, n in enumerate([9, 9, 9, 9, 8, 8, 8])}),
        ({"column": "vendor"}, {"v0": 30, "v1": 30}),
    ],
)
def test_other_partitions(tmp_path, simulation, sizes):
    whole = write(tmp_path / "whole.parquet", table(60))
    found, _ = clients_of(whole, config(simulation=simulation))
    assert {name: len(source) for name, source in found.items()} == sizes
    skewed, about = clients_of(whole, config(simulation={"clients": 3, "partition": "quantity", "alpha": 0.5}))
    assert sum(map(len, skewed.values())) == 60
    assert about["skew"]["gini"] > 0


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
    assert report.keys() - shown.keys() == {"partition", "overlap", "facts", "seconds"}
    assert shown.keys() <= report.keys()
    row = views.round_json(run_pb2.Round(tickets=[run_pb2.Ticket()]), run)
    assert report["rounds"][0].keys() == row.keys()
    assert report["rounds"][0]["tickets"][0].keys() == row["tickets"][0].keys()
    for holder in (report["rounds"][0], report["rounds"][0]["tickets"][0]):
        assert holder["wire_bytes_up"] is None
        assert holder["wire_bytes_down"] is None


def test_a_client_that_trains_in_vain_is_replaced(tmp_path, folders, monkeypatch):
    settings, names = config(rounds={"count": 1, "clients": 2, "seed": 11}), clients(folders)
    first, second = state_machine.sample(names, 2, 11, 1)
    failing(monkeypatch, {first})
    row = simulate(settings, names, tmp_path)["rounds"][0]
    assert len(row["clients"]) == 2
    assert second in row["clients"]
    given_up = next(t for t in row["tickets"] if t["client"] == first)
    assert given_up["state"] == "withdrawn"
    assert given_up["reason"].startswith("TRAINING_FAILED: the loss is nan")
    assert (given_up["examples"], given_up["weight"], given_up["payload_bytes_up"]) == (0, 0.0, 0)
    assert given_up["payload_bytes_down"] > 0


def test_a_quorum_is_enough_and_less_pauses_the_run(tmp_path, folders, monkeypatch):
    names = clients(folders)
    failing(monkeypatch, {"client-1"}, {2})
    enough = config(rounds={"count": 2, "clients": 4, "quorum": 3})
    all_four = config(rounds={"count": 3, "clients": 4, "quorum": 4, "max_extensions": 2})
    report = simulate(enough, names, tmp_path / "enough")
    assert [len(row["clients"]) for row in report["rounds"]] == [4, 3]
    report = simulate(all_four, names, tmp_path / "paused")
    assert (report["state"], report["version"], report["round"]) == ("paused", 1, 2)
    assert report["reason"] == ("round 2 has 3 of the 4 updates it needs after 2 extensions; still awaited: nobody")
    progress = report["in_progress"]
    assert progress.keys() == views.progress_json(run_pb2.Round()).keys()
    assert (progress["extensions"], len(progress["received"])) == (2, 3)
    assert tensors(tmp_path / "paused")[0].version == 1


def test_a_run_that_says_no_quorum_goes_on_without_one_of_its_clients_as_a_server_does(tmp_path, folders, monkeypatch):
    names = clients(folders)
    report = simulate(config(rounds={"count": 2, "clients": 5}), names, tmp_path / "missing")
    assert [len(row["clients"]) for row in report["rounds"]] == [4, 4]
    failing(monkeypatch, {"client-1"}, {2})
    report = simulate(config(rounds={"count": 2, "clients": 4}), names, tmp_path / "fails")
    assert [len(row["clients"]) for row in report["rounds"]] == [4, 3]


def test_who_is_late_is_drawn_from_the_seed_and_keeps_the_update_for_later(tmp_path, folders, monkeypatch):
    kept = {}
    real = local_round.prepare

    def watched(delta, residual, specs, codec, transforms):
        kept.setdefault("residuals", []).append(bool(residual))
        return real(delta, residual, specs, codec, transforms)

    monkeypatch.setattr(local_round, "prepare", watched)
    over = {"count": 6, "clients": 2, "over_selection": 1.0}
    report = simulate(config(rounds=over), clients(folders), tmp_path / "feedback")
    late = [{t["client"] for t in row["tickets"] if t["state"] == "late"} for row in report["rounds"]]
    assert [len(names) for names in late] == [2] * 6
    assert len(set(map(frozenset, late))) > 1
    # Who was late has all of that update in its residual, dense or not.
    assert kept["residuals"][:4] == [False] * 4
    assert sum(kept["residuals"][4:8]) == 2
    deaf = config(rounds=over, codec={"error_feedback": False})
    kept.clear()
    report = simulate(deaf, clients(folders), tmp_path / "deaf")
    assert len(kept["residuals"]) == 12
    assert all(t["payload_bytes_down"] > 0 for row in report["rounds"] for t in row["tickets"])


def test_an_update_that_is_wrong_is_refused_and_its_residual_dropped(tmp_path, folders, monkeypatch):
    names, real = clients(folders), local_round.prepare
    calls: list[bool] = []

    def spoiled(delta, residual, specs, codec, transforms):
        update = real(delta, residual, specs, codec, transforms)
        calls.append(bool(residual))
        if len(calls) == 5:
            wrong = bytearray(update.payload)
            wrong[-4:] = np.float32(np.nan).tobytes()
            object.__setattr__(update, "payload", bytes(wrong))
        return update

    monkeypatch.setattr(local_round, "prepare", spoiled)
    settings = config(rounds={"count": 3, "clients": 4, "quorum": 3}, codec={"up": "sparse", "density": 0.1})
    report = simulate(settings, names, tmp_path)
    (refused,) = [t for t in report["rounds"][1]["tickets"] if t["state"] == "refused"]
    assert refused["reason"].startswith("PAYLOAD_INVALID: tensor")
    assert refused["payload_bytes_up"] > 0
    assert [len(row["clients"]) for row in report["rounds"]] == [4, 3, 4]
    assert sorted(calls[8:]) == [False, True, True, True]


def test_what_is_encoded_on_the_way_down_is_what_clients_start_from(tmp_path, folders):
    names = clients(folders)
    half = simulate(config(codec={"down": "bfloat16"}), names, tmp_path / "half")
    simulate(config(), names, tmp_path / "full")
    assert half["rounds"][0]["payload_bytes_down"] * 2 == half["rounds"][0]["payload_bytes_up"]
    assert not same(tensors(tmp_path / "half")[1], tensors(tmp_path / "full")[1])


def test_a_second_simulation_in_one_folder_is_refused_and_the_first_is_unharmed(tmp_path, folders):
    names, out = clients(folders), tmp_path / "out"
    (tmp_path / "link").symlink_to(out)
    (out).mkdir()
    (out / ".lock").write_text("1")  # of a process that was killed
    refusals = []

    def another(_row):
        for place in (out, tmp_path / "link"):
            with pytest.raises(
                StateInvalid, match=rf"is in use by another simulation \(process {os.getpid()}\)"
            ) as told:
                simulate(config(), names, place)
            refusals.append(told)

    report = simulate(config(), names, out, committed=another)
    assert len(refusals) == 2 * len(report["rounds"])
    assert report["state"] == "completed"
    assert len((out / "records.jsonl").read_text().splitlines()) == len(report["rounds"])
    assert sorted(p.name for p in out.iterdir()) == ["adapter.safetensors", "records.jsonl", "report.json"]
    again = simulate(config(), names, out)
    assert without_clock(again) == without_clock(report)


def test_what_cannot_be_simulated_is_said_at_once(tmp_path, folders):
    names = clients(folders)
    with pytest.raises(ConfigInvalid, match=r"a round needs 5 clients .* and there are 4"):
        simulate(config(rounds={"clients": 6}), names, tmp_path)
    with pytest.raises(DataInvalid, match="client name 'a/b' is not"):
        simulate(config(), {"a/b": folders / "client-0"}, tmp_path)
    with pytest.raises(SettingsInvalid, match=r"there is no device cuda:\d+"):
        simulate(config(), names, tmp_path, device="cuda:99")
    with pytest.raises(SettingsInvalid, match="there is no device 'abacus'"):
        simulate(config(), names, tmp_path, device="abacus")
    whole = write(tmp_path / "whole.parquet", table(12))
    with pytest.raises(ConfigInvalid, match=r"no \[simulation\] section"):
        clients_of(whole, config())
    with pytest.raises(DataInvalid, match=r"there is no data at .*nowhere"):
        clients_of(tmp_path / "nowhere", config())
    odd = write(tmp_path / "odd" / "data.parquet", table(6, names=("cat", "dog", "yak")))
    with pytest.raises(DataInvalid, match=r"client odd: class 'yak' \(2 rows\) is not among the run's"):
        simulate(config(rounds={"count": 1, "clients": 1}), {"odd": odd}, tmp_path / "out")
    hollow = tmp_path / "hollow"
    hollow.mkdir()
    shutil.copy(folders / "partition.json", hollow)
    with pytest.raises(DataInvalid, match=r"has a partition\.json and no client"):
        clients_of(hollow, config())


def test_a_run_file_takes_only_one_scheme():
    with pytest.raises(ConfigInvalid, match="partition natural needs column"):
        config(simulation={"partition": "natural"})
    with pytest.raises(ConfigInvalid, match="column 'vendor' is for partition natural, not iid"):
        config(simulation={"partition": "iid", "column": "vendor"})


def test_the_run_file_of_the_page_is_valid(tmp_path):
    page = Path(__file__).resolve().parents[2] / "docs" / "simulate.md"
    (example,) = re.findall(r"^```toml\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)
    (tmp_path / "small.toml").write_text(example)
    settings = load_run_file(tmp_path / "small.toml")
    assert (settings.simulation.clients, settings.simulation.scheme) == (16, "dirichlet")


@pytest.mark.parametrize("said", ["in the run file", "by the caller"])
def test_columns_are_named_for_all_data_of_a_simulation(tmp_path, said):
    usual = write(tmp_path / "usual.parquet", table(60))
    odd = write(tmp_path / "odd.parquet", table(60, label="fine_label", image="photo"))
    plain = config(simulation={"clients": 3})
    simulate(plain, clients_of(usual, plain)[0], tmp_path / "plain", usual)
    with pytest.raises(DataInvalid, match=r"no image column 'image' or 'img'.*photo, fine_label.*--image-column"):
        clients_of(odd, plain)
    columns = {"image_column": "photo", "label_column": "fine_label"}
    settings = config(simulation={"clients": 3, **(columns if said == "in the run file" else {})})
    reading = None if said == "in the run file" else reading_of(settings, **columns)
    simulate(settings, clients_of(odd, settings, reading)[0], tmp_path / "odd", odd, reading=reading)
    assert same(tensors(tmp_path / "plain")[1], tensors(tmp_path / "odd")[1])
    cut = partitions.iid(60, 3, 7)
    write_parts(odd, cut, tmp_path / "parts", image="photo", label="fine_label")
    simulate(settings, clients_of(tmp_path / "parts", settings)[0], tmp_path / "written", odd, reading=reading)
    assert same(tensors(tmp_path / "plain")[1], tensors(tmp_path / "written")[1])


def test_a_limit_of_pixels_is_followed(tmp_path):
    whole = write(tmp_path / "whole.parquet", table(60))
    settings = config(simulation={"clients": 3, "max_image_pixels": 15})
    with pytest.raises(DataInvalid, match="4 x 4 pixels, more than 15 pixels; --max-image-pixels"):
        simulate(settings, clients_of(whole, settings)[0], tmp_path / "out")


def test_a_client_that_did_not_deliver_is_sampled_last_as_on_a_server(tmp_path, folders, monkeypatch):
    settings, names = config(rounds={"count": 6, "clients": 2, "seed": 11}), clients(folders)
    first, _ = state_machine.sample(names, 2, 11, 1)
    failing(monkeypatch, {first})
    sampled = [{t["client"] for t in row["tickets"]} for row in simulate(settings, names, tmp_path)["rounds"]]
    assert first in sampled[0]
    assert all(first not in clients for clients in sampled[1 : 1 + conduct.REST_ROUNDS])


def test_a_client_whose_updates_are_refused_again_and_again_is_set_aside(tmp_path, folders, monkeypatch):
    settings, names = config(rounds={"count": 5, "clients": 4, "quorum": 3, "seed": 1}), clients(folders)
    real = local_round.LoadedRun.train

    def spoiled(self, job, *arguments, **options):
        trained = real(self, job, *arguments, **options)
        if job.client == "client-1":
            nan = np.float32(np.nan).tobytes()
            object.__setattr__(trained.prepared, "payload", trained.prepared.payload[:-4] + nan)
        return trained

    monkeypatch.setattr(local_round.LoadedRun, "train", spoiled)
    report = simulate(settings, names, tmp_path)
    states = [next(t["state"] for t in row["tickets"] if t["client"] == "client-1") for row in report["rounds"]]
    assert states == ["refused"] * 5
    assert report["set_aside"] == ["client-1"]


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


def test_a_late_client_trains_once_though_its_round_is_folded_twice(tmp_path, folders, monkeypatch):
    real, trained = Versions.fold, []
    emptied = []

    def empty_at_first(self, book):
        if not emptied:
            emptied.extend(ticket.client for ticket, _ in book.counted)
            raise RoundEmptied({ticket.id: "too large" for ticket, _ in book.counted})
        real(self, book)

    train = local_round.LoadedRun.train

    def counted(self, job, *arguments, **options):
        trained.append(job.client)
        return train(self, job, *arguments, **options)

    monkeypatch.setattr(Versions, "fold", empty_at_first)
    monkeypatch.setattr(local_round.LoadedRun, "train", counted)
    settings = config(rounds={"count": 1, "clients": 2, "over_selection": 0.5, "quorum": 1})
    report = simulate(settings, clients(folders), tmp_path)
    states = {ticket["client"]: ticket["state"] for ticket in report["rounds"][0]["tickets"]}
    assert sorted(states.values()) == ["late", "received", "refused", "refused"]
    assert all(states[client] == "refused" for client in emptied)
    assert sorted(trained) == sorted(states)


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
