"""The spool: removing what is not wanted any more, and what others have removed."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from fedpeft.errors import StoreUnavailable, TurnOver
from fedpeft_server.store.spool import Spool

from .test_store_spool import TICKET, files, send, update


class TestSweeping:
    def test_partial_uploads_go_where_whole_updates_are_kept(self, folder: Path) -> None:
        manifest, data = update()
        spool = Spool(folder, keep_manifests=True)
        send(spool, manifest, data, ticket="whole")
        for ticket in ("wanted", "unwanted"):
            with spool.writer(ticket, manifest) as writer:
                writer.write(0, data[:1000])
        (folder / f"gone.{manifest.sha256.hex()}.manifest").write_bytes(b"of an update that was removed")
        (folder / f"gone.{manifest.sha256.hex()}.manifest-part").write_bytes(b"half")
        again = Spool(folder, keep_manifests=True)
        assert again.sizes({"whole"}) == {"whole": len(data), "wanted": 1000, "unwanted": 1000}
        next(folder.glob("unwanted*")).unlink()  # by another hand
        assert again.sizes(()) == {"wanted": 1000, "unwanted": 0}
        again.remove_all(again.others({"wanted"}, whole=False))
        assert sorted(again.tickets()) == ["wanted", "whole"]
        assert files(folder) == [".manifest", ".part", ".update"]

    def test_only_what_is_partial_is_removed_as_such(self, spool: Spool, folder: Path) -> None:
        manifest, data = update()
        with spool.writer(TICKET, manifest) as writer:
            writer.write(0, data[:1000])
            spool.remove_partial(TICKET)
            with pytest.raises(TurnOver):
                writer.write(1000, data[1000:2000])
        assert files(folder) == []
        send(spool, manifest, data)
        spool.remove_partial(TICKET)
        spool.remove_partial("nobody")
        assert files(folder) == [".update"]

    def test_a_slow_removal_holds_up_no_other_ticket(self, spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
        manifest, data = update()
        others = [t for t in (f"other-{i}" for i in range(100)) if spool._lock_of(t) is not spool._lock_of(TICKET)]
        send(spool, manifest, data)
        removing, go_on, unlink = threading.Event(), threading.Event(), os.unlink

        def slow(path: Path, **options: int) -> None:
            removing.set()
            assert go_on.wait(20)
            unlink(path, **options)

        monkeypatch.setattr(os, "unlink", slow)
        thread = threading.Thread(target=spool.remove_all, args=((TICKET,),))
        thread.start()
        assert removing.wait(20)
        send(spool, manifest, data, ticket=others[0])
        go_on.set()
        thread.join(20)
        assert spool.tickets() == [others[0]]


class TestAFileThatCannotBeRemoved:
    """A folder in its place, which no `unlink` removes, for root either."""

    OTHERS = (TICKET[:-1] + "a", TICKET[:-1] + "b")

    @pytest.fixture
    def stuck(self, spool: Spool) -> Path:
        path = send(spool, *update())
        path.unlink()
        path.mkdir()
        return path

    def test_hinders_no_other_removal(self, spool: Spool, folder: Path, stuck: Path) -> None:
        for other in self.OTHERS:
            send(spool, *update(), ticket=other)
        with pytest.raises(StoreUnavailable, match="cleaning the spool"):
            spool.remove_all([self.OTHERS[0], TICKET, self.OTHERS[1]])
        assert list(folder.iterdir()) == [stuck]

    @pytest.mark.parametrize("again", ["clean", "remove"])
    def test_is_removed_once_it_can_be(self, spool: Spool, folder: Path, stuck: Path, again: str) -> None:
        repeat = spool.clean if again == "clean" else lambda: spool.remove_all((TICKET,))
        for attempt in (lambda: spool.remove_all((TICKET,)), repeat):
            with pytest.raises(StoreUnavailable, match="cleaning the spool"):
                attempt()
        stuck.rmdir()
        stuck.write_bytes(b"again a file")
        repeat()
        assert not list(folder.iterdir()) and spool.tickets() == []
        spool.clean()

    def test_is_not_removed_once_an_upload_has_taken_its_place(self, spool: Spool, stuck: Path) -> None:
        """The making of a run may be repeated, with another adapter too."""
        with pytest.raises(StoreUnavailable):
            spool.remove_all((TICKET,))
        stuck.rmdir()
        manifest, data = update(seed=1)
        path = send(spool, manifest, data)
        spool.clean()
        assert path.read_bytes() == data

    def test_a_refused_part_is_tried_again(self, spool: Spool, folder: Path) -> None:
        manifest, data = update()
        with spool.writer(TICKET, manifest) as writer:
            writer.write(0, data[:100])
        (part,) = folder.iterdir()
        part.unlink()
        part.mkdir()
        with pytest.raises(StoreUnavailable):
            spool.remove_partial(TICKET)
        part.rmdir()
        part.touch()
        spool.clean()
        assert not list(folder.iterdir())
