"""Updates in the spool and in an object store: the same behaviour, and one more server that finds what is whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import obstore
import pytest

from fedpeft.adapters import payload
from fedpeft.adapters.payload import Manifest
from fedpeft.adapters.spec import AdapterSpec, TensorSpec
from fedpeft.errors import BlobCorrupt, DiskFull, StoreUnavailable
from fedpeft_server.store.blobs.blobs import Blobs
from fedpeft_server.store.spool import Spool
from fedpeft_server.store.store import Store
from fedpeft_server.store.update_store import BucketUpdates, UpdateStore
from fedpeft_server.timing import TIMING

SPEC = AdapterSpec.of("bias", [TensorSpec("head.weight", (100, 20))])
TICKET = "ticket-0123456789abcdef"


def update(value: float = 1.0) -> tuple[Manifest, bytes]:
    return payload.encode({"head.weight": np.full((100, 20), value, np.float32)}, SPEC.sent(1), "float32")


class Place:
    """Two servers' update stores; `another` is one on another machine, where the place is shared."""

    def __init__(self, folder: Path, *, shared: bool, url: str = "") -> None:
        self.spools = [Spool(folder / f"spool-{number}") for number in (1, 2)]
        self.blobs = Blobs(url or f"file://{folder / 'bucket'}", folder / "fetched")
        stores = [BucketUpdates(spool, self.blobs) if shared else spool for spool in self.spools]
        self.one: UpdateStore = stores[0]
        self.another: UpdateStore = stores[1]

    def objects(self) -> list[str]:
        found = (object["path"] for batch in obstore.list(self.blobs._store) for object in batch)
        return sorted(path.rpartition("/")[2] for path in found)


@pytest.fixture(params=["folder", "bucket", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    url = request.getfixturevalue("s3") if request.param == "s3" else ""
    return Place(tmp_path, shared=request.param != "folder", url=url)


@pytest.fixture(params=["bucket", "s3"])
def bucket(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return Place(tmp_path, shared=True, url=request.getfixturevalue("s3") if request.param == "s3" else "")


def send(store: UpdateStore, manifest: Manifest, data: bytes, upto: int | None = None) -> None:
    with store.writer(TICKET, manifest) as writer:
        writer.write(writer.position, data[writer.position : upto])
        if upto is None:
            writer.finish()


def read(store: UpdateStore, manifest: Manifest) -> bytes:
    with store.open(TICKET, manifest.sha256) as view:
        return bytes(view)


def test_an_upload_goes_on_and_is_read_once_it_is_whole(place: Place) -> None:
    manifest, data = update()
    send(place.one, manifest, data, 1000)
    assert place.one.position(TICKET, manifest.sha256) == 1000
    with pytest.raises(BlobCorrupt):
        read(place.one, manifest)
    assert place.objects() == []
    send(place.one, manifest, data)
    assert read(place.one, manifest) == data
    with pytest.raises(BlobCorrupt):
        read(place.one, update(2.0)[0])


def test_what_is_removed_is_gone_everywhere(place: Place) -> None:
    manifest, data = update()
    send(place.one, manifest, data)
    place.one.remove_partial(TICKET)
    assert read(place.one, manifest) == data, "it is whole"
    place.one.remove_all([TICKET, "ticket-none"])
    for store in (place.one, place.another):
        with pytest.raises(BlobCorrupt):
            read(store, manifest)
    assert place.objects() == []
    send(place.one, manifest, data, 1000)
    place.one.remove_partial(TICKET)
    assert place.one.position(TICKET, manifest.sha256) == 0


def test_a_whole_update_outlives_its_machine(bucket: Place) -> None:
    manifest, data = update()
    send(bucket.one, manifest, data)
    assert read(bucket.another, manifest) == data
    assert bucket.objects() == [manifest.sha256.hex()]
    bucket.another.remove_all([TICKET])
    assert bucket.objects() == []
    assert read(bucket.one, manifest) == data, "its own copy goes with the round, at its own server"


def test_two_servers_may_hold_different_payloads_of_a_ticket(bucket: Place) -> None:
    """A client that sends twice, to two servers: the database says which of the two counts."""
    first, second = update(1.0), update(2.0)
    send(bucket.one, *first)
    send(bucket.another, *second)
    for store in (bucket.one, bucket.another):
        assert [read(store, manifest) for manifest, _ in (first, second)] == [first[1], second[1]]


def test_no_update_is_whole_before_the_object_store_has_it(bucket: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest, data = update()
    put, once = bucket.blobs.put, [True]

    def full(*args: object) -> None:
        if once:
            once.clear()
            raise DiskFull("no room")
        put(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(bucket.blobs, "put", full)
    with pytest.raises(DiskFull):
        send(bucket.one, manifest, data)
    assert bucket.objects() == []
    with bucket.one.writer(TICKET, manifest) as writer:  # as for the client that asks again
        assert writer.position == len(data)
        writer.finish()
    assert read(bucket.another, manifest) == data


def test_what_could_not_be_removed_is_removed_later(bucket: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest, data = update()
    send(bucket.one, manifest, data)

    def refuses(prefix: str) -> None:
        raise StoreUnavailable(f"{prefix} is not mine")

    with monkeypatch.context() as patched:
        patched.setattr(bucket.blobs, "delete_prefix", refuses)
        for attempt in (lambda: bucket.one.remove_all([TICKET]), bucket.one.clean):
            with pytest.raises(StoreUnavailable):
                attempt()
    assert bucket.objects() == [manifest.sha256.hex()]
    bucket.one.clean()
    assert bucket.objects() == []


async def test_a_start_leaves_a_kept_update_that_another_server_received(tmp_path: Path) -> None:
    """Its client began to send it here, and went on there; with `--keep-updates` it stays in the bucket."""
    stores, places = list[Store](), (str(tmp_path / "versions"), (tmp_path / "bucket").as_uri())
    for name in ("one", "another"):
        (tmp_path / name).mkdir()
        stores.append(Store(tmp_path / name, "", *places, keep_updates=True, timing=TIMING))
    manifest, data = update()
    send(stores[0].updates, manifest, data, upto=10)
    send(stores[1].updates, manifest, data)
    await stores[0].sweep((), ())
    assert not stores[0].spool.tickets()
    assert read(stores[0].updates, manifest) == data
    for store in stores:
        store.close()
