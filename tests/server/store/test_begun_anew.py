"""An upload that begins anew at byte 0, because its client knows of no byte that is held."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedpeft.errors import ChunkInvalid, OffsetOutOfRange
from fedpeft_server.store.spool import Spool

from .test_store_spool import TICKET, send, update


@pytest.mark.parametrize("dies", [False, True], ids=["a cut", "a restart"])
def test_an_upload_may_begin_anew_with_its_first_chunk(tmp_path: Path, dies: bool) -> None:
    """Its client may know of no byte that is here."""
    spool, (manifest, data) = Spool(tmp_path), update()
    with spool.writer(TICKET, manifest) as writer:
        writer.write(0, bytes(500))
    spool = Spool(tmp_path) if dies else spool
    with spool.writer(TICKET, manifest) as writer:
        assert writer.position == 500
        writer.write(0, data[:300])
        assert writer.position == 300 == spool.position(TICKET, manifest.sha256)
        with pytest.raises(OffsetOutOfRange, match="begins at byte 0; the upload stands at 300"):
            writer.write(0, data[:300])
    assert send(spool, manifest, data).read_bytes() == data


def test_a_chunk_that_does_not_fit_discards_nothing(tmp_path: Path) -> None:
    spool, (manifest, data) = Spool(tmp_path), update()
    with spool.writer(TICKET, manifest) as writer:
        writer.write(0, data[:500])
    with spool.writer(TICKET, manifest) as writer, pytest.raises(ChunkInvalid):
        writer.write(0, bytes(8001))
    assert spool.position(TICKET, manifest.sha256) == 500
