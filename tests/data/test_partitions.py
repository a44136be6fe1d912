import json
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.data.partition_writer import write_parts
from fedpeft.data.partitions import Partition, dirichlet, iid, natural, quantity, skew
from fedpeft.data.sources.opening import open_source
from fedpeft.errors import DataInvalid

from .test_sources import IMAGE, table, write

CIFAR = np.repeat(np.arange(100), 500)
VARIANTS = ("class-first", "balanced", "client-first")


def whole(parts, rows):
    return np.array_equal(np.sort(np.concatenate(parts)), np.arange(rows))


@pytest.mark.parametrize(
    ("variant", "classes", "variation", "effective"),
    [("class-first", 39.4, 0.744, 58.7), ("balanced", 35.2, 0.771, 62.5), ("client-first", 31.0, 0.781, 64.0)],
)
def test_realised_skew_of_cifar_100_at_alpha_one_tenth(variant, classes, variation, effective):
    figures = []
    for seed in range(3):
        parts = dirichlet(CIFAR, 64, 0.1, seed, variant).parts
        assert whole(parts, 50_000)
        figures.append(skew(CIFAR, parts, 100))
    assert np.mean([f.classes_per_client for f in figures]) == pytest.approx(classes, abs=1.5)
    assert np.mean([f.total_variation for f in figures]) == pytest.approx(variation, abs=0.015)
    assert np.mean([f.effective_clients for f in figures]) == pytest.approx(effective, abs=1.0)
    assert all(0.4 < f.jensen_shannon < 0.8 for f in figures)


@pytest.mark.parametrize("variant", VARIANTS)
@given(
    labels=st.lists(st.integers(0, 6), min_size=1, max_size=200),
    clients=st.integers(1, 12),
    alpha=st.floats(1e-308, 1e300),
    seed=st.integers(0, 2**63 - 1),
)
def test_parts_are_disjoint_and_complete_at_any_alpha(variant, labels, clients, alpha, seed):
    partition = dirichlet(np.array(labels), clients, alpha, seed, variant, min_rows=0)
    assert len(partition.parts) == len(partition.names) == clients
    assert whole(partition.parts, len(labels))
    assert all((np.diff(part) > 0).all() for part in partition.parts)
    assert partition.variant == f"dirichlet/{variant}"


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_large_alpha_tends_to_iid_and_a_small_one_to_single_classes(variant):
    flat = skew(CIFAR, dirichlet(CIFAR, 64, 1e6, 0, variant).parts, 100)
    random = skew(CIFAR, iid(50_000, 64, 0).parts, 100)
    assert flat.total_variation < random.total_variation * 1.2
    labels = np.repeat(np.arange(10), 500)
    steep = skew(labels, dirichlet(labels, 10, 1e-9, 0, variant, min_rows=0).parts, 10)
    assert steep.classes_per_client < 2.2
    assert np.isfinite(steep.total_variation)


def test_client_first_and_balanced_sizes():
    sizes = [len(part) for part in dirichlet(CIFAR, 64, 0.1, 0, "client-first").parts]
    assert set(sizes) == {781, 782}
    spread = [
        max(map(len, p)) - min(map(len, p))
        for p in (dirichlet(CIFAR, 64, 0.1, 0, v).parts for v in ("balanced", "class-first"))
    ]
    assert spread[0] < spread[1]


def test_partitions_are_the_same_everywhere_and_differ_by_seed():
    assert dirichlet(CIFAR, 64, 0.1, 3).digest == dirichlet(CIFAR, 64, 0.1, 3).digest
    assert dirichlet(CIFAR, 64, 0.1, 3).digest != dirichlet(CIFAR, 64, 0.1, 4).digest
    # A version of NumPy that draws otherwise from the same bits shows here.
    assert iid(10, 2, 0).parts[0].tolist() == [2, 3, 4, 6, 7]


def test_too_small_clients_are_given_up_after_a_bounded_number_of_draws():
    with pytest.raises(DataInvalid, match=r"each of 64 clients has 10 \(best of 10 draws: \d+\)"):
        dirichlet(CIFAR[::50], 64, 0.01, 0, min_rows=10)
    with pytest.raises(DataInvalid, match="5 rows are too few for 6 clients"):
        iid(5, 6, 0)
    with pytest.raises(DataInvalid, match="0 clients"):
        iid(5, 0, 0)
    for alpha in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(DataInvalid, match="alpha"):
            dirichlet(CIFAR, 4, alpha, 0)
        with pytest.raises(DataInvalid, match="alpha"):
            quantity(100, 4, alpha, 0)


