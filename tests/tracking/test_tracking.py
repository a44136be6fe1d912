"""Cost of a tracker that fails, or does not answer, to a run: a line and a count."""

import sys
import threading
import time

import pytest
import structlog

from fedpeft.tracking import Tracker, Tracking, shown, tracking
from fedpeft.tracking.figures import tracked_run

from .test_trackers import REPORT, row


class Sink(Tracker):
    """Keeps what it gets; the first `faults` calls of `round` fail."""

    module = extra = "sink"

    def __init__(self, faults=0, text=""):
        self.text = text
        self.faults, self.got, self.ended, self.known = faults, [], [], set()

    def begin(self, run):
        return self.known

    def round(self, number, figures, at):
        if self.faults:
            self.faults -= 1
            raise OSError("the disk is full")
        self.got.append((number, sorted(figures), at))

    def end(self, state):
        self.ended.append(state)


def follow(sink):
    with structlog.testing.capture_logs() as said, Tracking([sink]) as followed:
        followed.begin({**REPORT, "initial_metrics": {}})
        followed.round(row(1))
        followed.round(row(2))
        followed.end("completed")
    return followed, said


def test_figures_that_are_there_are_not_written_again():
    sink = Sink()
    sink.known = {(1, name) for name in ("clients", "seconds", "extensions", "train_loss")}
    follow(sink)
    up_down = ["full_bytes_each_way", "payload_bytes_down", "payload_bytes_up"]
    assert sink.got[0] == (1, up_down, 1767323101.0)
    assert sink.got[1][1] == sorted([*up_down, "clients", "seconds", "extensions", "train_loss"])
    assert sink.ended == ["completed"]


def test_what_was_not_taken_is_offered_again():
    sink = Sink(faults=1)
    followed, said = follow(sink)
    assert sorted(number for number, *_ in sink.got) == [1, 2] and followed.missed == {}
    (line,) = said
    assert line["event"] == "tracker failed: the run goes on" and line["cause"] == "OSError: the disk is full"


def test_a_round_that_a_sink_refuses_keeps_no_other_back(monkeypatch):
    sink, take = Sink(), Sink.round

    def fussy(number, figures, at):
        if number == 1:
            raise ValueError("not a name")
        take(sink, number, figures, at)

    monkeypatch.setattr(sink, "round", fussy)
    followed, _ = follow(sink)
    assert [number for number, *_ in sink.got] == [2] and followed.missed == {"sink": 1}
    assert sink.ended == ["completed"]


def test_what_is_never_taken_is_counted():
    followed, said = follow(Sink(faults=10**9))
    assert followed.missed == {"sink": 2}
    assert said[-1]["event"] == "tracker misses rounds" and said[-1]["rounds"] == 2


def test_a_library_that_would_end_the_program_is_a_failure_like_any_other(monkeypatch):
    sink = Sink()
    monkeypatch.setattr(sink, "begin", lambda run: sys.exit("no licence"))
    followed, said = follow(sink)
    assert followed.missed == {"sink": 2} and sink.ended == []
    assert [line["event"] for line in said] == ["tracker failed: the run goes on", "tracker misses rounds"]
    assert said[0]["cause"] == "SystemExit: no licence" and said[1]["failures"] > 1


def test_a_tracker_of_a_run_that_never_begins_is_not_begun(monkeypatch):
    sink, threads = Sink(), threading.active_count()
    with structlog.testing.capture_logs() as said:
        followed = Tracking([sink])
        assert threading.active_count() == threads
        followed.end("failed")
    assert sink.ended == [] and said == [] and followed.missed == {}


def test_a_tracker_that_does_not_answer_delays_the_end_by_a_bound(monkeypatch):
    monkeypatch.setattr(tracking, "END_S", 0.05)
    answered, sink = threading.Event(), Sink()
    monkeypatch.setattr(sink, "begin", lambda run: answered.wait() and set())
    try:
        followed, said = follow(sink)
        assert [line["event"] for line in said] == [
            "waiting for tracker",
            "tracker does not answer: the run ends without it",
        ]
        assert [line["rounds"] for line in said] == [2, 2], "also those that no call of it was made for"
        assert followed.missed == {"sink": 2} and followed.silent == {"sink"}
    finally:
        answered.set()


def test_of_two_trackers_of_one_kind_each_has_what_it_missed(monkeypatch):
    silent, sink, answered = Sink(text="sink=one"), Sink(text="sink=two"), threading.Event()
    monkeypatch.setattr(silent, "begin", lambda run: answered.wait() and set())
    try:
        with Tracking([silent, sink], unanswered_s=0.05) as followed:
            followed.begin({**REPORT, "initial_metrics": {}})
            followed.round(row(1))
            followed.end("completed")
        assert followed.missed == {"sink=one": 1}
        assert [number for number, *_ in sink.got] == [1]
    finally:
        answered.set()


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        ("mlflow=http://me:p@ss@host:5000/a?token=b", "mlflow=http://host:5000/a"),
        ("mlflow=sqlite:///runs.db", "mlflow=sqlite:///runs.db"),
        ("tensorboard=at@home/boards", "tensorboard=at@home/boards"),
        ("wandb", "wandb"),
    ],
)
def test_what_is_secret_of_a_target_is_not_shown(asked, text):
    assert shown(asked) == text


def test_a_tracker_that_has_answered_is_waited_for_longer_than_one_that_never_did(monkeypatch):
    monkeypatch.setattr(tracking, "END_S", 20)
    sink, slow = Sink(), threading.Event()
    monkeypatch.setattr(sink, "end", lambda state: (slow.wait(0.3), sink.ended.append(state)))
    with Tracking([sink], unanswered_s=0.05) as followed:
        followed.begin({**REPORT, "initial_metrics": {}})
        while not followed._sinks[0].has_answered:
            time.sleep(0.01)
        followed.end("completed")
    assert (followed.missed, sink.ended) == ({}, ["completed"])


def test_the_label_of_a_run_of_many_axes_is_a_name_for_a_file():
    run = tracked_run({**REPORT, "name": "näme=" * 90, "run": "0123456789abcdef"}, simulated=False)
    assert run.label.endswith("me_-0123456789abcdef") and len(run.label.encode()) <= 200


def test_a_tracker_that_hangs_in_its_last_call_does_not_have_everything(monkeypatch):
    monkeypatch.setattr(tracking, "END_S", 0.05)
    answered, sink = threading.Event(), Sink()
    monkeypatch.setattr(sink, "end", lambda state: answered.wait())
    try:
        followed, _ = follow(sink)
        assert followed.missed == {"sink": 0} and followed.silent == {"sink"}
    finally:
        answered.set()


@pytest.mark.parametrize(("error", "state"), [(KeyboardInterrupt, "interrupted"), (ValueError, "failed")])
def test_a_run_that_is_left_has_a_state(error, state):
    sink = Sink()
    with pytest.raises(error), Tracking([sink]) as followed:
        followed.begin(REPORT)
        raise error
    assert sink.ended == [state]
