"""Calls of an edge's agent, which has the server beside it work for a parent's; part of `OperatorClient`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from io import BufferedRandom
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import grpc

from fedpeft.errors import StateInvalid
from fedpeft.process import durable
from fedpeft.v1 import operator_service_pb2 as pb
from fedpeft.v1 import operator_service_pb2_grpc as pb_grpc
from fedpeft.v1 import run_pb2

if TYPE_CHECKING:
    from fedpeft.adapters.payload import Tensors
    from fedpeft.adapters.spec import AdapterSpec

HeaderT = TypeVar("HeaderT")
AnswerT = TypeVar("AnswerT")

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""
Described = tuple[str, int, bytes]
"""A download: its name, for people, its size in bytes, and its digest."""
Upload = Callable[[Any], grpc.aio.StreamUnaryCall[Any, AnswerT]]
"""A call whose request is a stream."""


def silent(done: int, total: int) -> None:
    """The progress that nobody asked for."""


class RelayCalls(ABC):
    """The calls; each raises the class of `fedpeft.errors` that the server raised."""

    _stub: pb_grpc.OperatorServiceStub

    @abstractmethod
    async def _upload(
        self, method: Upload[AnswerT], message: Callable[..., Any], header: Any, data: bytes, progress: Progress
    ) -> AnswerT:
        """Sends a header and a payload in chunks, from the first byte as often as it takes."""

    @abstractmethod
    async def _download(
        self,
        method: Callable[[Any], Any],
        request: Any,
        described: Callable[[HeaderT], Described],
        file: BufferedRandom,
        progress: Progress,
    ) -> HeaderT:
        """Fills `file` from where it ends, as often as it takes, and checks its digest."""

    async def supply_version(
        self, relays: pb.Relay, spec: AdapterSpec, tensors: Tensors, *, progress: Progress = silent
    ) -> run_pb2.Run:
        """Uploads a version of the parent's run, after which the run's round after it begins; returns the run.

        Nothing but its description is sent of a version that the run has already.

        Args:
            relays: The parent's run, which has the same id here, the version's number, and the parent's client.
            spec: Every tuned tensor.
            tensors: Float32 by name, at least `spec.shared`.
            progress: Called after each chunk.

        Raises:
            RunNotRelayed: If the run makes its versions itself.
            RelayDiffers: If it is relayed for another client of the parent's server.
            VersionSuperseded: If it has a later one.
            VersionNotFound: If it has fewer rounds.
            VersionDiffers: If it has another one of this number.
        """
        from fedpeft.adapters import payload
        from fedpeft.rpc import wire

        manifest, data = payload.encode(tensors, spec.shared, "float32")
        described = wire.manifest_to_proto(manifest)
        header = pb.SupplyVersionHeader(
            run=relays.run, version=relays.version, manifest=described, client=relays.client
        )
        return (await self._upload(self._stub.SupplyVersion, pb.SupplyVersionRequest, header, data, progress)).run

    async def download_sum(
        self, run: str, number: int, path: Path, *, progress: Progress = silent
    ) -> pb.DownloadSumHeader:
        """Writes the sum of a round's updates to `path`, as a parent takes it for an update's payload.

        The file appears whole or not at all.

        Args:
            run: The run.
            number: The round.
            path: The file.
            progress: Called after each chunk.

        Returns:
            The description of the payload, and the examples and figures of the updates in it.

        Raises:
            ChecksumMismatch: If what came does not have the digest of its manifest.
            StateInvalid: If the file cannot be written.
            SumNotFound: If the round is not committed, or a later version was supplied since.
        """

        def described(header: pb.DownloadSumHeader) -> Described:
            return f"the sum of round {number} of {run}", header.manifest.payload_bytes, header.manifest.sha256

        request = pb.DownloadSumRequest(run=run, round=number)
        try:
            with durable.writing(path) as file:
                return await self._download(self._stub.DownloadSum, request, described, file, progress)
        except OSError as error:
            raise StateInvalid(f"cannot write {path}: {error.strerror}") from None
