"""Encoded images become the picture that other tools show, and what is none says what it is."""

from __future__ import annotations

import io
import struct
import threading
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image, ImageOps, PngImagePlugin

from fedpeft.data.images import FORMATS, BitsUnknown, ImageUnreadable, peak, read_rgb
from fedpeft.data.sources.opening import open_source
from fedpeft.data.store import PixelStore
from fedpeft.data.transforms import Preprocessing

ORIENTATION = 0x0112
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 40, 3)).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def png16(values: np.ndarray) -> bytes:
    """Encodes uint16[height, width, channels] as PNG, which Pillow cannot write in colour."""
    height, width, channels = values.shape
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    raw = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")


def grey16(top: int, kind: str = "PNG") -> bytes:
    values = np.linspace(0, top, 24 * 40).reshape(24, 40).round().astype(np.uint16)
    return encoded(Image.fromarray(values), kind)


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_the_orientation_is_that_of_pillow(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    data = encoded(PICTURE, kind, exif=exif)
    with Image.open(io.BytesIO(data)) as image:
        want = ImageOps.exif_transpose(image).convert("RGB")
    assert np.array_equal(np.asarray(read_rgb(data)), np.asarray(want))
    assert read_rgb(data).size == ((24, 40) if 5 <= orientation <= 8 else (40, 24))


TEXT_AS_ORIENTATION = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x04abc\0"


@pytest.mark.parametrize("exif", [b"Exif\0\0nonsense", TEXT_AS_ORIENTATION, b"Exif\0\0"])
def test_a_damaged_orientation_is_none(exif: bytes) -> None:
    data = encoded(PICTURE, "PNG", exif=exif)
    assert np.array_equal(np.asarray(read_rgb(data)), np.asarray(PICTURE))
    assert read_rgb(encoded(PICTURE, "JPEG", exif=exif)).size == PICTURE.size


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "JPEG2000"])
@pytest.mark.parametrize("bits", [1, 8, 10, 12, 15, 16])
def test_grey_of_16_bits_is_scaled_by_those_in_use(kind: str, bits: int) -> None:
    top = 2**bits - 1
    data = grey16(top, kind)
    assert peak(data) == top
    got = np.asarray(read_rgb(data, bits))
    assert (got.min(), got.max()) == (0, 255 if bits >= 8 else top << (8 - bits))
    assert np.array_equal(got[..., 0], got[..., 2])
    with pytest.raises(BitsUnknown):
        read_rgb(data, None)


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_colour_of_16_bits_in_png_is_scaled_by_those_in_use(channels: int) -> None:
    values = np.linspace(0, 4095, 24 * 40 * channels).reshape(24, 40, channels).round().astype(np.uint16)
    if channels in (2, 4):
        values[..., -1] = 4095  # opaque
    data = png16(values)
    assert peak(data) == 4095
    got = np.asarray(read_rgb(data, 12))
    want = np.repeat(values[..., :1], 3, 2) if channels == 2 else values[..., :3]
    assert np.array_equal(got, want >> 4)


def test_grey_tiff_whose_zero_is_white_is_turned_over() -> None:
    values = np.linspace(0, 4095, 24 * 40).reshape(24, 40).round().astype(np.uint16)
    data = encoded(Image.fromarray(values), "TIFF", tiffinfo={262: 0})
    assert np.array_equal(np.asarray(read_rgb(data, 12))[..., 0], 255 - (values >> 4))


def test_images_of_8_bits_do_not_depend_on_the_bits() -> None:
    for kind in ("PNG", "JPEG", "BMP", "GIF", "PPM", "WEBP"):
        data = encoded(PICTURE, kind)
        assert peak(data) == 0
        assert np.array_equal(np.asarray(read_rgb(data, None)), np.asarray(read_rgb(data, 3)))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "it is empty"),
        (b"\0" * 1000, "nothing but zero bytes"),
        (b"no image at all", "in none of the supported formats: AVIF, BMP"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 1\n", "git lfs pull"),
        (b"/annex/objects/MD5E-s7--ab.png\n", "git annex get"),
        (b"outs:\n- md5: ab\n  path: a.png\n", "dvc pull"),
        (b"\n<!DOCTYPE html><html>404", "a web page"),
        (b"\0\0\0\x18ftypheic" + b"\0" * 50, r"HEIC, .*convert it to PNG or JPEG"),
        (b"\0\0\0\x18ftypmp42" + b"\0" * 50, "a video"),
        (b"\0" * 128 + b"DICM" + b"\0" * 50, "DICOM"),
        (b"<?xml version='1.0'?><svg>", "SVG"),
        (encoded(PICTURE, "ICO"), "ICO"),
        (encoded(PICTURE, "PDF"), "PDF"),
        (encoded(PICTURE, "TGA"), "in none of the supported formats"),
        (encoded(PICTURE)[:-30], "truncated"),
        (encoded(PICTURE, "JPEG")[:-200], "truncated"),
        (encoded(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"), "mode F have no known range"),
    ],
)
def test_what_is_no_image_says_what_it_is(data: bytes, says: str) -> None:
    with pytest.raises(ImageUnreadable, match=says):
        read_rgb(data)
    assert peak(data) == 0


def test_postscript_starts_no_program(monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*_: object, **__: object) -> None:
        raise AssertionError("Ghostscript was started")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", started)
    for data in (encoded(PICTURE, "EPS"), b"\xc5\xd0\xd3\xc6" + b"\0" * 40):
        with pytest.raises(ImageUnreadable, match="PostScript"):
            read_rgb(data)
    assert not {"EPS", "PS", "PDF", "WMF"} & set(FORMATS)


def test_an_image_beyond_the_limit_names_the_setting() -> None:
    data = encoded(Image.new("1", (19000, 10000)))
    with pytest.raises(ImageUnreadable, match=r"more than 178,956,970 pixels; --max-image-pixels raises"):
        read_rgb(data)
    with pytest.raises(ImageUnreadable, match="it has 40 x 24 pixels, more than 959 pixels"):
        read_rgb(encoded(PICTURE), max_pixels=959)
    assert read_rgb(encoded(PICTURE), max_pixels=960).size == (40, 24)


def test_a_limit_above_pillows_own_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ImageUnreadable, match="--max-image-pixels"):
        read_rgb(encoded(PICTURE), max_pixels=150)
    assert read_rgb(encoded(PICTURE), max_pixels=1000).size == (40, 24)


