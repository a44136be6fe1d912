"""Decoded pixels between processes: decoded once, the same, and decoded anew where what is kept is damaged."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from structlog.testing import capture_logs

from fedpeft.data import pixel_cache, store
from fedpeft.data.sources.interface import Selection
from fedpeft.data.sources.opening import open_source
from fedpeft.data.store import PixelStore
from fedpeft.data.transforms import Preprocessing

from .test_images import PICTURE, encoded, folder, grey16
from .test_sources import table, write

INPUT = Preprocessing(8, (0.5,) * 3, (0.5,) * 3)
ROWS = 20
DAMAGED = "kept pixels are damaged, and the images are decoded anew"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write(tmp_path / "data.parquet", table(ROWS))


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Returns the rows that are decoded, as they are."""
    real, rows = store.decode_rows, list[int]()

    def noted(source, preprocessing, some):  # type: ignore[no-untyped-def]
        rows.extend(map(int, some))
        return real(source, preprocessing, some)

    monkeypatch.setattr(store, "decode_rows", noted)
    return rows


def pixels_of(data: Path, cache: Path | None, rows: object = None, preprocessing: Preprocessing = INPUT) -> np.ndarray:
    """Returns the pixels of some rows as a process that has just begun finds them."""
    source = open_source(data)
    part = source if rows is None else Selection(source, np.array(rows))
    (pixels, good) = next(PixelStore(part, preprocessing, pixel_cache=cache).batches([np.arange(len(part))]))
    assert good.all()
    return pixels


def test_what_one_process_decodes_others_read_in_any_part_and_order(
    tmp_path: Path, data: Path, decoded: list[int]
) -> None:
    cache, plain = tmp_path / "cache", pixels_of(data, None)
    decoded.clear()
    assert (pixels_of(data, cache, range(10)) == plain[:10]).all() and len(decoded) == 10
    decoded.clear()
    assert (pixels_of(data, cache, [12, 3, 9]) == plain[[12, 3, 9]]).all()
    assert decoded == [0], "row 12 of the data set alone"
    pixels_of(data, cache)
    decoded.clear()
    assert (pixels_of(data, cache) == plain).all() and decoded == []
    (file,) = cache.iterdir()
    assert file.stat().st_mode & 0o77 == 0 and cache.stat().st_mode & 0o77 == 0


def test_worker_processes_decode_only_what_is_not_kept(tmp_path: Path, data: Path, decoded: list[int]) -> None:
    cache, plain = tmp_path / "cache", pixels_of(data, tmp_path / "cache")
    decoded.clear()
    parted = PixelStore(open_source(data), INPUT, workers=1, pixel_cache=cache)
    parted.prepare(np.arange(ROWS))
    assert parted._decoders is None, "no process was needed"
    assert (next(parted.batches([np.arange(ROWS)]))[0] == plain).all() and decoded == []


@pytest.mark.parametrize("damage", ["a byte", "half a record", "the size"])
def test_what_is_damaged_is_decoded_anew_and_said(tmp_path: Path, data: Path, decoded: list[int], damage: str) -> None:
    cache, plain = tmp_path / "cache", pixels_of(data, tmp_path / "cache")
    (file,) = cache.iterdir()
    kept = file.read_bytes()
    record = len(kept) // ROWS
    at, end = 5 * record + record // 2, 6 * record
    changed = {
        "a byte": kept[:at] + bytes([kept[at] ^ 1]) + kept[at + 1 :],
        "half a record": kept[:at] + bytes(end - at) + kept[end:],
        "the size": kept[:-1],
    }[damage]
    file.write_bytes(changed)
    decoded.clear()
    with capture_logs() as logs:
        assert (pixels_of(data, cache) == plain).all()
    assert decoded == (list(range(ROWS)) if damage == "the size" else [5])
    assert [line["event"] for line in logs] == [DAMAGED]
    assert file.read_bytes() == kept


def test_other_images_or_another_decoding_have_a_file_of_their_own(tmp_path: Path, data: Path) -> None:
    cache, other = tmp_path / "cache", write(tmp_path / "other.parquet", table(ROWS + 1))
    for preprocessing in (INPUT, replace(INPUT, image_size=4), replace(INPUT, interpolation="bilinear")):
        assert (pixels_of(data, cache, None, preprocessing) == pixels_of(data, None, None, preprocessing)).all()
    assert (pixels_of(other, cache) == pixels_of(other, None)).all()
    assert len(list(cache.iterdir())) == 4
    pixels_of(data.rename(tmp_path / "moved.parquet"), cache, None, replace(INPUT, mean=(0.1,) * 3))
    assert len(list(cache.iterdir())) == 4, "neither the place nor the normalisation decides pixels"


