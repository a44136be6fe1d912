"""The state directory after a crash at any step: nothing lost, nothing counted twice."""

from __future__ import annotations

import hashlib
import resource
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from structlog.testing import capture_logs

from fedpeft.adapters import payload
from fedpeft.adapters.updates import PreparedUpdate
from fedpeft.errors import ChecksumMismatch, StateInvalid
from fedpeft.process import durable
from fedpeft.rounds.local_job import LocalUpdate
from fedpeft.rpc import wire
from fedpeft.v1 import federation_service_pb2 as pb
from fedpeft_client.state import state_dir
from fedpeft_client.state.adapters import AdapterCache
from fedpeft_client.state.outbox import KEPT_ASIDE, PAYLOAD, Outbox, Outcome, state_files
from fedpeft_client.state.state_dir import StateDirectory

RUN = "run-000000000001"
IF_COUNTED, IF_NOT, LOCAL = "residual_if_counted.safetensors", "residual_if_not.safetensors", "local.safetensors"


class Crash(BaseException):
    """Stands for a kill: nothing after it runs."""


def write_draft(outbox: Outbox, data: bytes = b"abcd") -> pb.UpdateHeader:
    draft = outbox.draft()
    (draft / PAYLOAD).write_bytes(data)
    (draft / IF_COUNTED).write_bytes(b"counted")
    (draft / IF_NOT).write_bytes(b"not")
    (draft / LOCAL).write_bytes(b"new local")
    manifest = payload.Manifest((), len(data), hashlib.sha256(data).digest())
    return pb.UpdateHeader(
        ticket="ticket-1", manifest=wire.manifest_to_proto(manifest), examples=3, metrics={"loss": 0.1 + 0.2}
    )


