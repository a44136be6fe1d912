"""Pulls an adapter version: only what is missing, continued where it broke off, checked before it is used."""

from __future__ import annotations

import asyncio
from typing import BinaryIO

import grpc

from fedpeft.adapters.payload import Manifest, check_manifest
from fedpeft.errors import (
    ChecksumMismatch,
    ChunkInvalid,
    Internal,
    ManifestInvalid,
    OffsetOutOfRange,
    ServerUnreachable,
)
from fedpeft.rpc import wire
from fedpeft.rpc.timing import STALL_S
from fedpeft.v1 import federation_service_pb2 as pb
from fedpeft.v1 import tensor_pb2
from fedpeft_client.state.adapters import AdapterCache, CachedAdapter
from fedpeft_client.state.runs import KnownRun
from fedpeft_client.uplink.channel import Channel
from fedpeft_client.uplink.retry import Retry

STARTS = 3
"""Most attempts at a pull from its first byte."""

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
                return await self._retry.call(lambda: self._continue(version))
            except (ChecksumMismatch, OffsetOutOfRange):
                self._cache.part(version).unlink(missing_ok=True)
                if starts == STARTS:
                    raise
                starts += 1

    async def _continue(self, version: int) -> CachedAdapter:
        """Makes one call, which begins at the first byte that is missing."""
        held = await asyncio.to_thread(self._cache.held)
        part = self._cache.part(version)
        request = pb.PullAdapterRequest(run=self._run.id, version=version)
        request.offset = part.stat().st_size if part.exists() else 0
        if held is not None:
            request.have_sha256 = held.manifest.sha256
        self._channel.sent(request)
        call = self._channel.pull_adapter(request)
        try:
            header, manifest = await self._header(call, version)
            if header.up_to_date:
                if held is None or held.manifest.sha256 != manifest.sha256:
                    raise Internal(f"the server says that this client holds version {version}; it does not")
                return await asyncio.to_thread(self._cache.relabel, version, manifest)
            with part.open("ab") as file:
                await self._receive(call, file, request.offset, manifest)
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

    async def _receive(self, call: _Call, file: BinaryIO, offset: int, manifest: Manifest) -> None:
        position = offset
        while (message := await self._read(call)) is not None:
            chunk: tensor_pb2.Chunk = message.chunk
            end = chunk.offset + len(chunk.data)
            if chunk.offset != position or not position < end <= manifest.payload_bytes:
                raise ChunkInvalid(
                    f"a chunk for bytes {chunk.offset} to {end} came; "
                    f"bytes {position} to {manifest.payload_bytes} are missing"
                )
            file.write(chunk.data)
            position = end
            self._retry.note_progress()
        if position != manifest.payload_bytes:
            raise ServerUnreachable(f"the pull ended at byte {position} of {manifest.payload_bytes}")

    async def _read(self, call: _Call) -> pb.PullAdapterResponse | None:
        """Returns the next message, or None at the end of the stream."""
        try:
            async with asyncio.timeout(STALL_S):
                message = await call.read()
        except TimeoutError:
            raise ServerUnreachable(f"the pull stalled: no byte for {STALL_S:.0f} seconds") from None
        except grpc.aio.AioRpcError as error:
            raise self._channel.error(error) from error
        if not isinstance(message, pb.PullAdapterResponse):
            return None
        self._channel.received(message)
        return message
