"""Digests of data by content."""

from __future__ import annotations

import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedpeft.data.contents import digest_of, images_digest
from fedpeft.data.sources.opening import open_source
from fedpeft.data.sources.parquet_files import beside
from fedpeft.errors import DataInvalid

from .test_sources import table, write


def test_a_folder_is_named_by_its_files_and_their_names(tmp_path):
    for name in ("one", "two", "three"):
        (tmp_path / name).mkdir()
    (tmp_path / "one" / "a").write_bytes(b"xy")
    (tmp_path / "two" / "a").write_bytes(b"xy")
    (tmp_path / "three" / "b").write_bytes(b"xy")
    one, two, three = (digest_of(tmp_path / name) for name in ("one", "two", "three"))
    assert one == two != three
    with pytest.raises(DataInvalid, match="cannot read"):
        digest_of(tmp_path / "none" / "a")


def test_a_pattern_is_named_by_the_files_that_it_means(tmp_path):
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "train-0.parquet").write_bytes(b"xy")
    (tmp_path / "there" / "test-0.parquet").write_bytes(b"z")
    here, there = (digest_of(tmp_path / place / "train-*.parquet") for place in ("here", "there"))
    assert here == there
    (tmp_path / "there" / "train-1.parquet").write_bytes(b"xy")
    assert digest_of(tmp_path / "there" / "train-*.parquet") != here
    with pytest.raises(DataInvalid, match="cannot read"):
        digest_of(tmp_path / "here" / "valid-*.parquet")


def test_a_folder_s_linked_folders_count_once_whatever_bytes_their_files_names_are(tmp_path):
    for name in ("elsewhere", "linked"):
        (tmp_path / name).mkdir()
    odd = os.fsdecode(b"\xff.png")
    (tmp_path / "elsewhere" / odd).write_bytes(b"x")
    (tmp_path / "linked" / "cats").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "elsewhere")
    before = digest_of(tmp_path / "linked")
    (tmp_path / "elsewhere" / odd).write_bytes(b"y")
    assert digest_of(tmp_path / "linked") != before


def test_the_images_of_a_source_are_named_by_their_bytes_in_order(tmp_path):
    here, there, other = (
        write(tmp_path / f"{name}.parquet", table(rows)) for name, rows in zip("abc", (9, 9, 8), strict=True)
    )
    digests = [images_digest(open_source(file)) for file in (here, there, other)]
    assert digests[0] == digests[1] != digests[2]


def test_a_parquet_file_is_named_by_the_images_and_the_description_that_lie_beside_it_too(tmp_path):
    def named(folder, image=b"a", classes=("cat", "dog")):
        (tmp_path / folder / "images").mkdir(parents=True)
        (tmp_path / folder / "images" / "0.png").write_bytes(image)
        rows = [{"image": {"bytes": None, "path": "images/0.png"}}, {"image": {"bytes": b"b", "path": "1.png"}}, {}]
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        whole = pa.Table.from_pylist(rows, pa.schema([("image", kind)])).append_column("label", pa.array([0, 1, 0]))
        write(tmp_path / folder / "data.parquet", whole)
        if classes:
            label = {"names": list(classes), "_type": "ClassLabel"}
            (tmp_path / folder / "dataset_info.json").write_text(json.dumps({"features": {"label": label}}))
        return digest_of(tmp_path / folder / "data.parquet")

    first = named("first")
    assert named("again") == first
    others = [named("image", image=b"c"), named("classes", classes=("dog", "cat")), named("none", classes=())]
    (tmp_path / "again" / "images" / "0.png").unlink()
    assert len({first, *others, digest_of(tmp_path / "again" / "data.parquet")}) == 5
    rows = pq.read_table(tmp_path / "first" / "data.parquet").to_pylist()
    rows[0]["image"]["path"] = "../beside.png"
    write(tmp_path / "shards" / "data.parquet", pa.Table.from_pylist(rows))
    (tmp_path / "beside.png").write_bytes(b"a")
    whole = digest_of(tmp_path / "shards")
    (tmp_path / "beside.png").write_bytes(b"b")
    assert digest_of(tmp_path / "shards") != whole, "an image beside the folder is not in it"
    whole = digest_of(tmp_path / "first")
    (tmp_path / "first" / "images" / "0.png").write_bytes(b"c")
    assert digest_of(tmp_path / "first") != whole


def test_images_in_lists_and_deeper_are_none_that_a_file_is_read_with(tmp_path):
    image = {"bytes": None, "path": "a.png"}
    rows = pa.Table.from_pylist([{"images": [image], "pair": {"left": image}, "label": 1}])
    assert beside(write(tmp_path / "data.parquet", rows)) == []


def test_a_file_that_is_no_parquet_is_named_by_its_bytes_whatever_it_is_called(tmp_path):
    (tmp_path / "one.parquet").write_bytes(b"text")
    (tmp_path / "two").write_bytes(b"text")
    assert beside(tmp_path / "one.parquet") == []
    assert digest_of(tmp_path / "one.parquet") == digest_of(tmp_path / "two")
