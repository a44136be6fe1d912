import io
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fedpeft.data.labels import map_labels
from fedpeft.data.partition_writer import write_parts
from fedpeft.data.partitions import iid
from fedpeft.data.sources import interface, parquet
from fedpeft.data.sources.interface import ImageUnreadable
from fedpeft.data.sources.opening import labels_digest, open_source
from fedpeft.data.sources.parquet_labels import metadata
from fedpeft.data.store import PixelStore
from fedpeft.data.transforms import Preprocessing
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
    mine = None if spool is None else spool._path
    del other, spool
    assert mine is None or mine.exists()
    del source
    assert mine is None or not mine.exists()


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


def test_a_row_without_bytes_is_read_from_beside_the_file_or_says_why_not(tmp_path, monkeypatch):
    (tmp_path / "deep" / "images").mkdir(parents=True)
    (tmp_path / "deep" / "images" / "here.png").write_bytes(png(7))
    os.mkfifo(tmp_path / "deep" / "pipe")
    paths = ["images/here.png", str(tmp_path / "deep/images/here.png"), "lost.png", "pipe", "images", "a\0b", None]
    rows = [{"bytes": None, "path": path} for path in paths]
    images = pa.array([*rows, None, {"bytes": png(1), "path": "lost.png"}], IMAGE)
    source = open_source(write(tmp_path / "deep" / "d.parquet", table(9).set_column(0, "image", images)))
    assert [bytes(source.image_bytes(row)) for row in (0, 1, 8)] == [png(7), png(7), png(1)]
    for row, says in [
        (2, "no bytes, and the file at its path cannot be read: No such file"),
        (3, "no bytes, and its path names no file"),
        (4, "no bytes, and its path names no file"),
        (5, "null byte"),
        (6, "neither the bytes of an image nor a path"),
        (7, "neither the bytes of an image nor a path"),
    ]:
        with pytest.raises(ImageUnreadable, match=says):
            source.image_bytes(row)
    store = PixelStore(source, Preprocessing(4, (0.5,) * 3, (0.5,) * 3))
    pixels, good = next(store.batches([np.arange(9)]))
    assert (len(pixels), good.tolist(), len(store.unreadable)) == (3, [True, True, *[False] * 6, True], 6)
    monkeypatch.setattr(interface, "UNREADABLE_SHARE", 1)
    write_parts(tmp_path / "deep" / "d.parquet", iid(9, 1, 0), tmp_path / "sites")
    copy = open_source(tmp_path / "sites" / "client-0")
    assert [bytes(copy.image_bytes(row)) for row in (0, 1, 8)] == [png(7), png(7), png(1)]
    assert copy.name(2) == "data.parquet row 2 (lost.png)"


@pytest.mark.parametrize("column", [[["a"], ["b"], ["c"]], [{"x": 1}, {"x": 2}, {"x": 3}]])
def test_a_nested_column_is_refused_by_name(tmp_path, column):
    source = open_source(write(tmp_path / "d.parquet", table(3).set_column(2, "site", pa.array(column))))
    with pytest.raises(DataInvalid, match=r"column 'site' holds (list|struct)<.*>; one plain value a row"):
        source.column("site")


@pytest.mark.parametrize(("image", "label"), [(None, None), ("img", "fine_label")])
def test_two_usual_names_need_a_word(tmp_path, image, label):
    built = table(3).append_column("img", table(3)["image"]).append_column("labels", pa.array([0, 1, 0]))
    file = write(tmp_path / "d.parquet", built)
    with pytest.raises(DataInvalid, match="columns 'image' and 'img'; say with --image-column"):
        open_source(file)
    with pytest.raises(DataInvalid, match="columns 'label' and 'labels'; say with --label-column"):
        open_source(file, image="img")
    assert open_source(file, image="img", label="labels").labels.tolist() == [0, 1, 0]


