"""The ledger: booked before it leaves, whole after a crash at any byte, never less than what left."""

from __future__ import annotations

import resource
import shutil
import signal
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.errors import RoundClosed, ServerUnreachable, StateInvalid, TurnOver
from fedpeft_client.egress.entries import FILE, Kind, Outcome, read
from fedpeft_client.egress.log import QUESTIONS_BYTES, EgressLog
from fedpeft_client.egress.view import rows, totals

from .entries import answer, update


def test_what_left_is_booked_before_and_after(tmp_path: Path) -> None:
    with EgressLog(tmp_path, "127.0.0.1:7070") as egress_log:
        with egress_log.record(answer()):
            assert [b.outcome for b in read(egress_log.path).booked.values()] == [Outcome.OPEN], (
                "booked before it leaves"
            )
            egress_log.sending(20)
        with egress_log.record(update(200)):
            egress_log.sending(100)
            egress_log.sending(50)
    first, second = read(tmp_path / FILE).booked.values()
    assert (first.outcome, first.entry.wire_bytes) == (Outcome.RECEIVED, 20)
    assert (second.outcome, second.entry.wire_bytes, second.entry.name) == (Outcome.RECEIVED, 150, "emoji")
    assert second.server == "127.0.0.1:7070" and second.ended is not None and second.ended >= second.at
    assert (tmp_path / FILE).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (RoundClosed("too late"), Outcome.REFUSED),
        (TurnOver("others wait"), Outcome.UNFINISHED),
        (ServerUnreachable("gone"), Outcome.UNFINISHED),
        (StateInvalid("cannot read the update"), Outcome.UNFINISHED),
        (KeyboardInterrupt(), Outcome.UNFINISHED),
    ],
)
def test_what_became_of_it(tmp_path: Path, error: BaseException, outcome: Outcome) -> None:
    with EgressLog(tmp_path, "s:1") as egress_log, pytest.raises(type(error)), egress_log.record(update(200)):
        egress_log.sending(80)
        raise error
    (only,) = read(tmp_path / FILE).booked.values()
    assert only.outcome is outcome and only.entry.wire_bytes == 80
    assert str(error) in only.words