@given(rows=st.integers(1, 300), clients=st.integers(1, 20), seed=st.integers(0, 99))
def test_iid_sizes_differ_by_at_most_one(rows, clients, seed):
    if rows < clients:
        return
    parts = iid(rows, clients, seed).parts
    sizes = list(map(len, parts))
    assert whole(parts, rows)
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("variant", ["dirichlet", "lognormal"])
def test_quantity_skews_sizes_and_leaves_labels(variant):
    partition = quantity(50_000, 32, 0.8, 1, variant)
    measured = skew(CIFAR, partition.parts, 100)
    assert whole(partition.parts, 50_000)
    assert measured.gini > 0.3
    assert measured.largest > 5 * measured.smallest
    biggest = max(partition.parts, key=len)
    assert skew(CIFAR, [biggest, np.setdiff1d(np.arange(50_000), biggest)], 100).total_variation < 0.1


def test_natural_clients_are_the_values_of_a_column():
    partition = natural(["b", "a", "b", 7], "site")
    assert partition.names == ("7", "a", "b")
    assert [part.tolist() for part in partition.parts] == [[3], [1], [0, 2]]
    with pytest.raises(DataInvalid, match="'site' has no value in row 1"):
        natural(["a", None], "site")
    with pytest.raises(DataInvalid, match="both written '7'"):
        natural(["7", 7], "site")


def test_two_values_that_are_written_the_same_are_named():
    with pytest.raises(DataInvalid, match="two different values of column 'site' are both written '1'; rename one"):
        natural([1, "1", "b"], "site")


def test_skew_by_hand():
    labels = np.array([0, 0, 0, 1, 1, 1])
    measured = skew(labels, [np.array([0, 1]), np.array([2, 3, 4, 5])], 2)
    # Laws (1, 0) and (1/4, 3/4) against (1/2, 1/2).
    assert measured.total_variation == pytest.approx((0.5 + 0.25) / 2)
    assert measured.classes_per_client == 1.5
    assert measured.gini == pytest.approx(1 / 6)
    assert measured.effective_clients == pytest.approx(36 / 20)
    assert (measured.smallest, measured.largest, measured.clients) == (2, 4, 2)
    apart = skew(labels, [np.array([0, 1, 2]), np.array([3, 4, 5])], 2)
    assert apart.jensen_shannon == pytest.approx(0.31127812)
    with pytest.raises(DataInvalid, match="no rows"):
        skew(labels, [np.empty(0, np.int64)], 2)


@pytest.mark.parametrize("index", [False, True])
def test_what_a_client_reads_back_has_the_skew_that_was_drawn(tmp_path, index):
    path = write(tmp_path / "all.parquet", table(2400), group=500)
    labels = open_source(path).labels
    partition = dirichlet(labels, 8, 0.1, 7)
    record = write_parts(path, partition, tmp_path / "out", index=index)
    assert json.loads((tmp_path / "out" / "partition.json").read_text()) == record
    assert record["digest"] == partition.digest
    assert (record["variant"], record["alpha"], record["seed"]) == ("dirichlet/class-first", 0.1, 7)
    read, images = [], []
    for name in partition.names:
        source = open_source(tmp_path / "out" / (f"{name}.index.json" if index else name))
        read.append(source.labels)
        images += [source.name(row).split("(")[1] for row in range(len(source))]
        assert source.class_names == ("cat", "dog", "emu")
    assert len(set(images)) == 2400  # every image at exactly one client
    cuts = np.split(np.arange(2400), np.cumsum([len(r) for r in read])[:-1])
    realised = skew(np.concatenate(read), cuts, 3)
    assert realised.as_dict() == record["skew"]
    assert realised.total_variation > 0.3
    if not index:
        first = pq.read_table(tmp_path / "out" / partition.names[0] / "data.parquet")
        assert first.equals(pq.read_table(path).take(partition.parts[0]))
        assert first.schema.equals(pq.read_schema(path), check_metadata=True)


