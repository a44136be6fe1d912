"""The ledger's files: set aside as they grow, read as one, whole after a crash or a refused step."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fedpeft.errors import StateInvalid
from fedpeft.process import durable
from fedpeft_client.__main__ import run
from fedpeft_client.commands.site_status import read_status
from fedpeft_client.egress.entries import FILE, EgressEntry, Kind, Outcome, read
from fedpeft_client.egress.log import EgressLog
from fedpeft_client.egress.log_file import EgressLogFile, archives

from .entries import answer, update


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