def shard(path: Path, change: str) -> Path:
    """Writes a shard as another program, or another part of one, would have."""
    built = table(4)
    if change == "pandas":
        built = built.replace_schema_metadata({**built.schema.metadata, b"pandas": b'{"index_columns": [1]}'})
    elif change == "datasets":
        about = json.loads(built.schema.metadata[b"huggingface"])
        built = built.replace_schema_metadata({b"huggingface": json.dumps({**about, "fingerprint": "ab"}).encode()})
    elif change == "order":
        built = built.select(["vendor", "label", "image"])
    elif change == "index":
        built = built.append_column("__index_level_0__", pa.array([5, 6, 7, 8]))
    elif change in ("large", "views", "categories"):
        kind = {
            "large": pa.large_string(),
            "views": pa.string_view(),
            "categories": pa.dictionary(pa.int8(), pa.string()),
        }
        built = built.set_column(2, "vendor", built["vendor"].cast(kind[change]))
    elif change == "narrow":
        built = built.set_column(1, "label", built["label"].cast(pa.int8()))
    elif change == "nothing there":
        built = built.set_column(2, "vendor", pa.nulls(4))
    elif change == "no paths":
        images = [{"bytes": image["bytes"], "path": None} for image in built["image"].to_pylist()]
        built = built.set_column(
            0, "image", pa.array(images, pa.struct([("bytes", pa.large_binary()), ("path", pa.null())]))
        )
    elif change == "not null":
        fields = [field.with_nullable(field.name == "image") for field in built.schema]
        built = built.cast(pa.schema(fields, built.schema.metadata))
    return write(path, built)


CHANGES = (
    "pandas",
    "datasets",
    "order",
    "index",
    "large",
    "views",
    "categories",
    "narrow",
    "nothing there",
    "no paths",
)


@pytest.mark.parametrize("change", [*CHANGES, "not null"])
@pytest.mark.parametrize("first", [True, False])
def test_shards_that_differ_in_what_means_nothing_are_one(tmp_path, change, first):
    shard(tmp_path / "part-0.parquet", change if first else "")
    shard(tmp_path / "part-1.parquet", "" if first else change)
    source = open_source(tmp_path)
    assert source.class_names == NAMES
    assert source.labels.tolist() == [0, 1, 2, 0] * 2
    assert [bytes(source.image_bytes(row)) for row in range(8)] == [png(i) for i in range(4)] * 2
    vendors = [None] * 4 if change == "nothing there" else ["v0", "v1"] * 2
    assert sorted(map(str, source.column("vendor"))) == sorted(map(str, ["v0", "v1", "v0", "v1", *vendors]))
    write_parts(tmp_path, iid(8, 1, 0), tmp_path / "sites")
    assert open_source(tmp_path / "sites" / "client-0").labels.tolist() == [0, 1, 2, 0] * 2


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"label": pa.array(["cat"] * 4)}, r"column 'label' is string in .*b\.parquet and int64 in .*a\.parquet"),
        ({"vendor": pa.array([[1]] * 4)}, r"column 'vendor' is list<.*> in .*b\.parquet and string"),
        ({"more": pa.array([1] * 4)}, r"b\.parquet has column 'more', and .*a\.parquet has not"),
        ({"vendor": None}, r"b\.parquet has no column 'vendor', and .*a\.parquet has"),
    ],
)
def test_shards_that_differ_are_refused_by_column(tmp_path, change, says):
    write(tmp_path / "a.parquet", table(4))
    built = table(4)
    for name, values in change.items():
        built = built.drop_columns(name) if name in built.column_names else built
        built = built if values is None else built.append_column(name, values)
    write(tmp_path / "b.parquet", built)
    with pytest.raises(DataInvalid, match=says):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("labels", "names", "label_map", "refused"),
    [
        (pa.array([0, -1, 1, 2]), ("cat", "dog", "emu"), {"-1": None}, r"class '-1' \(1 row\)"),
        (pa.array([0, 255, 1, 2], pa.uint8()), ("cat", "dog", "emu"), {"255": None}, r"class '255' \(1 row\)"),
        (pa.array([0, None, 1, 2]), ("cat", "dog", "emu"), {"(no label)": None}, r"class '\(no label\)' \(1 row\)"),
        (pa.array([0.0, None, 1.0, 2.0]), ("cat", "dog", "emu"), {"(no label)": None}, r"class '\(no label\)'"),
        (pa.array([0.0, float("nan"), 1.0, 2.0]), ("cat", "dog", "emu"), {"(no label)": None}, r"class '\(no label\)'"),
        (pa.array(["cat", None, "dog", "emu"]), None, {"(no label)": None}, r"class '\(no label\)' \(1 row\)"),
        (pa.array(["cat", "", "dog", "emu"], pa.string_view()), None, {"": None}, r"class '' \(1 row\)"),
        (
            pa.DictionaryArray.from_arrays(pa.array([0, None, 1, 2], pa.int8()), ["cat", "dog", "emu", "fox"]),
            None,
            {"(no label)": None},
            r"class '\(no label\)' \(1 row\)",
        ),
    ],
)
def test_rows_without_a_class_are_refused_until_the_site_leaves_them_out(tmp_path, labels, names, label_map, refused):
    source = open_source(write(tmp_path / "d.parquet", table(4, names=names).set_column(1, "label", labels)))
    with pytest.raises(DataInvalid, match=refused + ".*a label map can rename it or leave its rows out"):
        map_labels(source.class_names, source.labels, NAMES)
    mapped = map_labels(source.class_names, source.labels, NAMES, label_map)
    assert (mapped.rows.tolist(), mapped.labels.tolist(), mapped.dropped) == ([0, 2, 3], [0, 1, 2], 1)
    assert map_labels(source.class_names, source.labels, NAMES, dict.fromkeys(label_map, "cat")).labels[1] == 0