def test_an_image_folder_is_partitioned_into_parquet(tmp_path):
    from .test_sources import png

    for k in range(6):
        folder = tmp_path / "in" / ("cat" if k % 2 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{k}.png").write_bytes(png(k))
    write_parts(tmp_path / "in", iid(6, 2, 0), tmp_path / "out")
    sources = [open_source(tmp_path / "out" / f"client-{k}") for k in range(2)]
    assert [len(source) for source in sources] == [3, 3]
    assert sources[0].class_names == ("cat", "dog")
    found = sorted(bytes(source.image_bytes(row)) for source in sources for row in range(3))
    assert found == sorted(png(k) for k in range(6))


def test_images_that_cannot_be_read_keep_their_rows_and_count(tmp_path):
    from .test_sources import png

    for k in range(200):
        folder = tmp_path / "in" / ("cat" if k % 2 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{k}.png").write_bytes(png(k))
    (tmp_path / "in" / "cat" / "a.png").symlink_to("../../.git/annex/objects/a")
    (tmp_path / "in" / "cat" / "notes.txt").write_text("x")
    record = write_parts(tmp_path / "in", iid(201, 1, 0), tmp_path / "out")
    assert record["source"]["taken"] == 200
    assert record["source"]["unreadable"] == [{"reason": "link to nothing", "count": 1, "examples": ["cat/a.png"]}]
    assert record["source"]["skipped"] == [{"reason": "with suffix .txt", "count": 1, "examples": ["cat/notes.txt"]}]
    source = open_source(tmp_path / "out" / "client-0")
    row = next(row for row in range(201) if "cat/a.png" in source.name(row))
    assert pq.read_table(tmp_path / "out" / "client-0" / "data.parquet")["image"][row].as_py()["bytes"] is None
    for k in range(2):
        (tmp_path / "in" / "cat" / f"b{k}.png").symlink_to("nothing")
    with pytest.raises(
        DataInvalid, match=r"3 of 203 images cannot be read, more than 1%, the first: cat/a.png: link to"
    ):
        write_parts(tmp_path / "in", iid(203, 1, 0), tmp_path / "again")
    assert not (tmp_path / "again").exists()


def _without(whole: pa.Table, form: str, rows: Sequence[int]) -> pa.Table:
    """Returns a table of images, some of which are missing in one of the forms that this has in parquet."""
    lost = {"no file": {"bytes": None, "path": "lost.png"}, "neither": {"bytes": None, "path": None}}
    lost |= {"null": None, "empty": {"bytes": b"", "path": "x.png"}, "binary": None}
    images = [lost[form] if k in rows else image for k, image in enumerate(whole["image"].to_pylist())]
    if form == "binary":
        return whole.set_column(0, "image", pa.array([image and image["bytes"] for image in images], pa.binary()))
    return whole.set_column(0, "image", pa.array(images, IMAGE))


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        ("no file", "its row has no bytes, and the file at its path cannot be read: No such file or directory"),
        ("neither", "its row has neither the bytes of an image nor a path"),
        ("null", "its row has neither the bytes of an image nor a path"),
        ("binary", "its row has neither the bytes of an image nor a path"),
        ("empty", "it is empty"),
    ],
)
@pytest.mark.parametrize("selected", [False, True])
def test_rows_of_parquet_without_an_image_count_and_are_recorded(tmp_path, form, reason, selected):
    path = write(tmp_path / "in" / "all.parquet", _without(table(200), form, (3, 150)), group=64)
    if selected:
        write_parts(path, iid(200, 1, 0), tmp_path / "rows", index=True)
        path = tmp_path / "rows" / "client-0.index.json"
    record = write_parts(path, iid(200, 2, 0), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "partition.json").read_text()) == record
    (group,) = record["source"]["unreadable"]
    assert (group["reason"], group["count"]) == (reason, 2)
    assert [name.split(" (")[0] for name in sorted(group["examples"])] == ["all.parquet row 150", "all.parquet row 3"]
    sources = [open_source(tmp_path / "out" / f"client-{k}") for k in range(2)]
    assert [len(source) for source in sources] == [100, 100]
    worse = write(tmp_path / "worse.parquet", _without(table(200), form, range(20)))
    with pytest.raises(DataInvalid, match=r"20 of 200 images cannot be read, more than 1%, the first: worse\.parquet"):
        write_parts(worse, iid(200, 2, 0), tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("twice", [False, True])
def test_files_that_show_only_when_read_that_they_hold_no_image_are_recorded(tmp_path, twice):
    from .test_sources import png

    for k in range(200):
        folder = tmp_path / "in" / ("cat" if k % 2 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{k}.png").write_bytes(png(k) if k != 4 else b"")
    source = open_source(tmp_path / "in")
    (tmp_path / "in" / "cat" / "7.png").unlink()
    for number in range(1 + twice):  # with the same source, what is known stays counted once
        record = write_parts(tmp_path / "in", iid(200, 2, 0), tmp_path / f"out-{number}", source=source)
        assert record["source"]["taken"] == 198
        assert record["source"]["unreadable"] == [
            {"reason": "it cannot be read: No such file or directory", "count": 1, "examples": ["cat/7.png"]},
            {"reason": "it is empty", "count": 1, "examples": ["dog/4.png"]},
        ]


def test_partitions_that_cannot_be_written(tmp_path):
    path = write(tmp_path / "all.parquet", table(6))
    rows = np.arange(3)

    def part(*parts: tuple[str, np.ndarray]) -> Partition:
        return Partition(tuple(p for _, p in parts), tuple(n for n, _ in parts), "test")

    for partition, message in [
        (part(("a", rows), ("b", rows[:0])), "client b of the partition has no rows"),
        (part(("a", rows + 4)), "names row 6"),
        (part(("a b", rows), ("a-b", rows + 3)), "clients 'a b' and 'a-b' would have one file name, 'a-b'"),
        (part(("A", rows), ("a", rows + 3)), "clients 'A' and 'a' would have one file name, .*; rename one of these"),
        (part(("..", rows)), "cannot be a folder's name"),
    ]:
        with pytest.raises(DataInvalid, match=message):
            write_parts(path, partition, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    write_parts(path, part(("a", rows), ("../b", rows + 3)), tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a", "b", "partition.json"]
    with pytest.raises(DataInvalid, match="holds a partition already"):
        write_parts(path, part(("a", rows)), tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataInvalid, match="cannot write the partition"):
        write_parts(path, part(("a", rows)), tmp_path / "file" / "out")
