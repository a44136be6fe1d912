"""The words of `fedpeft top`, and how the command begins and ends."""

from __future__ import annotations

import errno
import os
import pty
import select
import subprocess
import sys
import termios
import time
from datetime import UTC, datetime

import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from fedpeft.api import views
from fedpeft.api.following import RunSnapshot
from fedpeft.api.round_table import CommittedFigures, RoundFigures
from fedpeft.v1 import federation_service_pb2 as federation
from fedpeft.v1 import operator_service_pb2 as pb
from fedpeft.v1 import run_pb2
from fedpeft_operator.app import main
from fedpeft_operator.top import scene

from .operator_double import START, Double, a_client, a_round, a_run, a_ticket, serving

NOW = datetime.fromtimestamp(START + 100, UTC)


def snapshot(*rounds: run_pb2.Round, **changes: object) -> RunSnapshot:
    return RunSnapshot(a_run(**changes), {each.number: each for each in rounds})


def figures(known: RunSnapshot) -> list[RoundFigures]:
    return CommittedFigures().of(known.committed, known.run)


def test_figures_of_a_committed_round_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made, counted = [], views.counted
    monkeypatch.setattr(views, "counted", lambda round_: made.append(round_.number) or counted(round_))
    known, kept = snapshot(a_round(1), a_round(2), version=2), CommittedFigures()
    first = kept.of(known.committed, known.run)
    assert kept.of(known.committed, known.run) == first and made == [1, 2]
    known.rounds[2] = a_round(2, accuracy=0.5)
    assert [each.metrics.get("accuracy") for each in kept.of(known.committed, known.run)] == [None, 0.5]
    assert made == [1, 2, 2]
    other = RunSnapshot(a_run("run-other"), {1: a_round(1)})
    assert len(kept.of(other.committed, other.run)) == 1 and made == [1, 2, 2, 1]


def test_a_run_in_words() -> None:
    known = snapshot(a_round(1, accuracy=0.5), a_round(2, committed=False), version=1)
    lines = scene.headline(known, figures(known), NOW)
    assert lines == [
        "emoji: bias on vit_tiny, 60 of 1,000,000 parameters (0.01 %)",
        "round 2 of 3: waiting > OPEN > aggregating > committed",
        "1 of 2 received, quorum 1, 8 min 40 s left; waiting for twemoji",
        "accuracy 50.0 % ▁ 50.0 %   loss 1.500   training loss 2.500",
        "sent up 600 B, down 620 B; full fine-tuning 7.63 MiB each way (13,333x)",
    ]


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(-3, "0 s"), (59.4, "59 s"), (60, "1 min 0 s"), (39_998, "11 h 6 min"), (30 * 86_400.0, "30 d 0 h")],
)
def test_time_left_is_said_in_its_two_largest_units(seconds: float, said: str) -> None:
    assert scene.span(seconds) == said


def test_updates_are_counted_towards_those_wanted_and_not_those_sampled() -> None:
    known = snapshot(a_round(1, committed=False))
    known.run.config.rounds.clients, known.run.config.rounds.quorum = 30, 20
    assert scene.waiting_line(known, NOW).startswith("1 of 30 received, quorum 20, ")


def test_a_client_that_hangs_comes_first_and_what_the_others_do_is_said_beside_them() -> None:
    known = snapshot(a_round(1, committed=False))
    state = run_pb2.PROGRESS_STATE_SILENT
    silent = run_pb2.ClientProgress(client="twemoji", run="run-1", state=state, description="no word for 65 s")
    known.run.awaited.append(silent)
    assert scene.waiting_line(known, NOW).endswith("waiting for twemoji (no word for 65 s)")
    hangs, trains = (a_client(name, federation.CLIENT_ROLE_TRAINER, "training") for name in ("twemoji", "noto"))
    hangs.progress.CopyFrom(silent)
    trains.progress.state, trains.progress.step, trains.progress.steps = run_pb2.PROGRESS_STATE_TRAINING, 12, 40
    trains.progress.description = "training, step 12 of 40, 3 s ago"
    rows = scene.clients_table([hangs, trains], None, NOW, "client").rows
    assert [(row[0], row[2], row[-1]) for row in rows] == [
        ("noto", "training 12/40", ""),
        ("twemoji", "silent", "no word for 65 s"),
    ]
    for client, now, why in (
        (hangs, "silent", "no word for 65 s"),
        (trains, "training 12/40", trains.progress.description),
    ):
        client.id = "twemoji"
        found = next(row for row in scene.tickets_table(known, [client], "state").rows if row[0] == "twemoji")
        assert (found[1], found[2], found[-1]) == ("awaited", now, why)


def test_a_run_that_is_paused_over_or_waits_for_figures() -> None:
    paused = snapshot(a_round(1, committed=False), state=run_pb2.RUN_STATE_PAUSED, reason="lunch")
    assert scene.progress_line(paused).startswith("PAUSED; round 1 of 3")
    done = snapshot(a_round(3), state=run_pb2.RUN_STATE_COMPLETED, version=3)
    assert scene.progress_line(done) == "COMPLETED at version 3 of 3"
    assert (
        scene.waiting_line(RunSnapshot(done.run, waiting="waiting for the evaluator"), NOW)
        == "waiting for the evaluator"
    )
    assert scene.scores_line(snapshot(), []) == "accuracy: no version is scored yet"
    by_loss = snapshot(a_round(1), initial_metrics={"loss": 2.0})
    by_loss.rounds[1].metrics["loss"] = 1.0
    assert scene.scores_line(by_loss, figures(by_loss)).startswith("loss 2.000 █▁ 1.000")
    assert scene.bytes_line([]) == "sent up 0 B, down 0 B"


