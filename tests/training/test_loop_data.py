"""Local training and the data that it reads: kept pixels, workers, images that cannot be read."""

from types import SimpleNamespace

import numpy as np
import pytest
from structlog.testing import capture_logs

from fedpeft.data import store
from fedpeft.data.dataset import open_dataset
from fedpeft.data.partition_writer import write_parts
from fedpeft.data.partitions import iid
from fedpeft.data.transforms import ImageUnreadable
from fedpeft.errors import DataInvalid

from .test_loop import CLASSES, INPUT, StandIn, data, same, settings, train, write_images


def test_kept_pixels_decoding_again_and_workers_train_the_same_bits(tmp_path):
    """One image in 130 is broken, at most 1 % of them."""
    root = write_images(tmp_path / "x", 130, broken={17})
    deltas = []
    for options in ({}, {"cache_bytes": 0}, {"workers": 2}, {"cache_bytes": 0, "workers": 2}):
        dataset = open_dataset(root, CLASSES, INPUT, **options)
        model = StandIn(dropout=0.3)
        result = train(model, dataset, settings(epochs=2), seed=3, number=1)
        assert result.examples == 129
        assert result.metrics["skipped_images"] == 1
        assert list(dataset.unreadable) == ["light/0017.png"]
        deltas.append(result.delta)
    assert all(same(delta, deltas[0]) for delta in deltas)


def test_a_fault_of_the_source_comes_through_a_worker_as_itself(tmp_path):
    write_parts(write_images(tmp_path / "x", 10), iid(10, 1, 0), tmp_path / "parts")
    file = tmp_path / "parts" / "client-0" / "data.parquet"
    dataset = open_dataset(file, CLASSES, INPUT, workers=1)
    file.unlink()
    with pytest.raises(DataInvalid, match=r"^cannot read .*data\.parquet: .*No such file"):
        train(StandIn(), dataset, settings(), seed=1, number=1)


@pytest.mark.parametrize("options", [{}, {"cache_bytes": 0}])
def test_more_than_one_in_a_hundred_unreadable_is_refused_by_name(tmp_path, options):
    dataset = data(tmp_path, 100, broken={3, 4}, **options)
    with pytest.raises(DataInvalid, match=r"2 of 100 images cannot be read, more than 1%.*000[34]\.png"):
        train(StandIn(), dataset, settings(), seed=1, number=1)


def test_an_unreadable_image_is_told_once(tmp_path):
    dataset = data(tmp_path, 100, broken={3})
    with capture_logs() as logs:
        train(StandIn(), dataset, settings(epochs=3), seed=1, number=1)
    assert [(log["event"], log["image"]) for log in logs] == [("image_unreadable", "light/0003.png")]
    with pytest.raises(ImageUnreadable, match=r"light/0003\.png"):
        dataset[int(np.flatnonzero(dataset.rows == 51)[0])]


def test_clients_share_the_pixels_of_one_source(tmp_path, monkeypatch):
    decoded = []
    real = store.decode_rows
    monkeypatch.setattr(store, "decode_rows", lambda s, p, rows: decoded.extend(rows) or real(s, p, rows))
    dataset = data(tmp_path, 30)
    for part in np.array_split(np.arange(30), 3):
        client = dataset.subset(part)
        assert len(client) == 10
        train(StandIn(), client, settings(epochs=2), seed=1, number=1)
    assert sorted(map(int, decoded)) == list(range(30))
    image, label = dataset[29]
    assert image.shape == (3, 8, 8)
    assert label == 1
    with pytest.raises(IndexError):
        dataset[30]


def test_workers_are_not_started_for_small_data_nor_from_a_daemonic_process(tmp_path, monkeypatch):
    assert data(tmp_path)._store.workers == 0
    dataset = data(tmp_path, 10, workers=3)
    assert dataset._store.workers == 3
    monkeypatch.setattr(store.multiprocessing, "current_process", lambda: SimpleNamespace(daemon=True))
    assert dataset._store.workers == 0
