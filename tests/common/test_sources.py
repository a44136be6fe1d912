import io
import json
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fedpeft.data import parquet
from fedpeft.data.interface import ImageUnreadable
from fedpeft.data.parquet_labels import metadata
from fedpeft.data.sources import labels_digest, open_source
from fedpeft.errors import DataInvalid

NAMES = ("cat", "dog", "emu")
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def png(value: int, size: int = 4) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (size, size), (value, value, value)).save(out, "PNG")
    return out.getvalue()


def table(rows: int, label: str = "label", image: str = "image", names: tuple[str, ...] | None = NAMES) -> pa.Table:
    images = pa.array([{"bytes": png(i % 256), "path": f"{i}.png"} for i in range(rows)], IMAGE)
    labels = pa.array([i % 3 for i in range(rows)], pa.int64())
    vendors = pa.array([f"v{i % 2}" for i in range(rows)])
    built = pa.Table.from_arrays([images, labels, vendors], names=[image, label, "vendor"])
    if names is None:
        return built
    features = {image: {"_type": "Image"}, label: {"names": list(names), "_type": "ClassLabel"}}
    return built.replace_schema_metadata(metadata(features))


def write(path: Path, built: pa.Table, group: int = 7) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(built, path, row_group_size=group, compression="zstd")
    return path


@pytest.mark.parametrize("spooled", [False, True])
def test_parquet_reads_every_row_in_memory_and_memory_mapped(tmp_path, monkeypatch, spooled):
    if spooled:
        monkeypatch.setattr(parquet, "IN_MEMORY_BYTES", 0)
    source = open_source(write(tmp_path / "data.parquet", table(3000, names=NAMES), group=1000))
    assert len(source) == 3000
    assert source.class_names == NAMES
    assert source.labels.dtype == np.int64
    assert source.labels.tolist() == [i % 3 for i in range(3000)]
    assert not source.labels.flags.writeable
    for row in (0, 999, 1000, 1023, 1024, 2999):
        assert bytes(source.image_bytes(row)) == png(row % 256)
    assert source.name(1500) == "data.parquet row 1500 (1500.png)"
    assert source.column("vendor")[:3] == ["v0", "v1", "v0"]
    assert 3000 * 60 < source.image_bytes_total < 3000 * 400
    assert (source._spool is not None) == spooled
    with pytest.raises(IndexError):
        source.image_bytes(3000)


@pytest.mark.parametrize("spooled", [False, True])
def test_a_pickled_source_reads_the_same_and_the_temporary_file_goes_with_its_owner(tmp_path, monkeypatch, spooled):
    if spooled:
        monkeypatch.setattr(parquet, "IN_MEMORY_BYTES", 0)
    source = open_source(write(tmp_path / "data.parquet", table(20)))
    data = pickle.dumps(source)
    assert len(data) < 5000  # paths and labels, no images
    other = pickle.loads(data)
    assert bytes(other.image_bytes(13)) == bytes(source.image_bytes(13))
    assert other.name(13) == source.name(13)
    spool = source._spool
    del other
    assert spool is None or spool.exists()
    del source
    assert spool is None or not spool.exists()


def test_several_files_are_one_source_in_name_order(tmp_path):
    write(tmp_path / "train-00001-of-00002.parquet", table(5).slice(2))
    write(tmp_path / "train-00000-of-00002.parquet", table(4))
    source = open_source(tmp_path)
    assert source.labels.tolist() == [0, 1, 2, 0, 2, 0, 1]
    assert source.name(5) == "train-00001-of-00002.parquet row 1 (3.png)"
    assert len(open_source(str(tmp_path / "train-0000*"))) == 7


def test_a_folder_of_train_and_test_is_refused_rather_than_mixed(tmp_path):
    write(tmp_path / "train.parquet", table(4))
    write(tmp_path / "test.parquet", table(4))
    with pytest.raises(DataInvalid, match=r"several splits \(test.parquet, train.parquet\)"):
        open_source(tmp_path)


def test_other_column_names_and_binary_images(tmp_path):
    assert len(open_source(write(tmp_path / "a.parquet", table(4, label="labels", image="img")))) == 4
    odd = write(tmp_path / "b.parquet", table(4, label="fine", image="photo"))
    assert open_source(odd, image="photo", label="fine").class_names == NAMES
    plain = table(4, names=None).set_column(0, "image", pa.array([png(i) for i in range(4)], pa.large_binary()))
    source = open_source(write(tmp_path / "c.parquet", plain))
    assert bytes(source.image_bytes(3)) == png(3)
    assert source.name(3) == "c.parquet row 3"


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_string_labels_are_their_own_names(tmp_path, kind):
    built = table(4, names=None).set_column(1, "label", pa.array(["emu", "cat", "emu", "dog"], kind))
    source = open_source(write(tmp_path / "s.parquet", built))
    assert source.class_names == ("cat", "dog", "emu")
    assert source.labels.tolist() == [2, 0, 2, 1]


def test_integers_without_names_are_named_by_their_figures(tmp_path):
    built = table(4, names=None).set_column(1, "label", pa.array([7, -1, 7, 30], pa.int16()))
    source = open_source(write(tmp_path / "n.parquet", built))
    assert source.class_names == ("-1", "7", "30")
    assert source.labels.tolist() == [1, 0, 1, 2]


def test_a_null_image_reads_as_empty(tmp_path):
    images = pa.array([{"bytes": None, "path": "lost.png"}, None, {"bytes": png(1), "path": None}], IMAGE)
    source = open_source(write(tmp_path / "d.parquet", table(3).set_column(0, "image", images)))
    assert [bytes(source.image_bytes(row)) for row in range(3)] == [b"", b"", png(1)]


