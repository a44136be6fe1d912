"""Data by name of the Hugging Face hub, from a cache as `huggingface_hub` lays it out; no network is asked."""

import numpy as np
import pyarrow as pa
import pytest

from fedpeft.data.sources.hub import HubPlace, local_path, parsed
from fedpeft.data.sources.opening import open_source
from fedpeft.errors import DataInvalid
from fedpeft.models.tasks import split_data

from .hub_cache import COMMIT, HubCache
from .test_sources import table


@pytest.fixture
def cache(tmp_path, monkeypatch):
    return HubCache(tmp_path, monkeypatch).put


def test_cifar_10_by_its_short_name_a_revision_and_its_whole_name(cache):
    for part, rows in (("train-00000-of-00001", 9), ("test-00000-of-00001", 5)):
        cache("uoft-cs/cifar10", f"plain_text/{part}.parquet", table(rows, image="img"))
    for name, rows in (
        ("hub:cifar10/train", 9),
        ("hub:cifar10/test", 5),
        (f"hub:uoft-cs/cifar10@{COMMIT}/plain_text/train", 9),
    ):
        source = open_source(name)
        assert len(source) == rows and source.class_names == ("cat", "dog", "emu")
    assert split_data("hub:cifar10/train") == ("", "hub:cifar10/train"), "images, and no task hub"
    assert local_path("photos/train").parts == ("photos", "train")


def test_cifar_100_has_its_fine_labels(cache):
    rows = table(9, label="fine_label", image="img").append_column("coarse_label", pa.array([0] * 9))
    cache("uoft-cs/cifar100", "cifar100/train-00000-of-00001.parquet", rows)
    assert open_source("hub:cifar100/train").labels.tolist() == [0, 1, 2] * 3
    assert set(open_source("hub:cifar100/train", label="coarse_label").labels) == {0}


def test_resisc45_has_several_files_of_a_split_and_all_must_be_there(cache):
    cache("timm/resisc45", "data/train-00000-of-00002.parquet", table(4))
    with pytest.raises(DataInvalid, match="lacks 1 of 2 shards"):
        open_source("hub:resisc45/train")
    cache("timm/resisc45", "data/train-00001-of-00002.parquet", table(3))
    assert len(open_source("hub:resisc45/train")) == 7


def test_patchcamelyon_has_truth_values_as_labels(cache):
    rows = table(4, names=None)
    rows = rows.set_column(1, "label", pa.array([True, False, True, True]))
    cache("1aurent/PatchCamelyon", "data/valid-00000-of-00001.parquet", rows)
    source = open_source("hub:patchcamelyon/valid")
    assert source.class_names == ("false", "true")
    assert np.array_equal(source.labels, [1, 0, 1, 1])


def test_what_is_not_there_is_said(cache):
    with pytest.raises(DataInvalid, match=r"cannot fetch uoft-cs/cifar10 from the Hugging Face hub: "):
        open_source("hub:cifar10/train")
    cache("a/b", "one/train-00000-of-00001.parquet", table(3))
    with pytest.raises(DataInvalid, match=r"a/b on .* has no split 'test' in parquet; in the cache of it are: train"):
        open_source("hub:a/b/test")
    cache("a/b", "two/train-00000-of-00001.parquet", table(3))
    with pytest.raises(DataInvalid, match=r"configurations: one, two; name one: hub:a/b/one/train"):
        open_source("hub:a/b/train")
    assert len(open_source("hub:a/b/two/train")) == 3


@pytest.mark.parametrize("wrong", ["hub:cifar10", "hub:a/b", "hub:a/b/c/d/e", "hub:cifar10//train", "hub:"])
def test_a_name_of_another_form_is_refused(wrong):
    with pytest.raises(DataInvalid, match="is not hub:OWNER/NAME"):
        parsed(wrong)
    assert parsed("hub:a/b@main/c/train") == HubPlace("a/b", "main", "c", "train")
