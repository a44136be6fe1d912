"""Splits of a data set are never its clients, its classes or one data set."""

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from structlog.testing import capture_logs

from fedpeft.config import RunConfig, parse_config
from fedpeft.data.client_folders import clients_in
from fedpeft.data.partition_writer import write_parts
from fedpeft.data.partitions import iid, natural
from fedpeft.data.sources.opening import open_source
from fedpeft.data.sources.splits import split_of, splits_among
from fedpeft.errors import DataInvalid
from fedpeft.simulation import clients_of

from .test_sources import table, write


def config(**sections: object) -> RunConfig:
    model = {"name": "vit_tiny_patch16_224", "weights": "none", "classes": ["cat", "dog", "emu"]}
    return parse_config({"model": model, "peft": {"method": "bias"}, **sections})


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train", "train"),
        ("Training", "train"),
        ("TRAIN-00000-of-00001", "train"),
        ("train2017", "train"),
        ("test_clean", "test"),
        ("eval", "test"),
        ("hold-out", "test"),
        ("Held_Out 2", "test"),
        ("HOLDOUT", "test"),
        ("val.0", "validation"),
        ("dev", "validation"),
        ("Validation-matched", "validation"),
        ("site-test", None),
        ("trained", None),
        ("valley", None),
        ("device-3", None),
        ("testament", None),
        ("client-0", None),
        ("0001", None),
        ("", None),
    ],
)
def test_names_of_splits(name, split):
    assert split_of(name) == split


def test_a_word_anywhere_counts_beside_one_of_another_split():
    assert splits_among(["photos_train", "photos_test", "readme"]) == {"photos_train": "train", "photos_test": "test"}
    assert splits_among(["site-test", "hospital"]) == {}
    assert splits_among(["bus", "train"]) == {"train": "train"}


def members(root: Path, *names: str) -> Path:
    for name in names:
        write(root / name / "0000.PARQUET", table(6))
    return root


@pytest.mark.parametrize(
    "names",
    [
        ("train", "test"),
        ("Train", "VAL", "other"),
        ("validation",),
        ("train-00000-of-00001", "test-00000-of-00001"),
        ("cifar_train", "cifar_test"),
        ("a", "b", "holdout"),
    ],
)
def test_splits_are_refused_as_clients_unless_a_record_says_that_they_are(tmp_path, names):
    members(tmp_path, *names)
    with pytest.raises(DataInvalid, match=r"named like the splits of one data set, not like clients; name the one"):
        clients_of(tmp_path, config())
    record = {"clients": [{"name": name, "examples": 6} for name in names]}
    (tmp_path / "partition.json").write_text(json.dumps(record))
    assert clients_of(tmp_path, config())[0].keys() == set(names)


def test_index_files_of_splits_are_refused_likewise(tmp_path):
    for name in ("train", "test"):
        (tmp_path / f"{name}.INDEX.json").write_text("{}")
    with pytest.raises(DataInvalid, match="not like clients"):
        clients_in(tmp_path)


def test_folders_of_another_task_are_refused_likewise(tmp_path):
    for name in ("train", "test"):
        (tmp_path / name).mkdir()
    text = config(model={"name": "text:tiny", "classes": ["cat", "dog"]})
    with pytest.raises(DataInvalid, match="not like clients"):
        clients_of(tmp_path, text)


def test_folders_of_another_task_are_clients_until_the_run_says_how_one_data_set_is_divided(tmp_path):
    for name in ("north", "south"):
        (tmp_path / name).mkdir()
    model = {"name": "text:tiny", "classes": ["cat", "dog"]}
    for simulation in (None, {"engine": "processes"}, {"held_out": 3}):
        found, divided = clients_of(tmp_path, config(model=model, simulation=simulation))
        assert (set(found), divided) == ({"north", "south"}, None)
    assert not config(simulation={"engine": "processes", "workers": 2}).simulation.divides
    assert config(simulation={"clients": 8}).simulation.divides


def test_data_of_another_task_than_the_run_s_are_refused(tmp_path):
    with pytest.raises(DataInvalid, match=r"is data for task text; the run's model is vit_tiny_patch16_224"):
        clients_of(Path(f"text:{tmp_path}"), config(model={"name": "vit_tiny_patch16_224", "classes": ["a", "b"]}))


def test_clients_are_folders_that_are_nobody_elses(tmp_path):
    members(tmp_path, "b", "a", ".hidden", "#recycle", "lost+found")
    (tmp_path / "c").mkdir()
    assert list(clients_in(tmp_path)) == ["a", "b"]
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert list(clients_in(tmp_path)) == ["a", "b", "link"]


def test_what_cannot_be_told_is_refused(tmp_path):
    members(tmp_path / "x", "a", "b")
    write(tmp_path / "x" / "all.parquet", table(3))
    with pytest.raises(DataInvalid, match=r"holds parquet files \(all.parquet\) and folders of them \(a, b\)"):
        clients_in(tmp_path / "x")
    members(tmp_path / "y", "a")
    (tmp_path / "y" / "a.index.json").write_text("{}")
    with pytest.raises(DataInvalid, match=r"client a has a folder and a\.index\.json"):
        clients_in(tmp_path / "y")


def test_a_partition_that_lacks_a_client_is_refused(tmp_path):
    whole = write(tmp_path / "all.parquet", table(9))
    write_parts(whole, iid(9, 3, 0), tmp_path / "out")
    assert len(clients_in(tmp_path / "out")) == 3
    (tmp_path / "out" / "client-1" / "data.parquet").unlink()
    with pytest.raises(DataInvalid, match=r"lacks clients that its partition.json names: client-1;"):
        clients_in(tmp_path / "out")
    (tmp_path / "out" / "partition.json").write_text("{}")
    with pytest.raises(DataInvalid, match=r"partition.json cannot be read"):
        clients_in(tmp_path / "out")


