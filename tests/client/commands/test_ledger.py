"""`fedpeft-client ledger`: a page or JSON of what left, and honest about what cannot be read."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fedpeft.errors import RoundClosed
from fedpeft.process.output import LINE_CHARACTERS
from fedpeft_client.__main__ import run
from fedpeft_client.egress.entries import FILE, EgressEntry, Kind
from fedpeft_client.egress.log import EgressLog

from ..egress.entries import answer, update


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
