"""Leaving: nothing that is secret or made from the data stays without being named."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedpeft_client.commands import leave
from fedpeft_client.state import state_dir
from fedpeft_client.state.outbox import Outbox, Outcome
from fedpeft_client.state.state_dir import StateDirectory

from ..state.test_state import RUN, Crash, crash_at, write_draft

ASIDE = f"{RUN}-000001-ticket-1"


def lived_in(path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes a state directory with everything that a client, or its owner, may leave in one."""
    with StateDirectory(path) as directory:
        outbox = Outbox(directory, "")
        outbox.settle(outbox.commit(RUN, 1, write_draft(outbox)), Outcome.SET_ASIDE)
        with monkeypatch.context() as patch, pytest.raises(Crash):
            pending = outbox.commit(RUN, 2, write_draft(outbox))
            crash_at(patch, 3)  # the decision is durable, and none of its files is in its place
            outbox.settle(pending, Outcome.COUNTED)
        outbox.commit(RUN, 3, write_draft(outbox))
        write_draft(outbox)
    for name in ("identity.next", "notes"):
        (path / name).mkdir()
    for name in ("processes", "contact", "refused", "ledger.jsonl", "ledger-000001.jsonl", "policy.toml"):
        (path / name).write_text("")
    return path


def test_what_is_made_from_the_data_is_removed_and_all_that_stays_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = lived_in(tmp_path / "state", monkeypatch)
    assert list(path.glob("settled-*")) and (path / "set-aside" / ASIDE / "update.payload").exists()
    assert leave.main(["--state-dir", str(path), "--remove", "--offline"]) == 0
    said = capsys.readouterr().out
    gone = [f"settled-counted@{RUN}", "pending", "pending.new", "set-aside", "runs", "identity.next", "instance"]
    assert all(f"removed  {path / name}: " in said for name in gone)
    assert {line.split(": ")[0] for line in said.splitlines() if line.startswith("kept")} == {
        f"kept     {path / name}" for name in ("ledger.jsonl", "notes", "policy.toml")
    }
    assert sorted(each.name for each in path.iterdir()) == [
        "ledger-000001.jsonl",
        "ledger.jsonl",
        "lock",
        "notes",
        "policy.toml",
    ]


def test_without_remove_what_was_settled_takes_effect_and_what_is_dropped_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = lived_in(tmp_path / "state", monkeypatch)
    assert leave.main(["--state-dir", str(path), "--offline"]) == 0
    said = capsys.readouterr().out
    assert f"removed  {path / 'pending'}: an update that was trained and not received, " in said
    assert f"removed  {path / 'pending.new'}: an update whose training did not finish, " in said
    kept = ("runs", "set-aside", "identity.next", "ledger.jsonl", "policy.toml", "notes")
    assert all(f"kept     {path / name}: " in said for name in kept)
    assert not list(path.glob("settled-*")) and not list(path.glob("pending*"))
    assert state_dir.group(path / "runs" / RUN, "residual").read_bytes() == b"counted"
    assert state_dir.group(path / "runs" / RUN, "local").read_bytes() == b"new local"