def test_files_used_longest_ago_make_room(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    for age, side in ((300, 16), (200, 17), (100, 18)):
        pixels_of(data, cache, None, replace(INPUT, image_size=side))
        (newest,) = (file for file in cache.iterdir() if file.stat().st_size == ROWS * (8 + 3 * side * side))
        os.utime(newest, (newest.stat().st_atime, newest.stat().st_mtime - age))
    monkeypatch.setattr(pixel_cache, "LIMIT_BYTES", 3 * ROWS * 3 * 20 * 20)
    pixels_of(data, cache, None, replace(INPUT, image_size=20))
    left = {file.stat().st_size for file in cache.iterdir()}
    assert ROWS * (8 + 3 * 20 * 20) in left and ROWS * (8 + 3 * 16 * 16) not in left


def test_files_with_holes_count_as_what_they_may_hold(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data are decoded for a client at a time: the files are made with holes, which fill one after the other."""
    cache, sides = tmp_path / "cache", (60, 61, 62)
    monkeypatch.setattr(pixel_cache, "LIMIT_BYTES", 2 * ROWS * (8 + 3 * 62 * 62))
    stores = [PixelStore(open_source(data), replace(INPUT, image_size=side), pixel_cache=cache) for side in sides]
    for k, store_ in enumerate(stores):
        next(store_.batches([np.arange(1)]))
        for file in cache.iterdir():
            os.utime(file, (0, file.stat().st_mtime - 100))
        assert len(list(cache.iterdir())) == min(k + 1, 2)
    with capture_logs() as logs:
        for store_ in stores:
            next(store_.batches([np.arange(ROWS)]))
    assert sum(file.stat().st_size for file in cache.iterdir()) <= pixel_cache.LIMIT_BYTES
    assert [line["event"] for line in logs] == ["decoded pixels are kept no more: their file made room for others"]


def test_a_data_set_beyond_the_limit_is_not_read_for_a_file_and_removes_no_other(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, large = tmp_path / "cache", replace(INPUT, image_size=20)
    pixels_of(data, cache)
    (kept,) = cache.iterdir()
    monkeypatch.setattr(pixel_cache, "LIMIT_BYTES", ROWS * 3 * 20 * 20)
    monkeypatch.setattr(pixel_cache, "images_digest", pytest.fail)
    with capture_logs() as logs:
        assert (pixels_of(data, cache, range(3), large) == pixels_of(data, None, range(3), large)).all()
    assert list(cache.iterdir()) == [kept]
    assert [line["event"] for line in logs] == ["decoded pixels are not kept: too many"]


def test_a_folder_that_refuses_or_is_full_is_said_and_nothing_is_lost(
    tmp_path: Path, data: Path, small_disk: Path
) -> None:
    large = replace(INPUT, image_size=200)  # 2.4 MB for a disk of one
    plain = pixels_of(data, None, None, large)
    for cache in (data, small_disk):
        with capture_logs() as logs:
            assert (pixels_of(data, cache, None, large) == plain).all()
            assert (pixels_of(data, cache, None, large) == plain).all()
        assert "FEDPEFT_PIXEL_CACHE" in logs[0]["event"]


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"FEDPEFT_PIXEL_CACHE": "off"}, None),
        ({"FEDPEFT_PIXEL_CACHE": "/there"}, Path("/there")),
        ({"XDG_CACHE_HOME": "/cache"}, Path("/cache/fedpeft/pixels")),
        ({"HOME": "/home/me"}, Path("/home/me/.cache/fedpeft/pixels")),
    ],
)
def test_the_environment_names_the_folder(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], folder: Path | None
) -> None:
    for name in ("FEDPEFT_PIXEL_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert pixel_cache.folder_here() == folder


def test_images_of_16_bits_are_scaled_by_their_part_and_unreadable_ones_named_each_time(tmp_path: Path) -> None:
    images = {"0.png": encoded(PICTURE), "1.png": grey16(900), "2.png": grey16(4095), "3.png": b"no image"}
    source = open_source(folder(tmp_path, images))  # its rows are 0, 2, 1, 3, by the folders a and b
    parts, found = ([0, 1], [0, 2, 3], [0, 1, 2, 3]), dict[str, list[bytes]]()
    for turn, cache in (("none", None), ("first", tmp_path / "cache"), ("second", tmp_path / "cache")):
        for rows in parts:
            part = PixelStore(Selection(source, np.array(rows)), INPUT, pixel_cache=cache)
            single = part.batches([np.array([k]) for k in range(len(rows))])
            found.setdefault(turn, []).extend(pixels.tobytes() for pixels, _ in single)
            assert len(part.unreadable) == (3 in rows)
    assert found["none"] == found["first"] == found["second"]
    assert found["none"][3] != found["none"][7], "image 1 is scaled by itself, or by image 2 too"
