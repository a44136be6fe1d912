"""Pulls an adapter version: only what is missing, continued where it broke off, checked before it is used.

Missing are the tensors that rounds changed since the version held; the others are taken from it. Where the result does
not have the version's digest, all of it is pulled.
"""

from __future__ import annotations

import asyncio
from functools import partial
from itertools import pairwise
from typing import BinaryIO

import grpc

from fedpeft.adapters.payload import Manifest, Selection, check_manifest
from fedpeft.errors import (
    ChecksumMismatch,
    ChunkInvalid,
    Internal,
    ManifestInvalid,
    OffsetOutOfRange,
    ServerUnreachable,
)
from fedpeft.process import logs
from fedpeft.rpc import wire
from fedpeft.v1 import federation_service_pb2 as pb
from fedpeft.v1 import tensor_pb2
from fedpeft_client.state.adapters import AdapterCache, CachedAdapter
from fedpeft_client.state.runs import KnownRun
from fedpeft_client.uplink.channel import Channel
from fedpeft_client.uplink.retry import Retry

STARTS = 3
"""Most attempts at a pull from its first byte."""

_log = logs.logger()

_Call = grpc.aio.UnaryStreamCall[pb.PullAdapterRequest, pb.PullAdapterResponse]


class Puller:
    """Brings adapter versions of one run into its cache."""

    def __init__(self, channel: Channel, retry: Retry, run: KnownRun, cache: AdapterCache) -> None:
        self._channel = channel
        self._retry = retry
        self._run = run
        self._cache = cache

    async def pull(self, version: int) -> CachedAdapter:
        """Returns an adapter version, on disk and with the digest that the server named.

        Raises:
            NotFound: If the run or the version is gone.
            ManifestInvalid: If what the server has does not fit the run's adapter spec.
            ChunkInvalid: If it sends chunks that are out of place.
            ChecksumMismatch: If it arrived damaged STARTS times.
        """
        starts = 1
        while True:
            try:
                return await self._retry.call(partial(self._continue, version, whole=starts > 1))
            except (ChecksumMismatch, OffsetOutOfRange) as error:
                self._cache.discard(version)
                if starts == STARTS:
                    raise
                _log.warning("adapter version is pulled again from its first byte", version=version, cause=str(error))
                starts += 1

    async def _continue(self, version: int, *, whole: bool) -> CachedAdapter:
        """Makes one call, which begins at the first byte that is missing.

        Args:
            version: The version.
            whole: True to fetch all of it; else the tensors that changed since the version held are enough.
        """
        held = await asyncio.to_thread(self._cache.held)
        part = self._cache.part(version)
        request = pb.PullAdapterRequest(run=self._run.id, version=version)
        if held is not None:
            request.have_sha256 = held.manifest.sha256
            if not whole and not part.exists():
                request.have_version = held.version
                part = self._cache.part(version, held.version)
        request.offset = part.stat().st_size if part.exists() else 0
        self._channel.sent(request)
        call = self._channel.pull_adapter(request)
        try:
            header, manifest = await self._header(call, version)
            if header.up_to_date:
                if held is None or held.manifest.sha256 != manifest.sha256:
                    raise Internal(f"the server says that this client holds version {version}; it does not")
                return await asyncio.to_thread(self._cache.relabel, version, manifest)
            if not header.tensors:
                if request.offset and request.HasField("have_version"):
                    raise ChecksumMismatch(f"the server sends all of version {version}, and sent a part of it before")
                part = self._cache.part(version)
            selection = _selection(header, manifest, held if request.HasField("have_version") else None)
            with part.open("ab") as file:
                await self._receive(call, file, request.offset, selection.size_bytes)
            if header.tensors and held is not None:
                await asyncio.to_thread(self._cache.complete, version, manifest, selection, held)
            return await asyncio.to_thread(self._cache.commit, version, manifest)
        finally:
            call.cancel()

    async def _header(self, call: _Call, version: int) -> tuple[pb.PullHeader, Manifest]:
        first = await self._read(call)
        if first is None or first.WhichOneof("part") != "header":
            raise Internal(f"the pull of version {version} did not begin with a header")
        if first.header.version != version:
            raise Internal(f"version {first.header.version} came instead of version {version}")
        manifest = wire.manifest_from_proto(first.header.manifest)
        allowed = sorted({"float32", self._run.config.codec.down})
        try:
            check_manifest(manifest, self._run.spec.shared, allowed)
        except ManifestInvalid as error:
            raise ManifestInvalid(f"adapter version {version}: {error}") from None
        return first.header, manifest

    async def _receive(self, call: _Call, file: BinaryIO, offset: int, size: int) -> None:
        position = offset
        while (message := await self._read(call)) is not None:
            chunk: tensor_pb2.Chunk = message.chunk
            end = chunk.offset + len(chunk.data)
            if chunk.offset != position or not position < end <= size:
                raise ChunkInvalid(
                    f"a chunk for bytes {chunk.offset} to {end} came; bytes {position} to {size} are missing"
                )
            file.write(chunk.data)
            position = end
            self._retry.note_progress()
        if position != size:
            raise ServerUnreachable(f"the pull ended at byte {position} of {size}")

    async def _read(self, call: _Call) -> pb.PullAdapterResponse | None:
        """Returns the next message, or None at the end of the stream."""
        stall_s = self._channel.timing.stall_s
        try:
            async with asyncio.timeout(stall_s):
                message = await call.read()
        except TimeoutError:
            raise ServerUnreachable(f"the pull stalled: no byte for {stall_s:.0f} seconds") from None
        except grpc.aio.AioRpcError as error:
            raise self._channel.error(error) from error
        if not isinstance(message, pb.PullAdapterResponse):
            return None
        self._channel.received(message)
        return message


def _selection(header: pb.PullHeader, manifest: Manifest, held: CachedAdapter | None) -> Selection:
    """Returns the tensors that follow a header.

    Raises:
        ManifestInvalid: If it names a selection where none was asked for, or one that is not of the manifest.
    """
    chosen, count = tuple(header.tensors), len(manifest.entries)
    if not chosen:
        return Selection.of(manifest, range(count))
    if held is None or chosen[-1] >= count or any(one >= other for one, other in pairwise(chosen)):
        wanted = f"ascending positions of {count} tensors" if held else "none: the whole version was asked for"
        raise ManifestInvalid(f"version {header.version}: tensors are {chosen[:8]}..., not {wanted}")
    return Selection.of(manifest, chosen)