def test_late_and_refused_come_before_the_rest() -> None:
    round_ = a_round(1, committed=False)
    round_.tickets.append(a_ticket("slow", run_pb2.TICKET_STATE_LATE, 1))
    round_.tickets.append(a_ticket("wrong", run_pb2.TICKET_STATE_REFUSED, 1))
    round_.tickets[-1].reason = "PAYLOAD_INVALID: not finite"
    clients = [a_client("twemoji", federation.CLIENT_ROLE_TRAINER, "uploading")]
    table = scene.tickets_table(snapshot(round_), clients, "state")
    assert [row[:3] for row in table.rows] == [
        ("wrong", "refused", ""),
        ("slow", "late", ""),
        ("twemoji", "awaited", "uploading"),
        ("noto", "received", ""),
    ]
    assert scene.note(table, 0) == "wrong: PAYLOAD_INVALID: not finite" == scene.note(table, 3)
    assert scene.note(scene.rounds_table(figures(snapshot(a_round(1)))), 0) == ""
    by_client = scene.tickets_table(snapshot(round_), clients, "client")
    assert [row[0] for row in by_client.rows] == ["noto", "slow", "twemoji", "wrong"]


def test_of_very_many_only_the_first_are_shown_and_the_rest_counted() -> None:
    round_ = a_round(1, committed=False)
    round_.tickets.extend(a_ticket(f"c{n:05}", run_pb2.TICKET_STATE_ISSUED, 1) for n in range(8000))
    table = scene.tickets_table(snapshot(round_), [], "state")
    assert len(table.rows) == scene.MOST_ROWS + 1
    assert table.rows[-1][0] == "and 7,502 more"


def test_clients_say_why_they_do_not_take_part() -> None:
    run = a_run()
    run.declines.append(run_pb2.Decline(client="shy", reasons=["one", "two"], at=Timestamp(seconds=START)))
    clients = [
        a_client(name, federation.CLIENT_ROLE_TRAINER, doing) for name, doing in (("bob", "away"), ("shy", "away"))
    ]
    table = scene.clients_table(clients, run, NOW, "client")
    assert [(row[0], row[4], row[5]) for row in table.rows] == [
        ("bob", "38 s ago", ""),
        ("shy", "38 s ago", "declined: one; two"),
    ]
    assert scene.clients_line(clients) == "2 away"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(-1, "0 s ago"), (59, "59 s ago"), (61, "1 min ago"), (7300, "2 h ago"), (200_000, "2 d ago")],
)
def test_how_long_ago(seconds: float, words: str) -> None:
    assert scene.ago(seconds) == words


def test_a_curve_goes_from_the_lowest_bar_to_the_highest() -> None:
    assert scene.sparkline([0.0, 0.25, 1.0]) == "▁▃█"
    assert scene.sparkline([0.5, 0.5]) == "▁▁"
    assert len(scene.sparkline([n / 100 for n in range(100)])) == 24


def read(terminal: int) -> bytes:
    """Returns what was written since; nothing once the other end is closed."""
    try:
        return os.read(terminal, 65536) if select.select([terminal], [], [], 0.2)[0] else b""
    except OSError as error:
        assert error.errno == errno.EIO
        return b""


def test_the_command_takes_a_terminal_and_gives_it_back() -> None:
    """In a process of its own, behind a real terminal of 80 columns and 24 lines."""
    with serving(Double()) as served:
        served.double.runs = {"run-0123456789ab": a_run()}
        served.double.script = [pb.WatchRunResponse(run=a_run(), rounds=[a_round(1, committed=False)]), 60.0]
        near, far = pty.openpty()
        termios.tcsetwinsize(far, (24, 80))
        command = [sys.executable, "-m", "fedpeft_operator.app", "--server", served.address, "top"]
        environment = {**os.environ, "TERM": "xterm-256color", "NO_COLOR": "1"}
        process = subprocess.Popen(command, stdin=far, stdout=far, stderr=far, env=environment)
        os.close(far)
        seen, until = b"", time.monotonic() + 60
        try:
            while b"OPEN" not in seen and time.monotonic() < until and process.poll() is None:
                seen += read(near)
            assert b"OPEN" in seen and b"run-0123456789ab" in seen, seen[-3000:]
            os.write(near, b"q")
            while process.poll() is None and time.monotonic() < until:  # a terminal that nobody reads would hold it up
                read(near)
            assert process.wait(1) == 0
        finally:
            process.kill()
            process.wait()
            os.close(near)


def test_without_a_terminal_the_command_says_what_to_take(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, serving(Double()) as served:
        main(["--server", served.address, "top"])
    assert ended.value.code == 2
    assert "fedpeft top needs a terminal; for scripts there is: fedpeft run watch ID --json" in capsys.readouterr().err
