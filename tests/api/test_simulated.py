"""`fedpeft.simulate`: the page's example as it stands, and the same run as the command holds it."""

from __future__ import annotations

import json
import re
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

import fedpeft
from fedpeft.data import partitions
from fedpeft.data.partition_writer import write_parts
from fedpeft.data.sources.opening import open_source
from fedpeft.errors import ConfigInvalid, DataInvalid, LocalError, SettingsInvalid
from fedpeft_operator.app import main

from ..data.test_sources import NAMES, table, write

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "python.md").read_text(encoding="utf-8")
(EXAMPLE,) = (code for code in re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S) if "fedpeft.simulate" in code)
RUN_FILE = f"""
name = "emoji"
[model]
name = "vit_tiny_patch16_224"
weights = "none"
image_size = 32
depth = 1
classes = {json.dumps(NAMES)}
[peft]
method = "bias"
[rounds]
count = 2
clients = 3
[training]
batch_size = 8
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the run file and the data that the example names."""
    whole = write(tmp_path / "test.parquet", table(30))
    write_parts(whole, partitions.dirichlet(open_source(whole).labels, 3, 1.0, 3), tmp_path / "sites")
    (tmp_path / "emoji.toml").write_text(RUN_FILE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_page_s_example_runs_and_gives_what_the_command_gives(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names: dict[str, object] = {}
    exec(EXAMPLE, names)
    done = names["done"]
    assert isinstance(done, fedpeft.Simulation) and isinstance(names["model"], timm.models.VisionTransformer)
    printed = capsys.readouterr().out.splitlines()
    said = [line for line in printed if "[warning" not in line]
    assert len(said) == 3 and said[-1].endswith(f"bytes up instead of {done.full_bytes:,}")
    assert (done.state, done.reason, [each.number for each in done.rounds]) == ("completed", "", [1, 2])
    assert done.accuracy == done.rounds[-1].accuracy is not None and done.loss is not None
    assert 0 < done.parameters < done.model_parameters and set(done.initial_metrics) >= {"accuracy", "loss"}
    assert 0 < done.payload_bytes_up < done.full_bytes and done.payload_bytes_down > 0

    with pytest.raises(SystemExit) as ended:
        main(["simulate", "emoji.toml", "--data", "sites", "--out", "other", "--eval", "test.parquet"])
    assert ended.value.code == 0
    other = json.loads((here / "other" / "report.json").read_text())
    assert [row["record_sha256"] for row in other["rounds"]] == [
        row["record_sha256"] for row in done.report["rounds"]
    ], "to the same bits"
    assert json.loads((done.folder / "report.json").read_text()) == done.report
    tuned = done.load().state()
    assert all(np.array_equal(tuned[name], values) for name, values in done.adapter().items())


def test_rounds_are_told_as_they_come_and_what_is_wrong_is_said(here: Path) -> None:
    told: list[fedpeft.SimulatedRound] = []
    done = fedpeft.simulate(fedpeft.load_run_file(Path("emoji.toml")), "sites", "out", committed=told.append)
    assert told == done.rounds and done.accuracy is None
    with pytest.raises(ConfigInvalid, match="bias has no peft form"):
        done.load_peft()
    with pytest.raises(ConfigInvalid, match=r"peft\.method"):
        fedpeft.simulate({"model": {"name": "x", "classes": ["a", "b"]}, "peft": {}}, "sites", "out")


@pytest.mark.parametrize("argument", ["data", "out", "evaluate", "weights", "label_map"])
def test_an_argument_that_is_no_path_is_named(here: Path, argument: str) -> None:
    given: dict[str, object] = {"data": "sites", "out": "out", argument: object()}
    with pytest.raises(SettingsInvalid, match=rf"^{argument} is a path, .*a object was given"):
        fedpeft.simulate("emoji.toml", **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("argument", ["run", "data", "out", "evaluate", "weights", "label_map"])
def test_an_empty_argument_is_not_the_folder_here(here: Path, argument: str) -> None:
    given: dict[str, object] = {"run": "emoji.toml", "data": "sites", "out": "out", argument: ""}
    with pytest.raises(SettingsInvalid, match=rf"^{argument} is empty: a variable that is not set, perhaps$"):
        fedpeft.simulate(**given)  # type: ignore[arg-type]
    assert not (here / "out").exists()


@pytest.mark.parametrize("track", ["tensorboard", 5, [5]])
def test_trackers_are_a_list_of_texts(here: Path, track: object) -> None:
    with pytest.raises(SettingsInvalid, match=r"^track is a list of texts; .* was given$"):
        fedpeft.simulate("emoji.toml", "sites", "out", track=track)  # type: ignore[arg-type]


def test_a_run_file_without_classes_has_those_of_the_data(here: Path) -> None:
    import datasets

    def has(done: fedpeft.Simulation) -> list[str]:
        return list(done.config.model.classes)

    def opened(path: str) -> datasets.Dataset:
        return datasets.Dataset.from_parquet(path, cache_dir=str(here / "cache"))

    text = re.sub("classes = .*", "", RUN_FILE)
    (here / "emoji.toml").write_text(text)
    assert has(fedpeft.simulate("emoji.toml", "sites", "by-path")) == list(NAMES)
    parts = {f"site-{k}": opened("test.parquet").select(range(k * 10, k * 10 + 10)) for k in range(3)}
    assert has(fedpeft.simulate(tomllib.loads(text), parts, "by-client")) == list(NAMES)
    run = tomllib.loads(text) | {"simulation": {"clients": 3}}
    (here / "map.toml").write_text('dog = "cat"\nemu = "bird"\n')
    renamed = fedpeft.simulate(run, opened("test.parquet"), "renamed", evaluate="test.parquet", label_map="map.toml")
    assert has(renamed) == ["cat", "bird"]
    with pytest.raises(DataInvalid, match=r"^data has 1 class, 'cat'; a run needs at least 2"):
        fedpeft.simulate(run, Letters(["a"] * 8), "out")
    with pytest.raises(ConfigInvalid, match=r"^emoji\.toml:\d+: rounds\.count: "):
        (here / "emoji.toml").write_text(text.replace("count = 2", "count = 0"))
        fedpeft.simulate("emoji.toml", "sites", "out")


class Letters(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """A data set of torch with labels of text, all of one class."""

    def __init__(self, items: list[str]) -> None:
        self.items, self.classes = items, ["cat"]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, row: int) -> tuple[np.ndarray, int]:
        return np.zeros((4, 4, 3), np.uint8), 0


def test_an_interrupted_simulation_leaves_no_report_of_an_earlier_one(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fedpeft.simulate("emoji.toml", "sites", "out")
    assert (here / "out" / "report.json").exists()

    def interrupted(row: fedpeft.SimulatedRound) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fedpeft.simulate("emoji.toml", "sites", "out", committed=interrupted)
    left = sorted(path.name for path in (here / "out").iterdir())
    assert left == ["adapter.safetensors", "records.jsonl", "unfinished"]
    assert len((here / "out" / "records.jsonl").read_text().splitlines()) == 1


def test_what_a_simulation_left_is_opened_again(here: Path) -> None:
    done = fedpeft.simulate("emoji.toml", data="sites", out="simulated", evaluate="test.parquet")
    again = fedpeft.Simulation("simulated")
    assert again.report == done.report and again.folder == Path("simulated")
    assert again.config.peft.method == "bias" and again.config.simulation is None
    assert all(np.array_equal(values, done.adapter()[name]) for name, values in again.adapter().items())
    frame = again.to_frame()
    assert list(frame.columns) == ["version", "payload_bytes", "seconds", "accuracy", "loss"]
    assert list(frame.version) == [0, 1, 2]
    assert frame.payload_bytes.iloc[-1] == again.payload_bytes_up + again.payload_bytes_down
    assert frame.accuracy.iloc[-1] == again.accuracy
    html = again._repr_html_()
    assert html.count("<tr>") == 3 and "completed at version 2" in html
    with pytest.raises(DataInvalid, match="holds no results of a simulation"):
        fedpeft.Simulation("sites")
    with pytest.raises(SettingsInvalid, match="folder is a path"):
        fedpeft.Simulation(3)  # type: ignore[arg-type]


def test_a_data_frame_without_pandas_says_what_to_install(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fedpeft.simulate("emoji.toml", data="sites", out="simulated")
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(LocalError, match="pip install pandas"):
        fedpeft.Simulation("simulated").to_frame()


def test_a_model_whose_tensors_stay_at_clients_is_said_to_be_none_of_theirs(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "emoji.toml").write_text(RUN_FILE.replace('"bias"', '"fedsa_lora"'))
    done = fedpeft.simulate("emoji.toml", data="sites", out="simulated")
    assert {name.rsplit(".", 2)[1] for name in done.adapter()} == {"lora_A"}
    capsys.readouterr()
    done.load()
    assert "tensors that stay at clients are as they began" in capsys.readouterr().out
    kept = json.loads((here / "simulated" / "report.json").read_text())["rounds"][-1]
    assert kept["payload_bytes_up"] == 3 * 4 * sum(values.size for values in done.adapter().values())


def test_data_sets_of_a_program_give_the_bits_of_the_same_files(here: Path) -> None:
    import datasets

    whole = here / "test.parquet"
    run = tomllib.loads(RUN_FILE) | {"simulation": {"clients": 3}}
    loaded = datasets.Dataset.from_parquet(str(whole), cache_dir=str(here / "cache"))
    by_path = fedpeft.simulate(run, whole, "by-path", evaluate=whole)
    given = fedpeft.simulate(run, loaded, "given", evaluate=loaded)
    assert given.accuracy == by_path.accuracy
    for name, tensor in by_path.adapter().items():
        np.testing.assert_array_equal(given.adapter()[name], tensor)
    parts = {f"site-{k}": loaded.select(range(k * 10, k * 10 + 10)) for k in range(3)}
    by_client = fedpeft.simulate(tomllib.loads(RUN_FILE), parts, "by-client", evaluate=str(whole))
    assert {client for each in by_client.rounds for client in each.clients} == set(parts)
    assert by_client.report["partition"] is None


def test_a_limit_of_pixels_is_that_of_a_data_set_that_was_asked_for_its_classes_too(here: Path) -> None:
    import datasets

    loaded = datasets.Dataset.from_parquet("test.parquet", cache_dir=str(here / "cache"))
    text = re.sub("classes = .*", "", RUN_FILE)
    run = tomllib.loads(text) | {"simulation": {"clients": 3, "max_image_pixels": 15}}
    with pytest.raises(DataInvalid, match="4 x 4 pixels, more than 15 pixels"):
        fedpeft.simulate(run, loaded, "out")
