"""A run of the server, as this client knows it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from google.protobuf import json_format

from fedpeft.adapters.payload import Entry, Manifest
from fedpeft.adapters.spec import AdapterSpec, TensorSpec
from fedpeft.aggregation import strategy
from fedpeft.aggregation.low_rank.ranks import of_rank, rank_in
from fedpeft.codecs import codecs
from fedpeft.codecs.sum128 import SUM128
from fedpeft.config import RunConfig
from fedpeft.rpc import wire
from fedpeft.v1 import run_pb2


@dataclass(frozen=True)
class KnownRun:
    """A run as the server describes it; agent and worker both read it from the same message.

    Attributes:
        id: The server's id of it.
        config: The run file.
        spec: Every tuned tensor.
        fingerprint: SHA-256 of the frozen tensors, hexadecimal.
        version: Newest committed adapter version when it was read.
        message: The message itself.
        of_sums: True if what this client sends for it are sums of several updates: it is a relay.
    """

    id: str
    config: RunConfig
    spec: AdapterSpec
    fingerprint: str
    version: int
    message: run_pb2.Run
    of_sums: bool = False

    @classmethod
    def of(cls, message: run_pb2.Run, *, of_sums: bool = False) -> KnownRun:
        """Reads a run.

        Raises:
            ConfigInvalid: If its configuration breaks a rule, or is of a newer version of the software.
            SpecInvalid: Likewise for its adapter spec.
        """
        return cls(
            message.id,
            wire.config_from_proto(message.config),
            wire.spec_from_proto(message.spec),
            message.backbone_fingerprint,
            message.version,
            message,
            of_sums,
        )

    def as_json(self) -> dict[str, Any]:
        """Returns what the worker needs to know of the run."""
        return json_format.MessageToDict(self.message)

    @classmethod
    def from_json(cls, data: dict[str, Any], *, of_sums: bool = False) -> KnownRun:
        """Reads what `as_json` returned."""
        return cls.of(json_format.ParseDict(data, run_pb2.Run()), of_sums=of_sums)

    @property
    def encoding(self) -> str:
        """The encoding of what this client sends."""
        return SUM128.name if self.of_sums else self.config.codec.encoding

    @property
    def rank(self) -> int | None:
        """The rank of the run's LoRA factors; None if it has none."""
        return rank_in(self.spec.tensors)

    @property
    def takes_ranks(self) -> bool:
        """True if clients may have factors of a lower rank."""
        chosen = self.config.aggregation
        return strategy(chosen.strategy, chosen.options).takes_ranks

    def ignores_rank(self, own: int | None) -> str:
        """Returns why a client with a rank of its own trains at a higher one, the run's; empty if it does not."""
        if own is None or self.rank is None or self.rank <= own or self.takes_ranks:
            return ""
        return f"its strategy {self.config.aggregation.strategy!r} takes updates of rank {self.rank} only"

    def upload_bounds(self, number: int, rank: int | None = None) -> tuple[int, int]:
        """Returns the fewest and most bytes of an update's payload in round `number` (1, 2, ...).

        Args:
            number: That.
            rank: The client's own rank; it counts where the run takes others than its own.
        """
        sent = of_rank(self.spec.sent(number), rank if rank and self.takes_ranks else None)
        bounds = [codecs.get(self._encoding(tensor)).length_bounds(tensor.size) for tensor in sent]
        return sum(low for low, _ in bounds), sum(high for _, high in bounds)

    def largest_manifest(self, number: int) -> Manifest:
        """Returns the manifest of an update of round `number` with as many bytes as one may have; of no digest."""
        entries, offset = list[Entry](), 0
        for tensor in self.spec.sent(number):
            encoding = self._encoding(tensor)
            _, length = codecs.get(encoding).length_bounds(tensor.size)
            entries.append(Entry(tensor.name, tensor.shape, encoding, offset, length))
            offset += length
        return Manifest(tuple(entries), offset, bytes(32))

    def _encoding(self, tensor: TensorSpec) -> str:
        return tensor.section.encoding or self.encoding