@pytest.mark.parametrize(
    "names", [("train.parquet", "TEST.parquet"), ("a.parquet", "eval.parquet"), ("x_train.pq", "x_dev.pq")]
)
def test_files_of_several_splits_are_no_data_set(tmp_path, names):
    for name in names:
        write(tmp_path / name, table(3))
    for path in (tmp_path, tmp_path / "*.p*"):
        with pytest.raises(DataInvalid, match=r"holds several splits"):
            open_source(path)


def test_a_column_of_splits_divides_among_no_clients():
    with pytest.raises(DataInvalid, match=r"column 'split' holds splits \(test, train\), which are no clients"):
        natural(["train", "train", "test"], "split")
    assert natural(["train", "bus"], "fine_label").names == ("bus", "train")
    assert natural(["cafe\u0301", "caf\u00e9"], "place").names == ("caf\u00e9",)


def test_folders_that_are_as_huggingface_converts_data(tmp_path):
    members(tmp_path / "default", "train", "test")
    with pytest.raises(DataInvalid, match="not like clients"):
        clients_of(tmp_path / "default", config())
    with pytest.raises(DataInvalid, match="there is parquet in its subfolders default"):
        clients_of(tmp_path, config(simulation={"clients": 2}))
    assert len(open_source(tmp_path / "default" / "train")) == 6


def test_what_lies_beside_parquet_files_is_told(tmp_path):
    write(tmp_path / "data.parquet", table(3))
    (tmp_path / "cat").mkdir()
    (tmp_path / "README.md").write_text("x")
    os.mkfifo(tmp_path / "pipe.parquet")
    source = open_source(tmp_path)
    assert source.inventory.lines() == [
        "skipped, beside parquet files, which alone are read: 3 (README.md, cat, pipe.parquet)"
    ]
    (tmp_path / "gone.parquet").symlink_to("nothing")
    with pytest.raises(DataInvalid, match=r"gone\.parquet is not a readable parquet file"):
        open_source(tmp_path)


def test_a_parquet_without_names_of_classes_still_has_its_own(tmp_path):
    pq.write_table(pa.table({"image": [b""], "label": [1]}), tmp_path / "a.parquet")
    assert open_source(tmp_path).class_names == ("1",)


@pytest.mark.parametrize("splits", [("train", "test"), ("Train", "VAL"), ("training", "holdout")])
def test_splits_inside_the_class_folders_are_refused(tmp_path, splits):
    for label in ("cat", "dog"):
        for split in splits:
            (tmp_path / label / split).mkdir(parents=True)
            Image.new("RGB", (4, 4)).save(tmp_path / label / split / "0.png")
    with pytest.raises(
        DataInvalid, match=r"holds splits \(.*\) inside its class folders.*[Tt]rain(ing)?/cat, or rename"
    ):
        open_source(tmp_path)


def test_folders_of_patients_inside_the_class_folders_are_no_splits(tmp_path):
    for patient in ("train", "train2", "test patient", "p1"):
        (tmp_path / "cat" / patient).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "cat" / patient / "0.png")
    assert len(open_source(tmp_path)) == 4


def images(root: Path, *paths: str) -> Path:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(root / path)
    return root


@pytest.mark.parametrize(
    ("folders", "named"),
    [
        (("bern/cat", "bern/dog", "graz/cat", "graz/dog"), ["cat", "dog"]),
        (("bern/cat", "bern/dog", "graz/cat", "graz/emu"), ["cat"]),
        (("bern/cat", "bern/dog"), ["cat", "dog"]),
    ],
    ids=["the same classes", "others", "one site"],
)
def test_sites_above_the_class_folders_are_pointed_out(tmp_path, folders, named):
    root = images(tmp_path, *(f"{folder}/0.png" for folder in folders))
    sites = sorted({folder.partition("/")[0] for folder in folders})
    with capture_logs() as said:
        assert open_source(root).class_names == tuple(sites), "years or views inside the classes look the same"
        open_source(root)  # is told no second time
    (line,) = said
    assert line["log_level"] == "warning"
    assert (line["classes"], line["folders"]) == (sites, named)
    assert line["site"] == str(root / "bern")


@pytest.mark.parametrize(
    "paths",
    [
        ("cat/patient-1/0.png", "cat/patient-2/0.png", "dog/patient-3/0.png", "dog/patient-4/0.png"),
        ("cat/a/0.png", "cat/b/0.png", "dog/a/0.png", "dog/b/0.png", "dog/0.png"),
        ("cat/a/0.png", "dog/a/0.png"),
    ],
    ids=["patients", "images beside them", "one folder"],
)
def test_other_folders_inside_the_class_folders_are_not(tmp_path, paths):
    root = images(tmp_path, *paths)
    with capture_logs() as said:
        open_source(root)
    assert said == []


def test_a_partition_does_not_lie_inside_the_data(tmp_path):
    root = images(tmp_path / "photos", "cat/0.png", "dog/0.png")
    (tmp_path / "link").symlink_to(root)
    for out in (root / "parts", tmp_path / "link" / "cat" / "parts", root):
        with pytest.raises(DataInvalid, match=f"{out} lies inside {root}, and would be read as a part of it"):
            write_parts(root, iid(2, 2, 0), out)
    assert sorted(path.name for path in root.iterdir()) == ["cat", "dog"]
