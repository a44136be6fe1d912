"""The spool: uploads in pieces, over restarts and kills, and what it refuses."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.adapters.payload import CHUNK_BYTES, Manifest, encode
from fedpeft.adapters.spec import TensorSpec
from fedpeft.errors import (
    BlobCorrupt,
    ChecksumMismatch,
    ChunkInvalid,
    DiskFull,
    OffsetOutOfRange,
    PayloadInvalid,
    StateInvalid,
    TicketNotFound,
    TurnOver,
    UpdateDiffers,
)
from fedpeft.rpc.wire import manifest_from_proto
from fedpeft.v1 import tensor_pb2
from fedpeft_server.store.spool import Spool

TICKET = "ticket-0123456789abcdef"


def update(seed: int = 0, size: int = 2000) -> tuple[Manifest, bytes]:
    values = np.random.default_rng(seed).normal(size=size).astype(np.float32)
    return encode({"w": values}, [TensorSpec("w", (size,))], "float32")


def send(spool: Spool, manifest: Manifest, data: bytes, piece: int = 1000, ticket: str = TICKET) -> Path:
    with spool.writer(ticket, manifest) as writer:
        for offset in range(writer.position, len(data), piece):
            writer.write(offset, data[offset : offset + piece])
        return writer.finish()


def files(spool_folder: Path) -> list[str]:
    return sorted(p.suffix for p in spool_folder.iterdir())


class TestUploading:
    def test_what_was_sent_can_be_folded(self, spool: Spool, folder: Path) -> None:
        manifest, data = update()
        path = send(spool, manifest, data)
        assert path.read_bytes() == data
        assert files(folder) == [".update"]
        assert spool.position(TICKET, manifest.sha256) == len(data)
        with spool.open(TICKET, manifest.sha256) as view:
            assert bytes(view) == data and view.readonly
            values = np.frombuffer(view, np.float32)
        assert values.tobytes() == data

    def test_pieces_may_be_memoryviews_of_anything(self, spool: Spool) -> None:
        manifest, data = update()
        with spool.writer(TICKET, manifest) as writer:
            writer.write(0, memoryview(np.frombuffer(data, np.float32)))
            assert writer.finish().read_bytes() == data

    def test_an_update_without_tensors_is_whole_at_once(self, spool: Spool) -> None:
        manifest, data = encode({}, [], "float32")
        send(spool, manifest, data)
        with spool.open(TICKET, manifest.sha256) as view:
            assert bytes(view) == b""

    def test_kept_updates_have_their_manifest_beside_them(self, folder: Path) -> None:
        manifest, data = update()
        path = send(Spool(folder, keep_manifests=True), manifest, data)
        kept = tensor_pb2.Manifest.FromString(path.with_suffix(".manifest").read_bytes())
        assert manifest_from_proto(kept) == manifest
        assert files(folder) == [".manifest", ".update"]
        spool = Spool(folder)
        assert spool.position(TICKET, manifest.sha256) == len(data)
        spool.remove_all(spool.others(set()))
        assert files(folder) == []

    def test_a_manifest_is_written_where_an_update_has_none(self, spool: Spool, folder: Path) -> None:
        manifest, data = update()
        send(spool, manifest, data)
        send(Spool(folder, keep_manifests=True), manifest, data)
        assert files(folder) == [".manifest", ".update"]

    def test_finishing_again_gives_the_same_file(self, spool: Spool) -> None:
        manifest, data = update()
        path = send(spool, manifest, data)
        with spool.writer(TICKET, manifest) as writer:
            assert writer.position == len(data)
            with pytest.raises(OffsetOutOfRange):
                writer.write(0, data[:10])
            assert writer.finish() == path

    def test_what_is_removed_is_gone(self, spool: Spool, folder: Path) -> None:
        manifest, data = update()
        for ticket in ("a", "b", "c"):
            send(spool, manifest, data, ticket=ticket)
        with spool.open("b", manifest.sha256) as view:
            spool.remove_all(("b",))
            assert bytes(view) == data
        spool.remove_all(["a", "nobody"])
        assert spool.position("a", manifest.sha256) == 0
        with pytest.raises(BlobCorrupt, match="ticket a is not in"):
            spool.open("a", manifest.sha256).__enter__()
        spool.remove_all(spool.others(set()))
        assert files(folder) == []

    @given(cuts=st.lists(st.integers(0, 8000), max_size=12), restart=st.booleans())
    @settings(max_examples=25)
    def test_any_pieces_with_any_interruptions_give_the_same_bytes(self, cuts: list[int], restart: bool) -> None:
        manifest, data = update()
        with tempfile.TemporaryDirectory() as name:
            spool = Spool(Path(name))
            bounds = sorted({0, *cuts, len(data)})
            for begin, end in pairwise(bounds):
                spool = Spool(Path(name)) if restart else spool
                assert spool.position(TICKET, manifest.sha256) == begin
                with spool.writer(TICKET, manifest) as writer:
                    writer.write(begin, data[begin:end])
            assert send(spool, manifest, data).read_bytes() == data


class TestResuming:
    def test_the_position_is_that_of_the_same_payload(self, spool: Spool) -> None:
        manifest, data = update()
        assert spool.position(TICKET, manifest.sha256) == 0
        with spool.writer(TICKET, manifest) as writer:
            writer.write(0, data[:3000])
        assert spool.position(TICKET, manifest.sha256) == 3000
        assert spool.position(TICKET, b"x" * 32) == 0

    @pytest.mark.parametrize("fault", ["digest", "value"])
    def test_a_refused_payload_takes_no_room_for_as_long_as_its_error_lives(
        self, spool: Spool, folder: Path, fault: str
    ) -> None:
        """An error's traceback must not keep the file mapped: its bytes would stay on the disk, nameless."""
        wrong = bytes(8000) if fault == "digest" else np.full(2000, np.nan, np.float32).tobytes()
        manifest, _ = update()
        if fault == "value":
            manifest = replace(manifest, sha256=hashlib.sha256(wrong).digest())
        with pytest.raises((ChecksumMismatch, PayloadInvalid)) as kept:
            send(spool, manifest, wrong)
        links = [Path("/proc/self/fd", number) for number in os.listdir("/proc/self/fd")]
        opened = [os.readlink(link) for link in links if os.path.lexists(link)]
        assert kept.value.message and not [name for name in opened if name.startswith(str(folder))]
        assert str(folder) not in Path("/proc/self/maps").read_text()

    def test_another_payload_starts_over(self, spool: Spool, folder: Path) -> None:
        manifest, data = update()
        with spool.writer(TICKET, manifest) as writer:
            writer.write(0, data[:3000])
        other, other_data = update(seed=1)
        path = send(spool, other, other_data)
        assert path.read_bytes() == other_data
        assert files(folder) == [".update"]
        assert spool.position(TICKET, manifest.sha256) == 0

    def test_after_a_restart_all_is_read_again(self, folder: Path) -> None:
        manifest, data = update()
        with Spool(folder).writer(TICKET, manifest) as writer:
            writer.write(0, data[:3000])
        (partial,) = folder.iterdir()
        partial.write_bytes(b"\0" * 3000)  # as a machine that died may leave it
        spool = Spool(folder)
        with pytest.raises(ChecksumMismatch):
            send(spool, manifest, data)
        assert spool.position(TICKET, manifest.sha256) == 0
        assert send(spool, manifest, data).read_bytes() == data

    def test_a_partial_that_grew_from_outside_starts_over(self, folder: Path) -> None:
        manifest, data = update()
        with Spool(folder).writer(TICKET, manifest) as writer:
            writer.write(0, data[:10])
        (partial,) = folder.iterdir()
        partial.write_bytes(b"\0" * (len(data) + 1))
        assert send(Spool(folder), manifest, data).read_bytes() == data

    def test_a_second_upload_takes_over(self, spool: Spool) -> None:
        manifest, data = update()
        older = spool.writer(TICKET, manifest)
        older.write(0, data[:1000])
        newer = spool.writer(TICKET, manifest)
        assert newer.position == 1000
        with pytest.raises(TurnOver, match="took over"):
            older.write(1000, data[1000:2000])
        with pytest.raises(TurnOver, match="took over"):
            older.finish()
        older.abandon()
        newer.write(1000, data[1000:])
        assert newer.finish().read_bytes() == data

    def test_a_faulty_upload_that_was_taken_over_removes_nothing(self, spool: Spool) -> None:
        manifest, data = update()
        older = spool.writer(TICKET, manifest)
        older.write(0, bytes(len(data)))
        check = older._check

        def taken_over_meanwhile() -> None:
            spool.writer(TICKET, manifest)
            check()

        older._check = taken_over_meanwhile  # type: ignore[method-assign]
        with pytest.raises(TurnOver, match="took over"):
            older.finish()
        assert spool.position(TICKET, manifest.sha256) == len(data)

    def test_a_whole_update_is_replaced_by_another_only_after_a_restart(self, spool: Spool, folder: Path) -> None:
        """Its receipt may be under way in this process; after a restart the database knows whether it was given."""
        manifest, data = update()
        other, other_data = update(seed=1)
        send(spool, manifest, data)
        with pytest.raises(UpdateDiffers):
            spool.writer(TICKET, other)
        assert spool.position(TICKET, manifest.sha256) == len(data)
        spool = Spool(folder)
        assert spool.position(TICKET, manifest.sha256) == len(data)
        assert send(spool, other, other_data).read_bytes() == other_data
        assert files(folder) == [".update"]


