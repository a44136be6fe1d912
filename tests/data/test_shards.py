"""Shards that say how many they are: all there, or refused by number."""

import json

import pytest

from fedpeft.data.sources.opening import open_source
from fedpeft.errors import DataInvalid

from .test_sources import table, write


def shards(root, *names):
    for name in names:
        write(root / f"{name}.parquet", table(3))
    return root


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["train-00000-of-00002"], r"lacks 1 of 2 shards, as train-00000-of-00002.parquet counts them: number 1;"),
        (["train-00000-of-00003", "train-00002-of-00003"], r"lacks 1 of 3 shards.*: number 1; fetch them"),
        (["data_1-of-3", "data_3-of-3"], r"lacks 1 of 3 shards.*: number 2;"),
        (["part.0-of-900"], r"lacks 899 of 900 shards.*: number 1, 2, 3 and 896 more;"),
        (["x-00000-of-00001", "x-00000-of-00002", "x-00001-of-00002"], r"shards of 1 and 2 files under one name \(x\)"),
    ],
)
def test_shards_that_are_not_whole_are_refused(tmp_path, names, says):
    shards(tmp_path, *names)
    for place in (tmp_path, tmp_path / "*.parquet"):
        with pytest.raises(DataInvalid, match=says):
            open_source(place)


@pytest.mark.parametrize(
    "names", [["t-00000-of-00002", "t-00001-of-00002"], ["t-1-of-2", "t-2-of-2"], ["t-0-of-1", "u"]]
)
def test_whole_shards_are_one_data_set(tmp_path, names):
    assert len(open_source(shards(tmp_path, *names))) == 3 * len(names)


def test_one_that_is_named_is_read_alone(tmp_path):
    shards(tmp_path, "t-00000-of-00002")
    assert len(open_source(tmp_path / "t-00000-of-00002.parquet")) == 3
    assert len(open_source(tmp_path / "t-0000[0]*.parquet")) == 3


def test_class_names_of_dataset_info_are_used_where_the_file_has_none(tmp_path):
    write(tmp_path / "data.parquet", table(6).replace_schema_metadata(None))
    assert open_source(tmp_path).class_names == ("0", "1", "2")
    info = {"features": {"label": {"_type": "ClassLabel", "names": ["a", "b", "c"]}}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8-sig")
    assert open_source(tmp_path).class_names == ("a", "b", "c")
    write(tmp_path / "data.parquet", table(6))
    assert open_source(tmp_path).class_names == ("cat", "dog", "emu")


@pytest.mark.parametrize("text", ["{", "[]", '{"features": 3}', '{"features": {"label": {"names": "cat"}}}'])
def test_a_dataset_info_that_describes_nothing_is_named(tmp_path, text):
    write(tmp_path / "data.parquet", table(6).replace_schema_metadata(None))
    (tmp_path / "dataset_info.json").write_text(text)
    with pytest.raises(DataInvalid, match=r"dataset_info\.json"):
        open_source(tmp_path)
