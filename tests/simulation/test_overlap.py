"""Images that are trained and scored on at once are found by their bytes, at a bounded cost."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from fedpeft.data.overlap import Overlap, overlap
from fedpeft.data.sources.opening import open_source
from fedpeft.rounds import state_machine
from fedpeft.simulation import clients_of, simulate

from ..data.test_sources import png, table, write
from .simulated_runs import config


class Images:
    """A source of the given encoded images."""

    def __init__(self, images: list[bytes]) -> None:
        self._images = images
        self.read = 0
        self.image_bytes_total = sum(map(len, images))

    def __len__(self) -> int:
        return len(self._images)

    def name(self, row: int) -> str:
        return f"row {row}"

    def image_bytes(self, row: int) -> bytes:
        self.read += 1
        return self._images[row]


SOME = st.lists(st.binary(max_size=2), max_size=12)


@given(SOME, SOME, SOME)
def test_equal_bytes_are_counted_once_for_each_held_out_image(first, second, held):
    found = overlap([("a: ", Images(first)), ("b: ", Images(second))], 2, Images(held))
    trained = {image for image in first + second if image}
    assert found.images == sum(image in trained for image in held)
    assert (found.training, found.of) == (len(first + second), len(first + second))
    assert (found.held_out, found.held_out_of) == (len(held), len(held)) and not found.not_compared
    for name, where in found.examples:
        who, row = name.split(": row ")
        assert (first if who == "a" else second)[int(row)] == held[int(where.removeprefix("row "))]


def test_no_more_than_the_budget_is_read():
    training, held = Images([bytes([k]) * 10 for k in range(200)]), Images([bytes([k]) * 10 for k in range(100)])
    found = overlap([("", training)], 1, held, budget_bytes=1000)
    assert training.read == found.training == 50 and held.read == found.held_out == 50
    assert (found.of, found.held_out_of, found.images) == (200, 100, 25)
    assert "25 of 50 held-out images are among the training images, with the same bytes: row 0 is row 0" in str(found)
    assert "50 of 100 held-out and 50 of 200 training images were compared" in str(found)
    assert Overlap.of_dict(json.loads(json.dumps(found.as_dict()))) == found
    other = overlap([("", training)], 1, Images([bytes([k]) * 9 for k in range(100)]), budget_bytes=1000)
    assert str(other).startswith("0 of 50 held-out images are among the training images; 50 of 100 held-out and")
    one_side = overlap([("", Images([b"x"]))], 1, held, budget_bytes=1000)
    assert "50 of 100 held-out and 1 of 1 training images were compared" in str(one_side)


@pytest.mark.parametrize("divided", [False, True])
def test_a_simulation_says_which_held_out_images_it_is_trained_on(tmp_path: Path, divided: bool) -> None:
    data = write(tmp_path / "train" / "data.parquet", table(12))
    held = tmp_path / "test"
    for k, value in enumerate((3, 4, 250)):
        (held / "cat").mkdir(parents=True, exist_ok=True)
        (held / "cat" / f"{k}.png").write_bytes(open_source(data).image_bytes(value) if value < 12 else png(value))
    settings = config(rounds={"count": 1, "clients": 1}, simulation={"clients": 2})
    clients = clients_of(data, settings)[0] if divided else {"a": data}
    with capture_logs() as logs:
        report = simulate(settings, clients, tmp_path / "out", evaluate=held)
    assert {key: report["overlap"][key] for key in ("images", "held_out", "training", "of")} == {
        "images": 2,
        "held_out": 3,
        "training": 12,
        "of": 12,
    }
    assert report["overlap"]["examples"][0][1] == "cat/0.png"
    assert any("2 of 3 held-out images are among the training images, with the same bytes" in e["event"] for e in logs)


def test_clients_whose_data_do_not_open_are_counted_though_their_turn_never_comes(tmp_path: Path) -> None:
    write(tmp_path / "train" / "a.parquet", table(12))
    (tmp_path / "train" / "b.parquet").write_bytes(b"PAR1")
    (tmp_path / "test" / "cat").mkdir(parents=True)
    (tmp_path / "test" / "cat" / "0.png").write_bytes(png(250))
    clients = {name: tmp_path / "train" / f"{name}.parquet" for name in "ab"}
    seed = next(seed for seed in range(99) if state_machine.sample(clients, 1, seed, 1) == ["a"])
    with capture_logs() as logs:
        settings = config(rounds={"count": 1, "clients": 1, "seed": seed})
        report = simulate(settings, clients, tmp_path / "out", evaluate=tmp_path / "test")
    assert {key: report["overlap"][key] for key in ("images", "training", "of", "unopened")} == {
        "images": 0,
        "training": 12,
        "of": 12,
        "unopened": 1,
    }
    (one,) = [entry for entry in logs if entry.get("client") == "b"]
    assert "b.parquet is not a readable parquet file: its end is missing" in one["why"]
    assert any("the data of 1 client cannot be opened" in entry["event"] for entry in logs)


def test_without_a_common_image_nothing_is_said(tmp_path: Path) -> None:
    data = write(tmp_path / "train" / "data.parquet", table(12))
    (tmp_path / "test" / "cat").mkdir(parents=True)
    (tmp_path / "test" / "cat" / "0.png").write_bytes(png(250))
    settings = config(rounds={"count": 1, "clients": 1})
    with capture_logs() as logs:
        report = simulate(settings, {"a": data}, tmp_path / "out", evaluate=tmp_path / "test")
    assert report["overlap"]["images"] == 0 and report["overlap"]["examples"] == []
    assert not any("held-out" in entry["event"] for entry in logs)