class TestRefusing:
    @pytest.mark.parametrize(
        ("offset", "length", "error"),
        [
            (0, 0, ChunkInvalid),
            (0, CHUNK_BYTES + 1, ChunkInvalid),
            (0, 8001, ChunkInvalid),
            (1, 10, OffsetOutOfRange),
            (8001, 10, OffsetOutOfRange),
        ],
    )
    def test_a_chunk_that_does_not_fit(self, spool: Spool, offset: int, length: int, error: type[Exception]) -> None:
        manifest, data = update()
        with spool.writer(TICKET, manifest) as writer, pytest.raises(error, match=TICKET):
            writer.write(offset, bytes(length))
        assert writer.position == 0
        assert send(spool, manifest, data).read_bytes() == data

    def test_an_upload_that_ends_early_keeps_what_came(self, spool: Spool) -> None:
        manifest, data = update()
        with spool.writer(TICKET, manifest) as writer:
            writer.write(0, data[:500])
            with pytest.raises(OffsetOutOfRange, match="byte 500 of 8000"):
                writer.finish()
        assert spool.position(TICKET, manifest.sha256) == 500

    def test_a_wrong_digest_starts_over(self, spool: Spool, folder: Path) -> None:
        manifest, data = update()
        with pytest.raises(ChecksumMismatch, match=manifest.sha256.hex()):
            send(spool, manifest, bytes(len(data)))
        assert files(folder) == []
        assert send(spool, manifest, data).read_bytes() == data

    def test_values_that_are_not_finite_are_removed(self, spool: Spool, folder: Path) -> None:
        values = np.ones(2000, np.float32)
        values[1234] = np.nan
        manifest, data = encode({"w": values}, [TensorSpec("w", (2000,))], "float32")
        with pytest.raises(PayloadInvalid, match="1234"):
            send(spool, manifest, data)
        assert files(folder) == []

    @pytest.mark.parametrize("ticket", ["", "../x", "a/b", "a.b", "x" * 65])
    def test_names_that_are_no_tickets(self, spool: Spool, ticket: str) -> None:
        with pytest.raises(TicketNotFound):
            spool.writer(ticket, update()[0])

    def test_a_folder_that_cannot_be_used(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(StateInvalid, match="opening the spool"):
            Spool(tmp_path / "file" / "spool")


def test_a_full_disk_keeps_what_fitted(small_disk: Path) -> None:
    spool = Spool(small_disk)
    manifest, data = update(size=300_000)
    (small_disk / "ballast").write_bytes(bytes(500_000))
    writer = spool.writer(TICKET, manifest)
    with pytest.raises(DiskFull, match="no room"):
        for offset in range(0, len(data), 100_000):
            writer.write(offset, data[offset : offset + 100_000])
    writer.abandon()
    held = spool.position(TICKET, manifest.sha256)
    assert 400_000 < held == writer.position < len(data)
    (small_disk / "ballast").unlink()
    with spool.writer(TICKET, manifest) as writer:
        writer.write(held, data[held : held + 100_000])
        assert writer.position == held + 100_000


class TestStarting:
    def test_sweeping_keeps_what_is_still_wanted(self, folder: Path) -> None:
        manifest, data = update()
        spool = Spool(folder)
        for ticket in ("kept", "partly", "old"):
            send(spool, manifest, data, ticket=ticket)
        (folder / "notes.txt").write_text("not ours")
        spool = Spool(folder)
        spool.remove_all(spool.others({"kept", "partly", "new"}))
        assert [p.name.split(".")[0] for p in sorted(folder.iterdir())] == ["kept", "notes", "partly"]
        with spool.open("kept", manifest.sha256) as view:
            assert bytes(view) == data

    def test_of_two_files_of_a_ticket_the_whole_one_is_kept(self, folder: Path) -> None:
        manifest, data = update()
        path = send(Spool(folder), manifest, data)
        (folder / f"{TICKET}.{'0' * 64}.part").write_bytes(b"x")
        (folder / f"{TICKET}.{'f' * 64}.part").write_bytes(b"x")
        assert Spool(folder).position(TICKET, manifest.sha256) == len(data)
        assert list(folder.iterdir()) == [path]


def test_many_tickets_from_many_threads(spool: Spool) -> None:
    manifest, data = update(size=50_000)
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            assert send(spool, manifest, data, 60_000, f"ticket-{number}").read_bytes() == data
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert failures == []
    assert all(spool.position(f"ticket-{n}", manifest.sha256) == len(data) for n in range(12))


CRASHING = """
import sys
from itertools import pairwise
from pathlib import Path
import numpy as np
from fedpeft.adapters.payload import encode
from fedpeft.adapters.spec import TensorSpec
from fedpeft_server.store.spool import Spool
spool = Spool(Path(sys.argv[1]))
for number in range(10_000):
    values = np.random.default_rng(number).normal(size=20_000).astype(np.float32)
    manifest, data = encode({"w": values}, [TensorSpec("w", (20_000,))], "float32")
    writer = spool.writer(f"ticket-{number}", manifest)
    for offset in range(writer.position, len(data), 7_000):
        writer.write(offset, data[offset : offset + 7_000])
    writer.finish()
    print(number, flush=True)
"""


@pytest.mark.parametrize("seed", range(3))
def test_killed_between_any_two_instructions_it_keeps_what_was_finished(folder: Path, seed: int) -> None:
    wanted = random.Random(seed).randrange(2, 12)
    process = subprocess.Popen([sys.executable, "-c", CRASHING, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    finished = [int(process.stdout.readline()) for _ in range(wanted)]
    process.send_signal(signal.SIGKILL)
    finished += [int(line) for line in process.stdout.read().split("\n")[:-1]]
    process.stdout.close()
    assert process.wait(10) == -signal.SIGKILL
    spool = Spool(folder)
    for number in range(len(finished) + 1):
        manifest, data = update(number, 20_000)
        held = spool.position(f"ticket-{number}", manifest.sha256)
        assert held == len(data) or number not in finished
        assert send(spool, manifest, data, ticket=f"ticket-{number}").read_bytes() == data
    assert len(os.listdir(folder)) == len(finished) + 1