def crash_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Makes the step-th forced write or rename from now on a crash, before it takes effect."""
    left = [step]

    def counted(real):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                raise Crash
            return real(*args, **kwargs)

        return call

    monkeypatch.setattr(durable, "sync", counted(durable.sync))
    monkeypatch.setattr(Path, "rename", counted(Path.rename))


def test_instance_is_drawn_once(tmp_path: Path) -> None:
    with StateDirectory(tmp_path / "state") as directory:
        first = directory.instance
    with StateDirectory(tmp_path / "state") as directory:
        assert directory.instance == first and len(first) == 32
    assert (tmp_path / "state" / "instance").stat().st_mode & 0o777 == 0o600


def test_directory_is_for_one_process(tmp_path: Path) -> None:
    with StateDirectory(tmp_path), pytest.raises(StateInvalid, match="in use by another"):
        StateDirectory(tmp_path)
    StateDirectory(tmp_path).close()


def test_a_directory_that_takes_no_bytes_is_named(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))  # what a full disk is like: files can be made, not written
    try:
        with pytest.raises(StateInvalid) as refused:
            StateDirectory(tmp_path / "state")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert refused.value.message.startswith(f"writing {tmp_path / 'state' / 'instance'} failed: File too large; ")


def test_unusable_directories_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StateInvalid, match="cannot use state directory"):
        StateDirectory(tmp_path / "file")
    for damaged in (b"mine", b"\x00\xff{"):
        (tmp_path / "instance").write_bytes(damaged)
        with pytest.raises(StateInvalid, match="instance does not hold 32 hexadecimal digits; remove it"):
            StateDirectory(tmp_path)


@pytest.mark.parametrize("run", ["../x", "a/b", "", ".", "x" * 65])
def test_run_id_of_a_hostile_server_is_no_path(tmp_path: Path, run: str) -> None:
    with StateDirectory(tmp_path) as directory, pytest.raises(StateInvalid):
        directory.run(run)


@pytest.mark.parametrize("step", range(1, 20))
def test_crash_while_committing_leaves_all_or_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    with StateDirectory(tmp_path) as directory:
        outbox = Outbox(directory, "")
        header = write_draft(outbox)
        with monkeypatch.context() as patch:
            crash_at(patch, step)
            try:
                outbox.commit(RUN, 5, header)
                crashed = False
            except Crash:
                crashed = True
        found = Outbox(directory, "").load()
        assert found is not None or crashed
        if found is not None:
            assert (found.run, found.round, found.header) == (RUN, 5, header)
            assert found.payload.read_bytes() == b"abcd"


@pytest.mark.parametrize("outcome", list(Outcome))
@pytest.mark.parametrize("step", range(1, 18))
def test_crash_while_settling_is_finished_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, outcome: Outcome
) -> None:
    with StateDirectory(tmp_path) as directory:
        folder = directory.run(RUN)
        state_dir.group(folder, "residual").write_bytes(b"old")
        state_dir.group(folder, "local").write_bytes(b"old local")
        outbox = Outbox(directory, "")
        pending = outbox.commit(RUN, 5, write_draft(outbox))
        with monkeypatch.context() as patch:
            crash_at(patch, step)
            try:
                outbox.settle(pending, outcome)
            except Crash:
                again = Outbox(directory, "")
                again.finish()
                if (left := again.load()) is not None:  # the decision was not yet on disk: the server is asked again
                    assert state_dir.group(folder, "residual").read_bytes() == b"old"
                    again.settle(left, outcome)
        assert Outbox(directory, "").load() is None
        kept = ["set-aside"] if outcome is Outcome.SET_ASIDE else []
        assert sorted(p.name for p in tmp_path.iterdir()) == ["instance", "lock", "runs", *kept]
        if kept:
            (aside,) = (tmp_path / "set-aside").iterdir()
            assert aside.name == f"{RUN}-000005-{pending.ticket}"
            assert sorted(p.name for p in aside.iterdir()) == ["ticket.json", PAYLOAD]
            assert (aside / PAYLOAD).read_bytes() == b"abcd"
        if outcome is Outcome.DROPPED:
            assert not state_dir.group(folder, "residual").exists()
            assert state_dir.group(folder, "local").read_bytes() == b"old local"
        else:
            expected = b"counted" if outcome is Outcome.COUNTED else b"not"
            assert state_dir.group(folder, "residual").read_bytes() == expected
            assert state_dir.group(folder, "local").read_bytes() == b"new local"


def test_updates_that_are_set_aside_do_not_fill_the_disk(tmp_path: Path) -> None:
    with StateDirectory(tmp_path) as directory:
        outbox = Outbox(directory, "")
        with capture_logs() as lines:
            for number in range(1, KEPT_ASIDE + 4):
                outbox.settle(outbox.commit(RUN, number, write_draft(outbox)), Outcome.SET_ASIDE)
        assert [Path(line["folder"]).name.split("-")[-3] for line in lines] == ["000001", "000002", "000003"]
        kept = sorted(path.name.split("-")[-3] for path in outbox.aside.iterdir())
        assert len(kept) == KEPT_ASIDE and kept[0] == "000004", "the oldest went"


@pytest.mark.parametrize("damage", ["payload", "record", "missing"])
def test_damaged_pending_update_is_seen_and_can_be_discarded(tmp_path: Path, damage: str) -> None:
    with StateDirectory(tmp_path) as directory:
        outbox = Outbox(directory, "")
        pending = outbox.commit(RUN, 5, write_draft(outbox))
        if damage == "payload":
            pending.payload.write_bytes(b"abce")
        elif damage == "record":
            (pending.folder / "ticket.json").write_text("{")
        else:
            pending.payload.unlink()
        with pytest.raises(StateInvalid):
            outbox.load()
        outbox.discard()
        assert outbox.load() is None


def manifest_of(data: bytes) -> payload.Manifest:
    return payload.Manifest((), len(data), hashlib.sha256(data).digest())


def test_cache_keeps_the_last_version_and_distrusts_damage(tmp_path: Path) -> None:
    cache = AdapterCache(tmp_path)
    with capture_logs() as lines:
        assert cache.held() is None
    assert not lines, "none was there"
    for version in (1, 2):
        data = bytes([version]) * 10
        cache.part(version).write_bytes(data)
        held = cache.commit(version, manifest_of(data))
        assert cache.held() == held and held.version == version
    assert len(list(tmp_path.glob("*.payload"))) == 1
    held.payload.write_bytes(b"?")
    for damage in (lambda: None, held.payload.unlink, lambda: (tmp_path / "adapter.json").write_text("{")):
        damage()
        with capture_logs() as lines:
            assert cache.held() is None
        (line,) = lines
        assert line["log_level"] == "warning" and line["cause"]


def test_cache_refuses_bytes_without_the_digest(tmp_path: Path) -> None:
    cache = AdapterCache(tmp_path)
    cache.part(3).write_bytes(b"x")
    with pytest.raises(ChecksumMismatch):
        cache.commit(3, manifest_of(b"y"))
    assert not cache.part(3).exists() and cache.held() is None


def test_parts_of_other_versions_go(tmp_path: Path) -> None:
    cache = AdapterCache(tmp_path)
    cache.part(3).write_bytes(b"x")
    cache.part(4).write_bytes(b"x")
    assert [p.name for p in tmp_path.iterdir()] == ["adapter-4.part"]


class TestExcludedAfterTheReceipt:
    """A round may exclude an update when it closes; its client finds out before the next ticket."""

    def settled(self, path: Path, ticket: str) -> Outbox:
        outbox = Outbox(StateDirectory(path), "")
        header = write_draft(outbox)
        header.ticket = ticket
        outbox.settle(outbox.commit(RUN, 1, header), Outcome.COUNTED)
        assert outbox.counted(RUN) == ticket
        return outbox

    def residual(self, path: Path) -> bytes | None:
        file = state_dir.group(path / "runs" / RUN, "residual")
        return file.read_bytes() if file.exists() else None

    def test_one_that_was_folded_leaves_nothing(self, tmp_path: Path) -> None:
        outbox = self.settled(tmp_path, "ticket-1")
        outbox.confirm(RUN)
        assert outbox.counted(RUN) is None
        assert self.residual(tmp_path) == b"counted"
        assert sorted(p.name for p in (tmp_path / "runs" / RUN).iterdir()) == [
            "local.safetensors",
            "residual.safetensors",
        ]

    def test_the_first_goes_into_the_residual_and_the_second_in_a_row_is_dropped_with_it(self, tmp_path: Path) -> None:
        for ticket, kept in (("ticket-1", True), ("ticket-2", False), ("ticket-3", True)):
            outbox = self.settled(tmp_path / "state", ticket)
            assert outbox.take_back(RUN) is kept
            assert outbox.counted(RUN) is None
            assert self.residual(tmp_path / "state") == (b"not" if kept else None)
            outbox._directory.close()

    def test_a_damaged_note_on_an_excluded_update_is_taken_as_that_of_another(self, tmp_path: Path) -> None:
        outbox = self.settled(tmp_path, "ticket-1")
        assert outbox.take_back(RUN)
        outbox._directory.close()
        (tmp_path / "runs" / RUN / "excluded").write_bytes(b"\x00\xff")
        assert not self.settled(tmp_path, "ticket-2").take_back(RUN)
        assert self.residual(tmp_path) is None

    def test_one_that_was_folded_in_between_makes_the_next_the_first(self, tmp_path: Path) -> None:
        for ticket, excluded in (("ticket-1", True), ("ticket-2", False), ("ticket-3", True)):
            outbox = self.settled(tmp_path, ticket)
            assert outbox.take_back(RUN) if excluded else not outbox.confirm(RUN)
            outbox._directory.close()
        assert self.residual(tmp_path) == b"not"

    @pytest.mark.parametrize("step", range(1, 12))
    def test_a_crash_on_the_way_is_mended(self, tmp_path: Path, step: int) -> None:
        outbox = self.settled(tmp_path, "ticket-1")
        with pytest.MonkeyPatch.context() as patch:
            crash_at(patch, step)
            with suppress(Crash):
                outbox.take_back(RUN)
        if outbox.counted(RUN):
            assert outbox.take_back(RUN)
        assert self.residual(tmp_path) == b"not"

    def test_a_damaged_note_is_as_if_it_had_counted(self, tmp_path: Path) -> None:
        outbox = self.settled(tmp_path, "ticket-1")
        (tmp_path / "runs" / RUN / "counted.json").write_bytes(b"{")
        with capture_logs() as lines:
            assert outbox.counted(RUN) is None
        assert [line["file"] for line in lines] == [str(tmp_path / "runs" / RUN / "counted.json")]
        assert self.residual(tmp_path) == b"counted"


class TestLostByTheServer:
    """The server may find that its disk lost an update; its client still has it, until its next ticket."""

    def settled(self, path: Path) -> Outbox:
        outbox = Outbox(StateDirectory(path), "")
        outbox.settle(outbox.commit(RUN, 1, write_draft(outbox)), Outcome.COUNTED)
        return outbox

    def residual(self, path: Path) -> bytes:
        return state_dir.group(path / "runs" / RUN, "residual").read_bytes()

    @pytest.mark.parametrize("step", [*range(1, 16), 1000])
    @pytest.mark.parametrize("outcome", [Outcome.COUNTED, Outcome.NOT_COUNTED])
    def test_it_is_pending_again_over_crashes(self, tmp_path: Path, step: int, outcome: Outcome) -> None:
        outbox = self.settled(tmp_path)
        with pytest.MonkeyPatch.context() as patch:
            crash_at(patch, step)
            with suppress(Crash):
                assert outbox.recall(RUN)
                outbox.load()
        if outbox.load() is None:
            assert outbox.counted(RUN) == "ticket-1" and outbox.recall(RUN)
        pending = outbox.load()
        assert pending is not None and pending.payload.read_bytes() == b"abcd"
        assert (pending.run, pending.round, pending.ticket) == (RUN, 1, "ticket-1")
        assert outbox.counted(RUN) is None, "it is in one place"
        outbox.settle(pending, outcome)
        assert self.residual(tmp_path) == (b"counted" if outcome is Outcome.COUNTED else b"not")
        assert outbox.counted(RUN) == ("ticket-1" if outcome is Outcome.COUNTED else None)
        assert outcome is Outcome.NOT_COUNTED or outbox.recall(RUN), "it may get lost once more"
        outbox._directory.close()

    @pytest.mark.parametrize("damage", ["payload", "no payload"])
    def test_one_that_is_damaged_here_too_goes_into_the_residual(self, tmp_path: Path, damage: str) -> None:
        outbox = self.settled(tmp_path)
        folder = tmp_path / "runs" / RUN
        if damage == "payload":
            (folder / "counted.payload").write_bytes(b"abce")
        else:
            (folder / "counted.payload").unlink()  # as an older client left it
        assert not outbox.recall(RUN)
        assert outbox.load() is None
        assert outbox.take_back(RUN, faulty=False)
        assert self.residual(tmp_path) == b"not"
        assert not (folder / "counted.payload").exists() and not (folder / "excluded").exists()

    def test_one_that_was_lost_makes_no_excluded_one_the_second(self, tmp_path: Path) -> None:
        outbox = self.settled(tmp_path)
        assert outbox.take_back(RUN, faulty=False)
        outbox._directory.close()
        outbox = self.settled(tmp_path)
        assert outbox.take_back(RUN), "as the first in a row"
        assert self.residual(tmp_path) == b"not"


@pytest.mark.parametrize("outcome", list(Outcome))
@pytest.mark.parametrize("step", [*range(1, 24), 1000])
def test_any_group_of_a_clients_state_follows_the_outcome_through_a_crash_at_any_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, outcome: Outcome
) -> None:
    def value(of: float) -> dict[str, np.ndarray]:
        return {"a": np.full(2, of, np.float32)}

    local = value(3)
    update = LocalUpdate(
        "site-a",
        PreparedUpdate(payload.Manifest((), 0, b""), b"", {}, {}),
        {"residual": value(1), "local": local, "algorithm": value(4)},
        {"residual": value(2), "local": local, "algorithm": value(5)},
        1,
        {},
        {},
    )
    with StateDirectory(tmp_path) as directory:
        folder, outbox = directory.run(RUN), Outbox(directory, "")
        for group in ("residual", "local", "algorithm"):
            save_file(value(0), state_dir.group(folder, group))
        header = write_draft(outbox)
        for file in (draft := tmp_path / "pending.new").glob("*.safetensors"):
            file.unlink()
        for name, tensors in state_files(update).items():
            save_file(dict(tensors), draft / name)
        pending = outbox.commit(RUN, 5, header)
        with monkeypatch.context() as patch:
            crash_at(patch, step)
            with suppress(Crash):
                outbox.settle(pending, outcome)
                if outcome is Outcome.COUNTED:
                    outbox.take_back(RUN)
        again = Outbox(directory, "")
        again.finish()
        if (left := again.load()) is not None:
            again.settle(left, outcome)
        if again.counted(RUN):
            again.take_back(RUN)
        found = {group: load_file(file)["a"][0] for group, file in state_dir.groups(folder).items()}
        # A counted update was taken back: every group is what it would be had the update never counted.
        dropped = outcome is Outcome.DROPPED
        assert found == ({"local": 0, "algorithm": 0} if dropped else {"residual": 2, "local": 3, "algorithm": 5})
        assert not state_dir.groups_if_excluded(folder)
