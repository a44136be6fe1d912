import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fedpeft.data.transforms import ImageUnreadable, Preprocessing, augment
from fedpeft.errors import DataInvalid

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


def pixels(n: int = 40, side: int = 16) -> np.ndarray:
    return np.random.default_rng(0).integers(1, 256, (n, 3, side, side)).astype(np.uint8)


def test_decode_is_pillow_resized_to_the_square():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8))
    for name, filter in [("bicubic", Image.Resampling.BICUBIC), ("bilinear", Image.Resampling.BILINEAR)]:
        got = Preprocessing(8, MEAN, STD, name).decode(encoded(image))
        assert got.shape == (3, 8, 8)
        assert np.array_equal(got, np.asarray(image.resize((8, 8), filter)).transpose(2, 0, 1))


def test_an_image_of_the_right_size_keeps_its_pixels():
    values = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    got = Preprocessing(8, MEAN, STD).decode(memoryview(encoded(Image.fromarray(values))))
    assert np.array_equal(got, values.transpose(2, 0, 1))


def test_odd_modes_become_rgb():
    decode = Preprocessing(4, MEAN, STD).decode
    assert decode(encoded(Image.new("RGBA", (4, 4), (10, 20, 30, 0)))).min() == 255  # transparent: white
    assert decode(encoded(Image.new("RGBA", (4, 4), (10, 20, 30, 255))))[:, 0, 0].tolist() == [10, 20, 30]
    assert decode(encoded(Image.new("L", (4, 4), 77)))[:, 0, 0].tolist() == [77, 77, 77]
    assert decode(encoded(Image.fromarray(np.full((4, 4), 0x8000, np.uint16))))[:, 0, 0].tolist() == [128, 128, 128]
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 9, 8, 7])
    assert decode(encoded(palette))[:, 0, 0].tolist() == [9, 8, 7]
    palette.info["transparency"] = bytes([0, 0])
    assert decode(encoded(palette)).min() == 255
    assert decode(encoded(Image.new("CMYK", (4, 4)), "JPEG")).shape == (3, 4, 4)


@pytest.mark.parametrize("data", [b"", b"no image", encoded(Image.new("RGB", (64, 64), "red"))[:-30]])
def test_what_is_no_whole_image_is_unreadable(data):
    with pytest.raises(ImageUnreadable):
        Preprocessing(8, MEAN, STD).decode(data)


def test_an_unknown_interpolation():
    with pytest.raises(DataInvalid, match="no interpolation 'random'"):
        Preprocessing(8, MEAN, STD, "random")


def test_normalise_uses_the_models_own_figures():
    raw = torch.from_numpy(pixels(3))
    got = Preprocessing(16, MEAN, STD).normalise(raw)
    want = (raw.double() / 255 - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)
    assert got.dtype == torch.float32
    assert torch.allclose(got.double(), want, atol=1e-5)


@pytest.mark.parametrize("kind", ["none", "flip", "crop"])
@given(
    seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 1000), order=st.permutations(range(40)), at=st.integers(0, 40)
)
def test_draws_depend_on_seed_epoch_and_row_alone(kind, seed, epoch, order, at):
    images, rows = pixels(), np.arange(40) * 3
    whole = augment(images, rows, kind, seed, epoch)
    order = np.array(order)
    parts = [augment(images[some], rows[some], kind, seed, epoch) for some in (order[:at], order[at:])]
    assert np.array_equal(np.concatenate(parts), whole[order])


@pytest.mark.parametrize("kind", ["flip", "crop"])
def test_draws_differ_between_seeds_epochs_and_rows(kind):
    images, rows = pixels(), np.arange(40)
    first = augment(images, rows, kind, 1, 0)
    assert not np.array_equal(first, augment(images, rows, kind, 2, 0))
    assert not np.array_equal(first, augment(images, rows, kind, 1, 1))
    assert not np.array_equal(first, augment(images, rows + 1, kind, 1, 0))


def test_flip_mirrors_about_half_and_leaves_the_input():
    images = pixels(2000, 2)
    before = images.copy()
    out = augment(images, np.arange(2000), "flip", 5, 0)
    assert np.array_equal(images, before)
    mirrored = (out == images[..., ::-1]).all((1, 2, 3))
    kept = (out == images).all((1, 2, 3))
    assert (mirrored | kept).all()
    assert 900 < mirrored.sum() < 1100


def test_crop_shifts_within_black_borders_by_every_amount():
    images = pixels(1000, 16)  # padding 2
    out = augment(images, np.arange(1000), "crop", 5, 0)
    seen = set()
    padded = np.pad(images, ((0, 0), (0, 0), (2, 2), (2, 2)))
    for i in range(1000):
        matches = [
            (y, x, flip)
            for y in range(5)
            for x in range(5)
            for flip in (1, -1)
            if np.array_equal(out[i][..., ::flip], padded[i, :, y : y + 16, x : x + 16])
        ]
        assert len(matches) == 1
        seen.add(matches[0])
    assert len(seen) == 50
