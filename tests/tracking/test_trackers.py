"""Each tracker: what a run left in it, by the library's own reader; a run followed again doubles nothing."""

import sqlite3
import struct
from types import SimpleNamespace

import pytest
from structlog.testing import capture_logs

from fedpeft.errors import ConfigInvalid, LocalError
from fedpeft.tracking import tracker, tracker_named, tracking_to
from fedpeft.tracking.figures import tracked_run

from ..outside_package import install

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")  # the libraries' own

REPORT = {
    "run": "run-0a1b2c3d4e5f",
    "name": "emoji of sites",
    "created_at": "2026-01-02T03:04:05.000Z",
    "method": "bias",
    "adapter_parameters": 12,
    "model_parameters": 1200,
    "backbone_fingerprint": "ab",
    "initial_metrics": {"accuracy": 0.25},
    "config": {"rounds": {"count": 2}, "model": {"classes": ["cat", "dog"]}},
}


def row(number, **metrics):
    return {
        "version": number,
        "clients": ["a", "b"],
        "metrics": {"train_loss": 1.0 / number, **metrics},
        "seconds": 1.5,
        "payload_bytes_up": 96,
        "payload_bytes_down": 48,
        "wire_bytes_up": None,
        "wire_bytes_down": None,
        "full_bytes_each_way": 9600,
        "extensions": 0,
        "committed_at": f"2026-01-02T03:05:0{number}.000Z",
    }


def follow(name, folder, state="completed", rows=(), report=REPORT):
    with capture_logs() as said:  # away from stdout, where a test looks for the words of the tracker's library
        tracking = tracking_to([name], folder)
        tracking.begin(report)
        for each in rows:
            tracking.round(each)
        tracking.end(state)
    assert tracking.missed == {}
    assert {line["event"] for line in said} <= {"waiting for tracker"}  # a loaded machine may be that slow


def follow_thrice(name, folder):
    """A run that is followed, left, followed again from its beginning, and scored late."""
    follow(name, folder, "running", [row(1, **{"accuracy/smiley: ☺": 0.5})])
    follow(name, folder, "running", [row(1, **{"accuracy/smiley: ☺": 0.5}), row(2)])
    follow(name, folder, "completed", [row(1), row(2), row(2, accuracy=0.75)])


def test_tensorboard_has_each_point_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import metadata

    follow_thrice(f"tensorboard={tmp_path / 'boards'}", tmp_path)
    (folder,) = (tmp_path / "boards").iterdir()
    assert folder.name == "emoji_of_sites-run-0a1b2c3d4e5f"
    events = EventAccumulator(str(folder)).Reload()

    def points(tag):  # files of one second are read in the order of their names, in which 10 is before 9
        return sorted((event.step, event.value) for event in events.Scalars(tag))

    assert points("train_loss") == [(1, 1.0), (2, 0.5)]
    assert points("accuracy") == [(0, 0.25), (2, 0.75)]
    assert points("payload_bytes_up") == [(1, 96.0), (2, 96.0)]
    assert points("accuracy/smiley: ☺") == [(1, 0.5)]
    assert "wire_bytes_up" not in events.Tags()["scalars"]
    started = events.SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
    settings = metadata.parse_session_start_info_plugin_data(started).hparams
    assert settings["rounds.count"].string_value == "2" and settings["method"].string_value == "bias"


def test_mlflow_has_each_point_once(tmp_path):
    from mlflow import MlflowClient
    from mlflow.telemetry.utils import is_telemetry_disabled

    store = f"sqlite:///{tmp_path / 'runs.db'}"
    follow_thrice(f"mlflow={store}", tmp_path)
    client = MlflowClient(store)
    (run,) = client.search_runs([client.get_experiment_by_name("fedpeft").experiment_id])
    assert is_telemetry_disabled()
    assert run.info.status == "FINISHED" and run.info.run_name == "emoji of sites"
    assert run.data.params == {"rounds.count": "2", "model.classes": '["cat", "dog"]'}
    assert run.data.tags["fedpeft.run"] == "run-0a1b2c3d4e5f" and run.data.tags["fedpeft.method"] == "bias"
    assert points(client, run, "train_loss") == [(1, 1.0), (2, 0.5)]
    assert points(client, run, "accuracy") == [(0, 0.25), (2, 0.75)]
    assert points(client, run, "accuracy/smiley_ _") == [(1, 0.5)]
    follow(f"mlflow={store}", tmp_path, "failed", report={**REPORT, "run": "run-1"})
    assert len(client.search_runs([run.info.experiment_id])) == 2


def points(client, run, name):
    return [(each.step, each.value) for each in client.get_metric_history(run.info.run_id, name)]


def test_trackio_has_each_point_once(tmp_path, monkeypatch, capsys):
    from trackio import sqlite_storage, utils

    for module in (sqlite_storage, utils):
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path)
    follow_thrice("trackio=sites", tmp_path)
    logs = sqlite_storage.SQLiteStorage.get_logs("sites", "emoji_of_sites-run-0a1b2c3d4e5f")
    assert [(each["step"], each["train_loss"]) for each in logs if "train_loss" in each] == [(1, 1.0), (2, 0.5)]
    assert [(each["step"], each["accuracy"]) for each in logs if "accuracy" in each] == [(0, 0.25), (2, 0.75)]
    assert capsys.readouterr().out == ""


