"""The folder of a simulation's results: what is foreign there is not touched, what a simulation left is no obstacle."""

import json
import shutil
from pathlib import Path

import pytest

from fedpeft.errors import SettingsInvalid, StateInvalid
from fedpeft.simulation import check_apart, check_folder, simulate

from ..data.test_sources import table, write
from .simulated_runs import clients, config
from .test_resume import TWO_ROUNDS, stopped_after_one_round

BUFFERED = {"policy": "buffered", "count": 2, "clients": 2, "concurrency": 2, "quorum": 1}


def content(folder):
    return {str(path.relative_to(folder)): path.is_file() and path.read_bytes() for path in folder.rglob("*")}


@pytest.mark.parametrize(
    ("foreign", "named"),
    [
        ({"report.json": "[1, 2]"}, "report.json is not the report of a simulation"),
        ({"report.json": "a quarterly report"}, "report.json is not the report of a simulation"),
        ({"report.json": json.dumps({"run": "r", "rounds": []})}, "report.json is not the report of a simulation"),
        ({"unfinished/novel.txt": "Call me"}, "unfinished/novel.txt is not of an unfinished simulation"),
        ({"unfinished/adapter-1/a": "x"}, "unfinished/adapter-1 is not of an unfinished simulation"),
        ({"unfinished/progress.jsonl": "", "unfinished/z": "x"}, "unfinished/z is not of an unfinished simulation"),
        ({"unfinished": "x"}, "unfinished is not the folder of an unfinished simulation"),
    ],
)
def test_what_is_foreign_is_named_and_not_touched(tmp_path, folders, foreign, named):
    out = tmp_path / "out"
    for name, text in foreign.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(text)
    before = content(out)
    with pytest.raises(StateInvalid, match=f"{named}, .*: move it away, or name another folder"):
        simulate(TWO_ROUNDS, clients(folders), out)
    assert content(out) == before


def test_results_do_not_lie_among_data_nor_among_a_study_s(tmp_path, folders):
    photos = tmp_path / "photos"
    (photos / "cat").mkdir(parents=True)
    for out in (photos, photos / "out", photos / "cat" / ".." / "out"):
        with pytest.raises(SettingsInvalid, match=r"is in the data .*photos, and would be read as data"):
            check_apart(out, [None, photos])
        with pytest.raises(SettingsInvalid):
            check_apart(out, [Path("text:") / photos, Path(f"text:{photos}")])
    check_apart(tmp_path / "photos-out", [photos])
    write(photos / "train.parquet", table(6))
    check_apart(photos / "out", [photos / "train.parquet"])
    (tmp_path / "study.json").write_text("{}")
    with pytest.raises(StateInvalid, match="has the results of a study"):
        simulate(TWO_ROUNDS, clients(folders), tmp_path)


def test_no_state_in_which_a_kill_leaves_a_simulation_is_foreign(tmp_path, folders):
    out = tmp_path / "out"
    check_folder(out)
    settings = {"aggregation": {"strategy": "fedadam"}, "codec": {"up": "sparse", "density": 0.2}}
    stopped_after_one_round(out, clients(folders), run=config("head", rounds={"count": 2, "clients": 2}, **settings))
    left = sorted((out / "unfinished").iterdir())
    assert [path.name for path in left] == ["adapter-0", "adapter-1", "memory", "progress.jsonl", "state-1"]
    for path in (*left, out / "unfinished"):  # its removal ends between any two of them
        check_folder(out)
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    check_folder(out)


def test_a_finished_and_a_buffered_simulation_are_no_obstacle(tmp_path, folders):
    stopped_after_one_round(tmp_path, clients(folders), run=config(rounds=BUFFERED))
    assert not (tmp_path / "unfinished" / "progress.jsonl").exists()
    for _ in range(2):
        simulate(TWO_ROUNDS, clients(folders), tmp_path)
        check_folder(tmp_path)
