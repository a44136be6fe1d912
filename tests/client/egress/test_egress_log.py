"""The ledger: booked before it leaves, whole after a crash at any byte, never less than what left."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.errors import RoundClosed, ServerUnreachable, StateInvalid, TurnOver
from fedpeft.process import durable
from fedpeft.process.output import LINE_CHARACTERS
from fedpeft_client.__main__ import run
from fedpeft_client.commands.site_status import read_status
from fedpeft_client.egress.entries import FILE, EgressEntry, Kind, Outcome, read
from fedpeft_client.egress.log import QUESTIONS_BYTES, EgressLog
from fedpeft_client.egress.log_file import EgressLogFile, archives
from fedpeft_client.egress.view import rows, totals


def update(size: int, ticket: str = "ticket-1", offset: int = 0) -> EgressEntry:
    said = {"tensors": 2, "parameters": 25, "encoding": "float32", "sha256": "ab" * 32, "examples": 7, "offset": offset}
    return EgressEntry(Kind.UPDATE, size, said, "run-1", round=3, ticket=ticket, payload_bytes=100)


def answer(size: int = 20) -> EgressEntry:
    return EgressEntry(Kind.ANSWER, size, {"answer": "accepted", "examples": 7, "reasons": []}, "run-1", "emoji")


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


def test_the_command_shows_a_table_or_json_and_what_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with EgressLog(tmp_path, "127.0.0.1:7070") as egress_log:
        with egress_log.record(answer()):
            egress_log.sending(20)
        with pytest.raises(RoundClosed), egress_log.record(update(2048)):
            egress_log.sending(2048)
            raise RoundClosed("\x1b[31mtoo late")
        assert run(["ledger", "--state-dir", str(tmp_path)]) == 0, "while a client holds it"
    table = capsys.readouterr().out
    assert "2 tensors, 25 parameters, float32, of 7 examples, sha256 abababababab" in table
    assert "2.0 KiB" in table and "refused: ROUND_CLOSED" in table and "emoji" in table
    lines = table.splitlines()
    assert max(map(len, lines)) <= LINE_CHARACTERS
    assert not any(word in line.split() for line in lines for word in ("-", "None", "."))
    assert "\x1b" not in table, "what a server wrote does not reach the terminal"
    monkeypatch.setenv("FEDPEFT_CLIENT_STATE_DIR", str(tmp_path))
    assert run(["ledger", "--json", "--run", "run-1", "--since", "1h"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [(t["kind"], t["outcome"]) for t in shown["transfers"]] == [("answer", "received"), ("update", "refused")]
    assert shown["totals"]["all"]["wire_bytes"] == 2068 and shown["unreadable_lines"] == 0
    assert run(["ledger", "--since", "2999-01-01"]) == 0
    assert capsys.readouterr().out == "nothing that matches has left this device\n"


LONG = "it asks for more than its owner allows. " * 12
EVERY_KIND = [
    EgressEntry(Kind.ENROLMENT, 1234, {}),
    EgressEntry(Kind.REGISTRATION, 170, {"role": "trainer", "examples": 625, "device": ""}),
    EgressEntry(Kind.ANSWER, 900, {"answer": "declined", "reasons": [LONG, LONG]}, "run-1", "a-name-of-a-run-" * 4),
    update(2**33),
    EgressEntry(Kind.EVALUATION, 40, {"version": 3, "failure": "x" * 500}, "run-1", round=3),
    EgressEntry(Kind.WITHDRAWAL, 40, {}, "run-1", round=1000),
    EgressEntry(Kind.LEAVE, 40, {"reason": ""}),
]


@pytest.mark.parametrize("kinds", [EVERY_KIND, EVERY_KIND[:2]], ids=["every kind", "without runs"])
def test_every_kind_fits_a_page_and_has_no_empty_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kinds: list[EgressEntry]
) -> None:
    with EgressLog(tmp_path, "s:1") as egress_log:
        egress_log.polling(100)
        for each in kinds:
            with egress_log.record(each):
                egress_log.sending(each.wire_bytes)
        with pytest.raises(RoundClosed), egress_log.record(update(9, "ticket-2")):
            raise RoundClosed("the round has closed " * 20)
    assert run(["ledger", "--state-dir", str(tmp_path)]) == 0
    table, _, sums = capsys.readouterr().out.partition("\n\n")
    lines = table.splitlines()
    assert max(map(len, [*lines, *sums.splitlines()])) <= LINE_CHARACTERS
    assert not any(word in line.split() for line in lines for word in ("-", "None", ",", "."))
    assert not any(line.rstrip().endswith(",") and len(line) < LINE_CHARACTERS - 30 for line in lines)
    heads = [line for line in lines if not line.startswith(" ")]
    assert len(heads) == len(lines) - sum(line.startswith("    ") for line in lines) == len(kinds) + 3
    assert all("    " + text in table for text in ("trainer, 625 examples\n", "2 tensors, 25 parameters"))
    assert run(["ledger", "--state-dir", str(tmp_path), "--json"]) == 0
    whole = json.loads(capsys.readouterr().out)["transfers"]
    assert all(vars(each)["said"] in [t["said"] for t in whole] for each in kinds), "nothing is cut there"


def test_an_empty_ledger_says_that_nothing_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    EgressLog(tmp_path, "s:1").close()
    assert run(["ledger", "--state-dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "nothing has left this device\n"


def test_a_ledger_that_cannot_be_read_does_not_say_that_nothing_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / FILE).write_bytes(b"\xff\x00\nnonsense\n")
    assert run(["ledger", "--state-dir", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert said.out == "no entry to show\n"
    assert said.err == "2 lines of the ledger cannot be read: cut off by a crash, or changed by hand\n"


def test_lines_that_were_changed_by_hand_are_counted_and_said_and_stop_nobody(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with EgressLog(tmp_path, "s:1") as egress_log, egress_log.record(update(200)):
        egress_log.sending(200)
    opened, closed = map(json.loads, (tmp_path / FILE).read_text().splitlines())
    changed = [
        {**opened, "said": {}},
        closed,
        {**opened, "id": "without-a-zone", "at": "2026-11-21T20:00:00"},
        {**opened, "id": "other-types", "ticket": "ticket-2", "said": {"tensors": "two", "parameters": None}},
    ]
    (tmp_path / FILE).write_text("".join(json.dumps(line) + "\n" for line in changed))
    assert run(["ledger", "--state-dir", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert said.out.count("what was in it cannot be read") == 2 and "1 line of the ledger cannot be read" in said.err
    with EgressLog(tmp_path, "s:1") as egress_log:
        assert egress_log.day.left_since(datetime.now(UTC) - timedelta(days=1)) == 400


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        ([], 2, "--state-dir is missing (or FEDPEFT_CLIENT_STATE_DIR)"),
        (["--state-dir", ""], 2, "--state-dir is missing (or FEDPEFT_CLIENT_STATE_DIR)"),
        (["--state-dir", "/nowhere"], 1, "there is no ledger at /nowhere/ledger.jsonl"),
    ],
)
def test_wrong_usage_is_one_sentence(
    flags: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FEDPEFT_CLIENT_STATE_DIR", raising=False)
    assert run(["ledger", *flags]) == code
    assert words in capsys.readouterr().err


def test_a_span_that_is_none_is_said_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    EgressLog(tmp_path, "s:1").close()
    assert run(["ledger", "--state-dir", str(tmp_path), "--since", "soon"]) == 2
    assert "'soon' is neither a span such as 7d" in capsys.readouterr().err


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(["--help"])
    text = capsys.readouterr().out
    assert "  ledger " in text and "  enroll " in text and "show what left this device" in text


def rotated(folder: Path, tickets: int, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Writes a ledger of several files; returns those that were set aside."""
    monkeypatch.setattr("fedpeft_client.egress.log.FILE_BYTES", 1500)
    with EgressLog(folder, "s:1") as egress_log:
        with egress_log.record(answer()):
            egress_log.sending(20)
        for number in range(tickets):
            with egress_log.record(update(200, f"ticket-{number:02}")):
                egress_log.sending(120)
    return archives(folder / FILE)


