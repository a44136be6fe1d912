"""Data sets of a program as sources: of torch, and of the Hugging Face library, to the pixels of the same parquet."""

import io
import pickle

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, Subset, TensorDataset

from fedpeft.data.reading import Reading
from fedpeft.data.sources.datasets import source_of
from fedpeft.data.sources.interface import ImageUnreadable
from fedpeft.data.sources.opening import open_source
from fedpeft.errors import DataInvalid

from .test_sources import NAMES, png, table, write


class Pictures(Dataset):
    """As torchvision has them: PIL images, `targets` and `classes`; the items that were looked at are counted."""

    classes = NAMES

    def __init__(self, count=9):
        self.targets = [i % 3 for i in range(count)]
        self.looked_at = []

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, row):
        self.looked_at.append(row)
        return Image.new("RGB", (4, 4), (row, row, row)), self.targets[row]


def pixels(source, row):
    return np.asarray(Image.open(io.BytesIO(source.image_bytes(row))))


def test_a_hugging_face_data_set_is_the_parquet_that_it_came_from(tmp_path):
    file = write(tmp_path / "data.parquet", table(30))
    parquet = open_source(file)
    whole = datasets.Dataset.from_parquet(str(file), cache_dir=str(tmp_path / "cache"))
    source = source_of(whole)
    assert source.class_names == NAMES and source.labels.tolist() == parquet.labels.tolist()
    assert [bytes(source.image_bytes(k)) for k in (0, 13, 29)] == [bytes(parquet.image_bytes(k)) for k in (0, 13, 29)]
    assert source.column("vendor") == parquet.column("vendor") and source.column("label")[:2] == ["cat", "dog"]
    assert source.image_bytes_total == pytest.approx(parquet.image_bytes_total, rel=0.2)
    some = source_of(whole.select([29, 3]).with_transform(lambda batch: {}))
    assert some.labels.tolist() == [2, 0] and bytes(some.image_bytes(0)) == png(29)
    assert bytes(pickle.loads(pickle.dumps(source)).image_bytes(4)) == png(4)
    with pytest.raises(DataInvalid, match="no image column 'photo'; columns found: image, label, vendor"):
        source_of(whole, Reading(image_column="photo"))
    with pytest.raises(DataInvalid, match="no column 'maker'"):
        source.column("maker")
    with pytest.raises(DataInvalid, match=r"has splits \(train\); give one of them"):
        source_of(datasets.DatasetDict(train=whole))
    with pytest.raises(DataInvalid, match="that does not stream"):
        source_of(whole.to_iterable_dataset())


def test_images_that_a_hugging_face_data_set_names_by_path(tmp_path):
    (tmp_path / "a.png").write_bytes(png(7))
    rows = {"image": [str(tmp_path / "a.png"), str(tmp_path / "gone.png")], "label": ["dog", "cat"]}
    source = source_of(datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()))
    assert source.class_names == ("cat", "dog") and source.labels.tolist() == [1, 0]
    assert bytes(source.image_bytes(0)) == png(7)
    with pytest.raises(ImageUnreadable, match=r"gone\.png"):
        source.image_bytes(1)


def test_a_torch_data_set_with_targets_is_not_looked_through():
    whole = Pictures()
    parts = Subset(whole, [8, 1]), Subset(Subset(whole, [3, 8, 0, 1]), [1, 3])
    for source, rows in ((source_of(whole), range(9)), *((source_of(part), (8, 1)) for part in parts)):
        assert source.class_names == NAMES and source.labels.tolist() == [k % 3 for k in rows]
        assert whole.looked_at == []
        assert pixels(source, 1)[0, 0].tolist() == [rows[1]] * 3
        whole.looked_at.clear()
    assert source.image_bytes_total == len(source.image_bytes(0)) + len(source.image_bytes(1))


class Changed(Pictures):
    """As torchvision's with a `target_transform`."""

    def __init__(self, target_transform):
        super().__init__()
        self.target_transform = target_transform

    def __getitem__(self, row):
        image, label = super().__getitem__(row)
        return image, self.target_transform(label)


class Around(Dataset):
    """A data set around another one, which changes its items."""

    def __init__(self, dataset, change):
        self.dataset, self._change = dataset, change

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, row):
        image, label = self.dataset[row]
        return image, self._change(label)


@pytest.mark.parametrize("made", [Changed, lambda change: Around(Pictures(), change)])
@pytest.mark.parametrize("subset", [False, True])
@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda label: (label + 1) % 3, ("0", "1", "2")),
        (lambda label: int(label == 2), ("0", "1")),
        (lambda label: ("animal", "animal", "plant")[label], ("animal", "plant")),
        (lambda label: torch.tensor(label), NAMES),
    ],
)
def test_labels_that_a_data_set_changes_have_no_names_of_those_before(made, subset, change, names):
    whole, rows = made(change), [8, 0, 1, 3]
    source = source_of(Subset(whole, rows) if subset else whole)
    wanted = [str(change(k % 3)) for k in (rows if subset else range(9))]
    assert source.class_names == names
    if names != NAMES:
        assert [source.class_names[label] for label in source.labels] == wanted


def test_a_torch_data_set_of_tensors():
    images = torch.arange(4 * 3 * 2 * 2, dtype=torch.uint8).reshape(4, 3, 2, 2)
    source = source_of(TensorDataset(images, torch.tensor([7, 3, 7, 3])))
    assert source.class_names == ("3", "7") and source.labels.tolist() == [1, 0, 1, 0]
    assert np.array_equal(pixels(source, 2), images[2].permute(1, 2, 0).numpy())
    grey = source_of(TensorDataset(images[:, :1], torch.zeros(4, dtype=torch.int64)))
    assert np.array_equal(pixels(grey, 3), images[3, 0].numpy())


@pytest.mark.parametrize(
    ("items", "sentence"),
    [
        ([(torch.zeros(3, 4, 4), 1)], r"item 0 is Tensor of float32\[4, 4, 3\]; .* leave ToTensor"),
        ([(np.zeros((4, 4, 2), np.uint8), 1)], r"ndarray of uint8\[4, 4, 2\]"),
        (["image"], "item 0 of the data set is str; an image and a label are read"),
        ([], "no rows"),
    ],
)
def test_items_that_are_no_pictures_are_refused(items, sentence):
    with pytest.raises(DataInvalid, match=sentence):
        source_of(items).image_bytes(0)


def test_an_item_without_a_label_that_can_be_read_is_named():
    class Torn(Dataset):
        def __len__(self):
            return 3

        def __getitem__(self, row):
            if row == 2:
                raise OSError("the file is gone")
            return Image.new("L", (4, 4)), row

    with pytest.raises(DataInvalid, match=r"item 2 of the data set cannot be read.*the file is gone; .*`targets`"):
        source_of(Torn())