@settings(max_examples=60)
@given(cut=st.integers(0, 1200))
def test_a_ledger_cut_at_any_byte_goes_on_and_never_tells_less_than_what_it_had_booked(
    cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    with EgressLog(folder, "s:1") as egress_log, egress_log.record(update(200)):
        egress_log.sending(120)
    whole = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(whole[:cut])
    before = list(read(folder / FILE).booked.values())
    known = [] if cut < whole.index(b"\n") else [200] if cut < len(whole) - 1 else [120]
    assert [each.entry.wire_bytes for each in before] == known
    with EgressLog(folder, "s:1") as egress_log, egress_log.record(answer()):
        assert egress_log.day.left_since(datetime.now(UTC) - timedelta(hours=1)) == 20 + sum(known)
    after = list(read(folder / FILE).booked.values())
    assert after[:-1] == before and after[-1].entry.kind is Kind.ANSWER, "a torn line takes no other with it"


def test_nothing_leaves_when_the_ledger_cannot_be_written(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    sent = []
    try:
        with EgressLog(tmp_path, "s:1") as egress_log:
            with egress_log.record(answer()):
                egress_log.sending(20)
                sent.append(1)
            size = egress_log.path.stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 40, before[1]))  # half a line fits
            with (
                pytest.raises(StateInvalid, match="nothing leaves this device without it"),
                egress_log.record(update(9)),
            ):
                sent.append(2)
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            with egress_log.record(update(10)):
                egress_log.sending(10)
                sent.append(3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert sent == [1, 3]
    contents = read(tmp_path / FILE)
    assert [b.entry.wire_bytes for b in contents.booked.values()] == [20, 10] and contents.unreadable == 1


@pytest.mark.parametrize(
    "line",
    ["null", "5", "[]", '"carried"', "{}", '{"carried": []}', '{"carried": {"names": [], "tickets": {}}}', '{"at": 7}'],
)
def test_a_line_of_another_form_is_counted_and_the_others_are_read(tmp_path: Path, line: str) -> None:
    with EgressLog(tmp_path, "s:1") as egress_log, egress_log.record(answer()):
        egress_log.sending(20)
    with (tmp_path / FILE).open("a") as file:
        file.write(line + "\n")
    contents = read(tmp_path / FILE)
    assert [b.entry.wire_bytes for b in contents.booked.values()] == [20] and contents.unreadable == 1


@given(attempts=st.lists(st.integers(1, 1000), max_size=60), planned=st.integers(1, 1000))
@settings(max_examples=40)
def test_repetitions_are_in_the_file_before_they_leave_and_in_few_lines(
    attempts: list[int], planned: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, left = tmp_path_factory.mktemp("repeated"), 0
    with EgressLog(folder, "s:1") as egress_log:
        with egress_log.record(answer(planned)):
            for each in attempts:
                egress_log.sending(each)
                left += each
                (only,) = read(egress_log.path).booked.values()
                assert only.outcome is Outcome.OPEN and only.entry.wire_bytes >= left
                assert egress_log.day.left_since(only.at) == only.entry.wire_bytes
        (only,) = read(egress_log.path).booked.values()
        assert (only.outcome, only.entry.wire_bytes) == (Outcome.RECEIVED, left) and only.at <= only.latest
        assert egress_log.day.left_since(only.at) == left
        assert egress_log.path.read_bytes().count(b"\n") <= 2 + max(left, 1).bit_length()


def test_the_day_of_a_repetition_begins_when_it_left(tmp_path: Path) -> None:
    with EgressLog(tmp_path, "s:1") as egress_log, egress_log.record(answer(20)):
        egress_log.sending(20)
        time.sleep(0.005)  # times are in milliseconds in the file
        between = datetime.now(UTC)
        time.sleep(0.005)
        egress_log.sending(20)
        (tmp_path / "copy").mkdir()
        shutil.copy(egress_log.path, tmp_path / "copy")
    with EgressLog(tmp_path / "copy", "s:1") as after_a_kill:
        (only,) = read(after_a_kill.path).booked.values()
        assert only.at < between < only.latest and only.ended is None
        assert after_a_kill.day.left_since(between) == 40


def test_what_nobody_booked_does_not_leave(tmp_path: Path) -> None:
    with EgressLog(tmp_path, "s:1") as egress_log:
        with pytest.raises(RuntimeError, match="without an entry in the ledger"):
            egress_log.sending(1)
        with (
            egress_log.record(answer()),
            pytest.raises(RuntimeError, match="update was booked while answer"),
            egress_log.record(update(1)),
        ):
            pass


def test_questions_are_booked_together_and_ahead(tmp_path: Path) -> None:
    with EgressLog(tmp_path, "s:1") as egress_log:
        for _ in range(QUESTIONS_BYTES // 100 + 1):
            egress_log.polling(100)
        first, second = read(egress_log.path).booked.values()
        assert first.entry.wire_bytes == QUESTIONS_BYTES // 100 * 100 and first.outcome is Outcome.RECEIVED
        assert second.entry.wire_bytes == QUESTIONS_BYTES and second.outcome is Outcome.OPEN
    assert [b.entry.wire_bytes for b in read(tmp_path / FILE).booked.values()][1] == 100


def test_the_bytes_of_a_day_survive_a_restart_and_run_out(tmp_path: Path) -> None:
    with EgressLog(tmp_path, "s:1") as egress_log, egress_log.record(update(200, "ticket-1")):
        egress_log.sending(300)  # it took more than was planned
    with EgressLog(tmp_path, "s:1") as egress_log:
        now = datetime.now(UTC)
        assert egress_log.day.left_since(now - timedelta(days=1)) == 300
        assert egress_log.tickets("run-1") == {"ticket-1"} and egress_log.tickets("run-2") == frozenset()
        assert egress_log.day.falls_below(300, now) == now
        assert now < egress_log.day.falls_below(299, now) <= now + timedelta(days=1)


def test_what_did_not_leave_after_all_gives_no_room_a_day_later(tmp_path: Path) -> None:
    with EgressLog(tmp_path, "s:1") as egress_log:
        with pytest.raises(ServerUnreachable), egress_log.record(update(1000)):
            between = datetime.now(UTC)
            time.sleep(0.005)  # times are in milliseconds in the file
            egress_log.sending(10)
            raise ServerUnreachable("gone")
        time.sleep(0.005)
        egress_log.polling(QUESTIONS_BYTES + 100)
        asked = datetime.now(UTC)
    assert egress_log.day.left_since(between) == 10 + QUESTIONS_BYTES + 100, "not less than nothing"
    assert egress_log.day.left_since(asked) == QUESTIONS_BYTES + 100, "it may have left until it was over"
    with EgressLog(tmp_path, "s:1") as again:
        assert again.day.left_since(between) == egress_log.day.left_since(between)


def test_the_uploads_of_an_update_are_one_row(tmp_path: Path) -> None:
    with EgressLog(tmp_path, "s:1") as egress_log:
        for offset, sent in ((0, 60), (50, 80)):
            with egress_log.record(update(200, offset=offset)):
                egress_log.sending(sent)
        with egress_log.record(update(10, "ticket-2")):
            egress_log.sending(10)
    found = rows(read(tmp_path / FILE).booked.values())
    assert [(row.wire_bytes, len(row.attempts)) for row in found] == [(140, 2), (10, 1)]
    assert totals(found)["all"] == {"transfers": 2, "payload_bytes": 200, "wire_bytes": 150}
