"""Calls of an edge's agent: versions of the parent's server come in, and the sums of rounds go out."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from functools import partial

from fedpeft.adapters import adapter_file, payload
from fedpeft.adapters.payload import chunks
from fedpeft.errors import (
    BlobCorrupt,
    ManifestInvalid,
    OffsetOutOfRange,
    RelayDiffers,
    RunNotRelayed,
    SumNotFound,
    VersionDiffers,
)
from fedpeft.privacy.statement import EPSILON
from fedpeft.rounds import record
from fedpeft.rounds.folding.contributions import sum_manifest
from fedpeft.rounds.policies import policy_of
from fedpeft.rpc import chunk_messages
from fedpeft.rpc.wire import manifest_from_proto, manifest_to_proto
from fedpeft.v1 import operator_service_pb2 as pb
from fedpeft_server.access.call import actor
from fedpeft_server.rpc.new_runs import stored_version
from fedpeft_server.runs.engine import RunEngine
from fedpeft_server.runs.runs import Runs
from fedpeft_server.store.blobs.integrity import Kind
from fedpeft_server.store.rows import RunState, VersionRow
from fedpeft_server.store.store import NewVersion, Store, file_key, sum_key
from fedpeft_server.uploads.incoming import Context, first_header
from fedpeft_server.uploads.pipeline import Uploads

_OF_AN_UPDATE = {"loss": "train_loss", EPSILON: EPSILON}
"""Figures of an update that a sum has too, each with the round's figure that it is: a mean, the largest one so far."""


class Relaying:
    """The part of the operators' service that an edge's agent calls.

    Args:
        runs: All runs.
        store: Database, blobs and spool.
        uploads: Receives payloads.
    """

    def __init__(self, runs: Runs, store: Store, uploads: Uploads) -> None:
        self._runs = runs
        self._store = store
        self._uploads = uploads

    async def supply(self, requests: AsyncIterator[pb.SupplyVersionRequest], context: Context) -> RunEngine:
        """Takes a version of the parent's server; returns its run.

        One that is here already needs no chunk: its digest says that it is the same.

        Raises:
            RunNotFound: If there is no such run.
            RelayDiffers: If the run is relayed for another client of that server.
            VersionDiffers: If it has another version of this number.
            FedpeftError: As `RunEngine.supply` and `Uploads.receive_version`.
        """
        header: pb.SupplyVersionHeader = await first_header(requests)
        engine = await self._relayed(header.run)
        relay = engine.run.relay
        if relay not in (header.client, ""):  # empty where an older server made the run
            raise RelayDiffers(
                f"{header.run} is relayed for client {relay} of the parent's server, and not for "
                f"{header.client[:64]!r} too, or its updates would be counted twice; stop one of the two agents. If "
                f"{relay} is gone for good, stop and delete the run at the edge, and start the other agent again"
            )
        try:
            manifest = manifest_from_proto(header.manifest)
            payload.check_manifest(manifest, engine.run.spec.shared, ("float32",))
        except ManifestInvalid as error:
            raise error.within("header.manifest") from None
        if header.version != engine.run.version:
            await engine.check_supply(header.version)
            new = NewVersion.relayed(engine.run.id, header.version)
            await self._uploads.receive_version(new.spool_key, manifest, context)
            await engine.supply(new, partial(stored_version, self._store, new, engine.run, manifest), actor())
        await self._check_same(engine, header.version, manifest.sha256)
        return engine

    async def _check_same(self, engine: RunEngine, version: int, sha256: bytes) -> None:
        """Checks that a run's version is the one of a parent's server whose float32 payload has the digest `sha256`.

        Raises:
            VersionDiffers: If it is another one; the run says so from now on, and is paused unless it is over.
            BlobCorrupt: If its file is missing or corrupt.
        """
        run = engine.run.id
        async with engine.noting_corruption(version):
            row = await self._store.transact(self._store.db.version, run, version)
            found = await self._store.version(self._payload_sha256, row)
        if found != sha256:
            error = _differs(engine, version)
            await engine.differs(error.message, actor())
            raise error

    def _payload_sha256(self, version: VersionRow) -> bytes:
        with self._store.blobs.verified(file_key(version), version.sha256, Kind.VERSION) as path:
            return adapter_file.data_sha256(path)

    async def sum_of(self, request: pb.DownloadSumRequest) -> AsyncGenerator[pb.DownloadSumResponse | bytes, None]:
        """Yields the sum of a round: a header, then its payload in chunks.

        Raises:
            RunNotFound: If there is no such run.
            RunNotRelayed: If its rounds make versions.
            SumNotFound: If the round is not committed, or a later version was supplied since.
            OffsetOutOfRange: If the payload is shorter than the offset.
            BlobCorrupt: If it does not have its digest.
        """
        engine = await self._relayed(request.run)
        run, number = engine.run, request.round
        text, figures = await self._store.read(self._store.db.record, run.id, number)
        if not text or number <= run.version:
            why = "a later version was supplied since" if number <= run.version else "it is not committed"
            raise SumNotFound(f"{run.id} has no sum of round {number}: {why}")
        said = await self._store.compute(record.parse, text)  # of very many clients it takes seconds
        manifest = sum_manifest(run.spec.sent(number), bytes.fromhex(said.sum_sha256))
        if request.offset > manifest.payload_bytes:
            fault = f"is {request.offset}; the sum has {manifest.payload_bytes} bytes"
            raise OffsetOutOfRange(f"the offset {fault}", (("offset", fault),))
        metrics = {"updates": float(len(said.contributions))}
        for name, of_round in _OF_AN_UPDATE.items():
            if of_round in figures:
                metrics[name] = figures[of_round]
        examples = sum(contributed.examples for contributed in said.contributions)
        key = sum_key(run.id, number, said.sum_sha256)
        try:
            async with self._store.opened(self._store.blobs.open, key, said.sum_sha256, Kind.SUM) as file:
                described = manifest_to_proto(manifest)
                header = pb.DownloadSumHeader(manifest=described, examples=examples, metrics=metrics)
                yield pb.DownloadSumResponse(header=header)
                for offset, length in chunks(request.offset, manifest.payload_bytes):
                    data = await self._store.file(file.read, offset, length)
                    yield chunk_messages.write(offset, data)
        except BlobCorrupt:
            if number <= engine.run.version:  # it was removed meanwhile
                raise SumNotFound(
                    f"{run.id} has no sum of round {number}: a later version was supplied since"
                ) from None
            raise

    async def _relayed(self, run: str) -> RunEngine:
        """Returns the engine of a run whose rounds make sums.

        Raises:
            RunNotFound: If there is no such run.
            RunNotRelayed: If its rounds make versions.
        """
        engine = await self._runs.look_up(run)
        if policy_of(engine.run.config.rounds).makes_versions:
            raise RunNotRelayed(f"{run} makes its versions itself; only the part of a parent's run is relayed")
        return engine


def _differs(engine: RunEngine, version: int) -> VersionDiffers:
    """Returns the error of a version that is another one at the parent's server, with what can be done about it."""
    remedy = "stop and delete the run at the edge: it is created anew from the parent's"
    if engine.run.state is RunState.COMPLETED:
        remedy = "the run's result is that of the parent: export it there, and delete the run at the edge"
    return VersionDiffers(
        f"{engine.run.id} has another version {version} than the parent's server, which made it again, as after a "
        f"restore from a backup; {remedy}"
    )