def test_wandb_has_each_point_once(tmp_path, monkeypatch, capsys):
    import wandb
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    follow_thrice("wandb=sites", tmp_path)
    assert capsys.readouterr().out == ""
    wandb.teardown()  # its process closes the files after a run's end
    history, names = [], set()
    for file in sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb")):
        for data in records(file.read_bytes()):
            record = wandb_internal_pb2.Record.FromString(data)
            names.add((record.run.project, record.run.display_name))
            history += [{"/".join(i.nested_key) or i.key: i.value_json for i in record.history.item}]
    assert ("sites", "emoji of sites") in names
    assert not list((tmp_path / "wandb").rglob("requirements.txt"))
    assert sorted((each["round"], each["train_loss"]) for each in history if "train_loss" in each) == [
        ("1", "1"),
        ("2", "0.5"),
    ]
    assert sorted((each["round"], each["accuracy"]) for each in history if "accuracy" in each) == [
        ("0", "0.25"),
        ("2", "0.75"),
    ]


def test_wandb_says_that_points_may_be_lost_where_a_process_was_killed(tmp_path, monkeypatch):
    import wandb

    run = SimpleNamespace(define_metric=lambda *_, **__: None, log=lambda _: None, summary={}, finish=lambda **_: None)
    monkeypatch.setattr(wandb, "init", lambda **_: run)
    followed = tracked_run(REPORT, simulated=False)

    def begun():
        with capture_logs() as said:
            tracker = tracker_named("wandb", tmp_path)
            tracker.begin(followed)
        return tracker, [line["event"].partition(":")[0] for line in said]

    tracker, said = begun()
    assert said == []
    tracker.round(1, {"train_loss": 0.5}, 7.0)
    tracker, said = begun()
    assert said == ["a process of this run was killed"]
    tracker.end("interrupted")
    tracker, said = begun()
    assert said == []


def test_a_file_of_mlflow_that_a_kill_left_half_made_is_made_again(tmp_path):
    from mlflow import MlflowClient

    with sqlite3.connect(tmp_path / "runs.db.begun") as half:
        half.execute("create table logged_models (a)")
    follow(f"mlflow=sqlite:///{tmp_path / 'runs.db'}", tmp_path, "completed", [row(1)])
    (run,) = MlflowClient(f"sqlite:///{tmp_path / 'runs.db'}").search_runs(["1"])
    assert run.data.metrics["train_loss"] == 1.0
    assert sorted(path.name for path in tmp_path.iterdir() if "db" in path.name) == ["runs.db"]


@pytest.mark.parametrize("torn", ['[2, ["train_lo', "[2"])
def test_wandb_takes_no_torn_line_for_points_that_it_handed_over(tmp_path, monkeypatch, torn):
    import wandb

    logged = []
    run = SimpleNamespace(define_metric=lambda *_, **__: None, log=logged.append)
    monkeypatch.setattr(wandb, "init", lambda **_: run)
    monkeypatch.setattr(wandb, "Settings", lambda **_: None)
    file = tmp_path / "wandb" / "emoji_of_sites-run-0a1b2c3d4e5f.points"
    file.parent.mkdir()
    file.write_text('[1, ["clients", "train_loss"]]\n' + torn)
    tracker = tracker_named("wandb", tmp_path)
    followed = tracked_run(REPORT, simulated=False)
    assert tracker.begin(followed) == {(1, "clients"), (1, "train_loss")}
    tracker.round(2, {"train_loss": 0.5}, 7.0)
    assert logged == [{"round": 2, "committed_at": 7.0, "train_loss": 0.5}]
    assert tracker.begin(followed) == {(1, "clients"), (1, "train_loss"), (2, "train_loss")}


def test_wandb_notes_no_point_that_the_library_refused(tmp_path, monkeypatch):
    import wandb

    def refuse(figures):
        assert "3" in file.read_text(), "noted before it is handed over: a kill in between doubles nothing"
        raise OSError("no space")

    run = SimpleNamespace(define_metric=lambda *_, **__: None, log=refuse)
    monkeypatch.setattr(wandb, "init", lambda **_: run)
    file = tmp_path / "wandb" / "emoji_of_sites-run-0a1b2c3d4e5f.points"
    tracker = tracker_named("wandb", tmp_path)
    followed = tracked_run(REPORT, simulated=False)
    assert tracker.begin(followed) == set()
    with pytest.raises(OSError, match="no space"):
        tracker.round(3, {"train_loss": 0.5}, 7.0)
    assert tracker.begin(followed) == set() and file.read_bytes() == b""


def records(data):
    """Yields the records of a .wandb file: LevelDB's log format behind a header of 7 bytes."""
    at, record = 7, b""
    while at < len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield record
            record = b""


def test_what_is_not_there_is_said(tmp_path, monkeypatch):
    with pytest.raises(
        ConfigInvalid, match=r"there is no tracker 'tensorbord'; there are: mlflow, tensorboard, trackio, wandb"
    ):
        tracker_named("tensorbord", tmp_path)
    monkeypatch.setattr(tracker.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LocalError, match=r'tracker mlflow needs mlflow, .*: pip install "fedpeft\[mlflow\]"'):
        tracker_named("mlflow", tmp_path)


LINES = """
from fedpeft.tracking import Tracker


class Lines(Tracker):
    module = extra = "json"

    def begin(self, run):
        return set()

    def round(self, number, figures, at):
        with open(self.target, "a") as lines:
            print(number, figures["train_loss"], file=lines)

    def end(self, state):
        with open(self.target, "a") as lines:
            print(state, file=lines)
"""


def test_an_installed_package_brings_a_tracker(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, LINES, {"fedpeft.tracking/lines": "Lines"})
    follow(f"lines={tmp_path / 'a=b.txt'}", tmp_path, rows=[row(1), row(2)], report={**REPORT, "initial_metrics": {}})
    assert (tmp_path / "a=b.txt").read_text() == "1 1.0\n2 0.5\ncompleted\n"
