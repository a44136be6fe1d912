"""Inputs of a simulation: folders of clients, partitions of one data set, columns, and what is refused at once."""

import os
import re
import shutil
from pathlib import Path

import pyarrow as pa
import pytest

from fedpeft.config import load_run_file
from fedpeft.data import partitions
from fedpeft.data.division import drawn_rows
from fedpeft.data.partition_writer import write_parts
from fedpeft.data.sources.opening import open_source
from fedpeft.errors import ConfigInvalid, DataInvalid, SettingsInvalid, StateInvalid
from fedpeft.simulation import clients_of, simulate
from fedpeft.simulation.clients import reading_of
from fedpeft.simulation.local_trainer import HELD_OUT_SEED

from ..data.test_sources import NAMES, table, write
from .simulated_runs import clients, config, same, tensors, without_clock


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
    some, about = clients_of(whole, config(simulation={"clients": 3, "partition": "shards", "examples": 30}))
    assert [len(source) for source in some.values()] == [10, 10, 10]
    assert (about["variant"], about["rows"]) == ("shards/2", 30)
    assert about["classes"] == list(NAMES)
    for name, source in some.items():
        assert about["histogram"][name] == [int((source.labels == k).sum()) for k in range(3)]


def test_versions_are_scored_on_so_many_held_out_examples_the_same_for_every_seed(tmp_path):
    whole = write(tmp_path / "whole.parquet", table(60))
    scored = []
    for seed in (1, 2):
        rounds = {"count": 1, "clients": 2, "seed": seed}
        settings = config("head", rounds=rounds, simulation={"clients": 2, "held_out": 7})
        inside, _ = clients_of(whole, settings)
        scored.append(simulate(settings, inside, tmp_path / str(seed), whole)["initial_metrics"])
    assert [metrics["examples"] for metrics in scored] == [7.0, 7.0]
    rows = drawn_rows(60, 7, HELD_OUT_SEED)
    assert {name for name in scored[0] if name.startswith("accuracy/")} == {
        f"accuracy/{NAMES[k]}" for k in {row % 3 for row in rows}
    }
    settings = config("head", simulation={"clients": 2, "held_out": 61})
    with pytest.raises(DataInvalid, match="fewer than the 61"):
        simulate(settings, clients_of(whole, settings)[0], tmp_path / "more", whole)


@pytest.mark.parametrize(
    ("simulation", "fault"),
    [
        ({"partition": "iid", "variant": "balanced"}, "partition iid has no variant 'balanced'; there are: none"),
        ({"partition": "quantity", "variant": "balanced"}, "there are: dirichlet, lognormal"),
        ({"partition": "dirichlet", "variant": "lognormal"}, "there are: class-first, balanced, client-first"),
    ],
)
def test_a_variant_of_another_scheme_is_refused(simulation, fault):
    with pytest.raises(ConfigInvalid, match=fault):
        config(simulation=simulation)


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
    with pytest.raises(ConfigInvalid, match=r"simulation\.column: partition natural needs it"):
        config(simulation={"partition": "natural"})
    with pytest.raises(ConfigInvalid, match=r"simulation\.column: is for partition natural, not iid"):
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


def test_one_damaged_image_of_a_large_data_set_does_not_end_the_simulation_at_its_client(tmp_path):
    whole = table(120)
    images = whole.column("image").to_pylist()
    images[3]["bytes"] = b"no image"
    damaged = whole.set_column(0, whole.schema.field("image"), pa.array(images, whole.schema.field("image").type))
    data = write(tmp_path / "whole.parquet", damaged)
    run = config("head", rounds={"count": 1, "clients": 10}, simulation={"clients": 10})
    (row,) = simulate(run, clients_of(data, run)[0], tmp_path / "out")["rounds"]
    assert sorted(ticket["examples"] for ticket in row["tickets"]) == [11, *[12] * 9]
    for number in (1, 2, 5):
        images[number]["bytes"] = b"no image"
    worse = whole.set_column(0, whole.schema.field("image"), pa.array(images, whole.schema.field("image").type))
    one = config("head", rounds={"count": 1, "clients": 2}, simulation={"clients": 2})
    with pytest.raises(DataInvalid, match=r"of 60 images cannot be read, more than 1% of the 120 that they are a part"):
        simulate(one, clients_of(write(tmp_path / "worse.parquet", worse), one)[0], tmp_path / "worse")
    alone = config("head", rounds={"count": 1, "clients": 120}, simulation={"clients": 120})
    with pytest.raises(DataInvalid, match=r"none of 1 image can be read, the first: whole\.parquet row 3"):
        simulate(alone, clients_of(data, alone)[0], tmp_path / "alone")