def test_no_warning_leaves_the_reader() -> None:
    palette = PICTURE.convert("P")
    damaged = encoded(PICTURE, "TIFF")[:-8]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        read_rgb(encoded(palette, "PNG", transparency=b"\0" * 256))
        read_rgb(encoded(Image.new("1", (12000, 9000))))  # Pillow warns of half its limit
        with pytest.raises(ImageUnreadable):
            read_rgb(damaged)
    assert seen == []


ENCODED = {kind: encoded(PICTURE, kind) for kind in FORMATS}


@given(st.binary(max_size=300), st.sampled_from(FORMATS), st.integers(0, 400))
def test_a_damaged_image_is_unreadable_or_read_and_nothing_else(noise: bytes, kind: str, at: int) -> None:
    data = ENCODED[kind]
    data = data[:at] + noise + data[at + len(noise) :]
    try:
        assert read_rgb(data).mode == "RGB"
    except ImageUnreadable as error:
        assert "BytesIO" not in str(error)


def folder(root: Path, images: dict[str, bytes]) -> Path:
    for k, (name, data) in enumerate(images.items()):
        (root / "ab"[k % 2]).mkdir(parents=True, exist_ok=True)
        (root / "ab"[k % 2] / name).write_bytes(data)
    return root


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("cache", [0, 2**20])
def test_all_images_of_a_source_are_scaled_alike_and_it_is_said(tmp_path: Path, cache: int, workers: int) -> None:
    images = {"0.png": encoded(PICTURE), "1.png": grey16(900), "2.tiff": grey16(4095, "TIFF"), "3.png": grey16(1023)}
    source = open_source(folder(tmp_path, images))
    store = PixelStore(source, Preprocessing(8, (0.5,) * 3, (0.5,) * 3, "nearest"), cache, workers)
    orders = [np.array([k]) for k in (0, 2, 3, 1, 2)]  # one by one: the scale does not depend on what is read first
    with structlog.testing.capture_logs() as logs:
        store.prepare(np.arange(4))
        pixels = {
            source.name(int(rows[0])): got[0] for rows, (got, _) in zip(orders, store.batches(orders), strict=True)
        }
    (told,) = [line for line in logs if "bits" in line]
    assert (told["bits"], told["highest"], told["log_level"]) == (12, 4095, "warning")
    scaled = Preprocessing(8, (0.5,) * 3, (0.5,) * 3, "nearest", bits=12)
    assert len(pixels) == 4
    for name, data in images.items():
        assert np.array_equal(next(p for n, p in pixels.items() if n.endswith(name)), scaled.decode(data))
    assert 50 < pixels["b/3.png"].max() < 64


def test_images_that_use_all_16_bits_are_said_nothing_of(tmp_path: Path) -> None:
    source = open_source(folder(tmp_path, {"0.png": grey16(40000), "1.png": grey16(900)}))
    with structlog.testing.capture_logs() as logs:
        store = PixelStore(source, Preprocessing(8, (0.5,) * 3, (0.5,) * 3))
        list(store.batches([np.arange(2)]))
    assert (logs, store.preprocessing.bits) == ([], 16)


def test_images_read_in_two_threads_leave_the_warnings_of_others_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    began, other_ended = threading.Event(), threading.Event()
    real = PngImagePlugin.PngImageFile.load

    def load(image: PngImagePlugin.PngImageFile) -> Any:
        if threading.current_thread() is second:
            began.set()
            assert other_ended.wait(20)
        elif not began.is_set():
            second.start()
            assert began.wait(20)
        return real(image)

    second = threading.Thread(target=read_rgb, args=(encoded(PICTURE),))
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", load)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        read_rgb(encoded(PICTURE))
        other_ended.set()
        second.join()
        warnings.warn("of somebody else", stacklevel=1)
        warnings.warn_explicit("of Pillow", UserWarning, "TiffImagePlugin.py", 1, module="PIL.TiffImagePlugin")
    assert [str(each.message) for each in heard] == ["of somebody else"]
