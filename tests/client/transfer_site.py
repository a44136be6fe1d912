"""One client's side of transfers, and the server that it makes them with."""

from __future__ import annotations

import numpy as np

from fedpeft.adapters import payload
from fedpeft.adapters.spec import AdapterSpec, TensorRole, TensorSpec
from fedpeft.config import parse_config
from fedpeft.process import logs
from fedpeft.rpc import wire
from fedpeft.v1 import federation_service_pb2 as pb
from fedpeft_client.egress.log import EgressLog
from fedpeft_client.owner.metrics import Metrics
from fedpeft_client.state.adapters import AdapterCache
from fedpeft_client.state.outbox import PAYLOAD, Outbox, Pending
from fedpeft_client.state.runs import KnownRun
from fedpeft_client.state.state_dir import StateDirectory
from fedpeft_client.uplink.channel import Channel
from fedpeft_client.uplink.pull import Puller
from fedpeft_client.uplink.push import Pusher
from fedpeft_client.uplink.retry import Retry
from fedpeft_client.uplink.traffic import Traffic

from .federation import FakeRun, FakeTicket, Federation

IF_COUNTED, IF_NOT, LOCAL = "residual_if_counted.safetensors", "residual_if_not.safetensors", "local.safetensors"
SHAPE = (900_000,)  # 3.6 MB: four chunks
SPEC = AdapterSpec(
    "bias", (TensorSpec("a", SHAPE), TensorSpec("kept", (5,), (TensorRole.LOCAL,)), TensorSpec("z", (3,)))
)


def a_run() -> FakeRun:
    config = parse_config(
        {
            "model": {"name": "vit_tiny_patch16_224", "weights": "none", "classes": ["a", "b"]},
            "peft": {"method": "bias"},
            "rounds": {"clients": 1},
        }
    )
    values = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    return FakeRun(config, SPEC, "0" * 64, {"a": values, "z": np.arange(3, dtype=np.float32)})


class Site:
    """One client's side of the transfers."""

    def __init__(self, federation: Federation, directory: StateDirectory, channel: Channel) -> None:
        self.federation, self.directory, self.channel = federation, directory, channel
        assert federation.run is not None
        self.run = KnownRun.of(federation.run.message())
        self.cache = AdapterCache(directory.run(self.run.id))
        self.log = logs.logger(client="site-a")
        self.retry = Retry(self.log, None)
        self.puller = Puller(channel, self.retry, self.run, self.cache)
        self.egress_log = EgressLog(directory.path, federation.address)
        Traffic(channel, self.egress_log, Metrics())
        self.pusher = Pusher(channel, self.retry, self.egress_log)
        self.outbox = Outbox(directory, "")

    def pending(self) -> Pending:
        """Makes an update, and the ticket for it at the server."""
        assert self.federation.run is not None
        self.federation.run.number = 1
        self.federation.run.tickets["ticket-1"] = FakeTicket("ticket-1", "site-a", 1)
        delta = {"a": np.full(SHAPE, 0.5, np.float32), "z": np.ones(3, np.float32)}
        manifest, data = payload.encode(delta, SPEC.sent(1), "float32")
        draft = self.outbox.draft()
        (draft / PAYLOAD).write_bytes(data)
        for name in (IF_COUNTED, IF_NOT, LOCAL):
            (draft / name).write_bytes(name.encode())
        header = pb.UpdateHeader(ticket="ticket-1", manifest=wire.manifest_to_proto(manifest), examples=4)
        return self.outbox.commit(self.run.id, 1, header)

    @property
    def ticket(self) -> FakeTicket:
        assert self.federation.run is not None
        return self.federation.run.tickets["ticket-1"]