NO_PARQUET = {
    "LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 1\n",
    "image": png(1),
    "zip": b"PK\x03\x04" + bytes(30),
    "Feather": b"ARROW1\0\0" + bytes(30),
    "JSON": b'{"image": "a.png"}\n',
    "CSV": "image,label\r\na.png,caf\u00e9\n".encode(),
    "empty": b"",
    "cut parquet": b"PAR1" + bytes(30),
    "binary": b"\1\2\3" * 30,
}


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
    elif kind == "list label":
        write(path, table(3).set_column(1, "label", pa.array([["cat"], ["dog"], []])))
    elif kind == "float label":
        write(path, table(3).set_column(1, "label", pa.array([0.5, 1, 2])))
    elif kind == "image text":
        write(path, table(3).set_column(0, "image", pa.array(["a.png", "b", "c"])))
    elif kind == "metadata":
        write(path, table(3).replace_schema_metadata({b"huggingface": b"{nonsense"}))
    elif kind in NO_PARQUET:
        path.write_bytes(NO_PARQUET[kind])
    elif kind == "uint64":
        write(path, table(2, names=None).set_column(1, "label", pa.array([1, 2**63], pa.uint64())))
    elif kind == "twice":
        write(path, table(3, names=("cat", "dog", "cat")))
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "there is no data at .*x.parquet"),
        ("no label", "no label column 'label' or 'labels' or 'fine_label'; columns found: image, vendor"),
        ("no image", "no image column 'image' or 'img'; columns found: label, vendor"),
        ("no rows", "has no rows"),
        ("not parquet", "is not a readable parquet file"),
        ("cut", "is not a readable parquet file"),
        ("damaged", "cannot read .*x.parquet"),
        ("float label", "row 0 has label 0.5; whole numbers or strings are read"),
        ("list label", r"label column 'label' is list<.*>; whole numbers or strings are read"),
        ("image text", "image column 'image' is string"),
        ("metadata", "x.parquet: the schema's metadata key `huggingface`"),
        ("LFS", r"is not a readable parquet file: it is a Git LFS pointer, not the file \(git lfs pull"),
        ("image", "it is an image; the folder of class folders"),
        ("zip", "it is a zip archive"),
        ("Feather", "it is an Arrow or Feather file"),
        ("JSON", "it is JSON"),
        ("CSV", "it is text, such as CSV"),
        ("empty", "it is empty"),
        ("cut parquet", "its end is missing or damaged"),
        ("binary", "is not a readable parquet file: "),
        ("uint64", r"label column 'label' holds 9223372036854775808; numbers below 2\^63 are read"),
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
    with pytest.raises(DataInvalid, match=r"b\.parquet has other class names in column 'label' than .*a\.parquet"):
        open_source(tmp_path)


@pytest.mark.parametrize("kind", [pa.int64(), pa.int8(), pa.float64(), pa.dictionary(pa.int8(), pa.int64())])
def test_a_column_of_classes_has_their_names(tmp_path, kind):
    labels = pa.array([0, 2, -1, None, 1], pa.int64()).cast(kind if not pa.types.is_dictionary(kind) else pa.int64())
    built = table(5)
    built = built.set_column(2, "kind", labels.dictionary_encode() if pa.types.is_dictionary(kind) else labels)
    features = {
        "label": {"names": list(NAMES), "_type": "ClassLabel"},
        "kind": {"names": ["wild", "tame", "toy"], "_type": "ClassLabel"},
    }
    source = open_source(write(tmp_path / "a.parquet", built.replace_schema_metadata(metadata(features))))
    assert source.column("label") == ["cat", "dog", "emu", "cat", "dog"]
    assert source.column("kind") == ["wild", "toy", None, None, "tame"]


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
