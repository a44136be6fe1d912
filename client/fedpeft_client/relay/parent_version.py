"""A version of the parent's run, as the agent pulled it, on its way to the edge's server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from google.protobuf import json_format

from fedpeft.adapters.payload import Decoded, Manifest
from fedpeft.api.operator_client import OperatorClient
from fedpeft.process.mapped_files import mapped, releaser
from fedpeft.rpc import wire
from fedpeft.v1 import operator_service_pb2 as pb
from fedpeft.v1 import run_pb2, tensor_pb2
from fedpeft_client.relay.options import RelayOptions
from fedpeft_client.state.runs import KnownRun


@dataclass(frozen=True)
class Version:
    """A version of the parent's run.

    Attributes:
        run: The run.
        number: The version's number.
        manifest: Its description.
        payload: Its payload, in any encoding.
    """

    run: KnownRun
    number: int
    manifest: Manifest
    payload: Path

    @classmethod
    def from_json(cls, run: KnownRun, number: int, adapter: Mapping[str, Any]) -> Self:
        """Returns a version from where the agent says that it is."""
        described = json_format.ParseDict(adapter["manifest"], tensor_pb2.Manifest())
        return cls(run, number, wire.manifest_from_proto(described), Path(adapter["payload"]))

    def tensors(self) -> Decoded:
        """Returns its tensors, which are decoded as they are read."""
        data = mapped(self.payload)
        return Decoded(self.manifest, data, releaser(data))

    def relays(self, options: RelayOptions) -> pb.Relay:
        """Returns its description for the edge's server."""
        return pb.Relay(run=self.run.id, version=self.number, client=options.client)


async def supply(server: OperatorClient, options: RelayOptions, version: Version) -> run_pb2.Run:
    """Supplies a version to the edge's run, and returns that; raises as `OperatorClient.supply_version`."""
    return await server.supply_version(version.relays(options), version.run.spec, version.tensors())