def faulty(kind: str, path: Path) -> Path:
    if kind == "no label":
        return write(path, table(3).drop_columns("label"))
    if kind == "no image":
        return write(path, table(3).drop_columns("image"))
    if kind == "no rows":
        return write(path, table(3).slice(0, 0))
    if kind == "not parquet":
        path.write_bytes(b"this is no parquet file")
    elif kind == "cut":
        write(path, table(300))
        path.write_bytes(path.read_bytes()[:-200])
    elif kind == "damaged":
        write(path, table(300))
        data = bytearray(path.read_bytes())
        data[4:3000] = bytes(2996)
        path.write_bytes(data)
    elif kind == "label beyond":
        write(path, table(3, names=("cat", "dog")))
    elif kind == "null label":
        write(path, table(3).set_column(1, "label", pa.array([0, None, 1], pa.int64())))
    elif kind == "float label":
        write(path, table(3).set_column(1, "label", pa.array([0.5, 1, 2])))
    elif kind == "image text":
        write(path, table(3).set_column(0, "image", pa.array(["a.png", "b", "c"])))
    elif kind == "metadata":
        write(path, table(3).replace_schema_metadata({b"huggingface": b"{nonsense"}))
    elif kind == "twice":
        write(path, table(3, names=("cat", "dog", "cat")))
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "there is no data at .*x.parquet"),
        ("no label", "no label column 'label' or 'labels'; columns found: image, vendor"),
        ("no image", "no image column 'image' or 'img'; columns found: label, vendor"),
        ("no rows", "has no rows"),
        ("not parquet", "is not a readable parquet file"),
        ("cut", "is not a readable parquet file"),
        ("damaged", "cannot read .*x.parquet"),
        ("label beyond", "row 2 has label 2; the file names classes 0 to 1"),
        ("null label", "row 1 has no value in label column 'label'"),
        ("float label", "label column 'label' is double; integers or strings are read"),
        ("image text", "image column 'image' is string"),
        ("metadata", "huggingface"),
        ("twice", "names class 'cat' of column 'label' twice"),
    ],
)
def test_a_faulty_file_is_named_with_its_fault(tmp_path, kind, message):
    with pytest.raises(DataInvalid, match=message):
        open_source(faulty(kind, tmp_path / "x.parquet"))


def test_files_that_disagree_and_an_unknown_column(tmp_path):
    write(tmp_path / "a.parquet", table(3))
    source = open_source(tmp_path)
    with pytest.raises(DataInvalid, match="no column 'site'; columns found: image, label, vendor"):
        source.column("site")
    write(tmp_path / "b.parquet", table(3, names=("dog", "cat", "emu")))
    with pytest.raises(DataInvalid, match=r"b\.parquet has other columns or class names than .*a\.parquet"):
        open_source(tmp_path)


def test_image_folder(tmp_path):
    for name, value in [("dog/2.png", 2), ("dog/deep/1.PNG", 1), ("cat/3.png", 3), (".hidden/4.png", 4)]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(png(value))
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "cat" / ".DS_Store.png").write_text("no image")
    source = open_source(tmp_path)
    assert source.class_names == ("cat", "dog")
    assert source.labels.tolist() == [0, 1, 1]
    assert [source.name(row) for row in range(3)] == ["cat/3.png", "dog/2.png", "dog/deep/1.PNG"]
    assert [bytes(source.image_bytes(row)) for row in range(3)] == [png(3), png(2), png(1)]
    assert source.column("label") == ["cat", "dog", "dog"]
    assert pickle.loads(pickle.dumps(source)).labels.tolist() == [0, 1, 1]
    (tmp_path / "cat" / "3.png").unlink()
    with pytest.raises(ImageUnreadable, match="cannot be read: No such file"):
        source.image_bytes(0)


def test_a_folder_without_images(tmp_path):
    with pytest.raises(DataInvalid, match="no image in a subfolder"):
        open_source(tmp_path)


def index(path: Path, data_file: Path, **changes: object) -> Path:
    opened = open_source(data_file)
    data = {"source": data_file.name, "rows": [5, 1, 2], "labels_sha256": labels_digest(opened), **changes}
    path.write_text(json.dumps(data))
    return path


def test_an_index_file_selects_rows_in_its_order(tmp_path):
    data = write(tmp_path / "data.parquet", table(9))
    source = open_source(index(tmp_path / "a.index.json", data))
    assert source.labels.tolist() == [2, 1, 2]
    assert source.class_names == NAMES
    assert bytes(source.image_bytes(0)) == png(5)
    assert source.name(0) == "data.parquet row 5 (5.png)"
    assert source.column("vendor") == ["v1", "v1", "v0"]
    assert pickle.loads(pickle.dumps(source)).labels.tolist() == [2, 1, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": [9]}, "names row 9; its source has 9"),
        ({"rows": [-1, 3]}, "names row -1"),
        ({"rows": []}, "names no rows"),
        ({"rows": [1.5]}, "no row number"),
        ({"rows": [True]}, "no row number"),
        ({"source": 3}, "has no source as a string"),
        ({"source": "other.parquet"}, "there is no data at"),
        ({"labels_sha256": "00"}, "was made for other data"),
    ],
)
def test_a_faulty_index_file(tmp_path, changes, message):
    data = write(tmp_path / "data.parquet", table(9))
    with pytest.raises(DataInvalid, match=message):
        open_source(index(tmp_path / "a.index.json", data, **changes))


def test_an_index_file_that_is_not_json(tmp_path):
    (tmp_path / "a.index.json").write_text("[1, 2")
    with pytest.raises(DataInvalid, match=r"a\.index\.json is not JSON"):
        open_source(tmp_path / "a.index.json")
    (tmp_path / "a.index.json").write_text("[1, 2]")
    with pytest.raises(DataInvalid, match="has no source"):
        open_source(tmp_path / "a.index.json")