def test_a_ledger_of_many_files_reads_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    aside = rotated(tmp_path, 20, monkeypatch)
    assert len(aside) > 4 and aside[0].name == "ledger-000001.jsonl"
    assert max(each.stat().st_size for each in aside) < 4000
    contents = read(tmp_path / FILE)
    assert len(contents.booked) == 21 and not contents.unreadable
    assert all(each.outcome is Outcome.RECEIVED for each in contents.booked.values())
    assert run(["ledger", "--state-dir", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["totals"]["all"]["transfers"] == 21


def test_a_start_reads_the_newest_file_and_those_of_the_last_day_and_knows_as_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    aside = rotated(tmp_path, 20, monkeypatch)
    with EgressLog(tmp_path, "s:1") as egress_log:
        assert egress_log.day.left_since(datetime.now(UTC) - timedelta(hours=1)) == 20 * 120 + 20
    old = time.time() - 3 * 86_400
    for each in aside:
        os.utime(each, (old, old))
        each.chmod(0)  # not even looked into; root may, so that it is damaged too
        each.write_bytes(b"{")
    with EgressLog(tmp_path, "s:1") as egress_log:
        assert egress_log.tickets("run-1") == {f"ticket-{number:02}" for number in range(20)}
        with egress_log.record(EgressEntry(Kind.WITHDRAWAL, 1, {}, "run-1")):
            pass
        assert list(read(tmp_path / FILE).booked.values())[-1].entry.name == "emoji"
        assert egress_log.day.left_since(datetime.now(UTC) - timedelta(hours=1)) < 20 * 120
        egress_log.forget("run-1")
        assert not egress_log.tickets("run-1")


def test_a_server_that_offers_runs_without_end_makes_neither_the_carried_line_nor_the_files_grow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedpeft_client.egress.log.FILE_BYTES", 2000)  # less than the names that are carried
    monkeypatch.setattr("fedpeft_client.egress.log.NAMED", 40)
    offers = [
        EgressEntry(Kind.ANSWER, 9, {"reasons": []}, f"run-{n:04}", f"name-{n:04}" + "x" * 50) for n in range(300)
    ]
    with EgressLog(tmp_path, "s:1") as egress_log:
        for each in (answer(), update(200), *offers):
            with egress_log.record(each):
                pass
    files = [*archives(tmp_path / FILE), tmp_path / FILE]
    carried = [json.loads(file.read_text().splitlines()[0])["carried"] for file in files[1:]]
    assert max(len(each["names"]) for each in carried) == 41 and all("run-1" in each["names"] for each in carried)
    assert len(json.dumps(carried[-1])) > 2000, "or this shows nothing"
    assert min(file.read_bytes().count(b"\n") for file in files[:-1]) >= 8, (
        "a file takes its bytes, whatever it carries"
    )
    with EgressLog(tmp_path, "s:1") as again:
        with again.record(EgressEntry(Kind.WITHDRAWAL, 1, {}, "run-1")):
            pass
        assert not again.tickets("run-0001") and "run-0001" not in again._tickets
    assert list(read(tmp_path / FILE).booked.values())[-1].entry.name == "emoji"


def test_lines_that_cannot_be_read_are_known_to_whoever_counts(tmp_path: Path) -> None:
    with EgressLog(tmp_path, "s:1") as egress_log:
        assert egress_log.unreadable == 0
    (tmp_path / FILE).write_text("nonsense\n{}\n")
    with EgressLog(tmp_path, "s:1") as egress_log:
        assert egress_log.unreadable == 2
    (problem,) = read_status(tmp_path).problems
    assert problem.startswith("2 lines of the ledger cannot be read") and problem.endswith("than is counted")


@pytest.mark.parametrize("step", range(1, 6))
def test_a_crash_while_a_file_is_set_aside_loses_no_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    calls = 0

    def crash(real: Callable[..., object]) -> Callable[..., object]:
        def wrapped(*arguments: object) -> object:
            nonlocal calls
            calls += 1
            if calls == step:
                raise KeyboardInterrupt
            return real(*arguments)

        return wrapped

    monkeypatch.setattr("fedpeft_client.egress.log.FILE_BYTES", 400)
    egress_log = EgressLog(tmp_path, "s:1")
    with egress_log.record(update(200, "ticket-0")):
        egress_log.sending(120)
    with monkeypatch.context() as patched:
        for name in ("write", "move", "sync"):
            patched.setattr(durable, name, crash(getattr(durable, name)))
        with suppress(KeyboardInterrupt), egress_log.record(update(200, "ticket-1")):
            egress_log.sending(120)
    with EgressLog(tmp_path, "s:1") as again:
        assert "ticket-0" in again.tickets("run-1")
        with again.record(update(200, "ticket-2")):
            again.sending(120)
    contents = read(tmp_path / FILE)
    assert {"ticket-0", "ticket-2"} <= {each.entry.ticket for each in contents.booked.values()}
    assert not contents.unreadable


@pytest.mark.parametrize("step", range(1, 7))
def test_a_refused_step_of_setting_aside_is_made_good_without_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    calls = 0

    def refused(real: Callable[..., object]) -> Callable[..., object]:
        def wrapped(*arguments: object) -> object:
            nonlocal calls
            calls += 1
            if calls == step:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(*arguments)

        return wrapped

    file = EgressLogFile(tmp_path / FILE)
    file.add({"n": 1})
    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", refused(Path.rename))
        patched.setattr(durable, "sync", refused(durable.sync))
        while calls < step:
            with suppress(StateInvalid):
                file.begin_another({"n": 2})
    file.add({"n": 3})
    file.begin_another({"n": 4})
    file.add({"n": 5})
    file.close()
    places = [*archives(tmp_path / FILE), tmp_path / FILE]
    kept = [[json.loads(line)["n"] for line in each.read_text().splitlines()] for each in places]
    assert kept[-1] == [4, 5] and kept[0][0] == 1, "what is set aside stays as it is"
    assert [n for each in kept for n in each if n % 2] == [1, 3, 5]
