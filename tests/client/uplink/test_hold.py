"""A client lets its server hold the call for work as long as the server asked for, within a bound."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from fedpeft.errors import FedpeftError
from fedpeft.rpc.timing import LONGEST_HOLD_S
from fedpeft.v1 import federation_service_pb2 as pb
from fedpeft.v1 import federation_service_pb2_grpc as pb_grpc
from fedpeft_client.timing import TIMING
from fedpeft_client.uplink.channel import Channel


class Holding(pb_grpc.FederationServiceServicer):
    """Answers each call with the next hint; None fails."""

    def __init__(self, *hints: int | None) -> None:
        self.hints = list(hints)
        self.agreed: list[int] = []
        self.patience: list[float] = []

    async def AwaitRound(self, request: pb.AwaitRoundRequest, context: Any) -> pb.AwaitRoundResponse:
        self.agreed.append(request.hold_s)
        self.patience.append(context.time_remaining())
        hint = self.hints.pop(0)
        if hint is None:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "away")
        return pb.AwaitRoundResponse(idle=pb.Idle(reason="nobody is there", hold_s=hint or 0))


async def test_the_servers_hint_is_agreed_to_and_forgotten_with_a_call_that_fails() -> None:
    holding, server = Holding(300, 0, 4_000_000_000, 200, None, 0), grpc.aio.server()
    pb_grpc.add_FederationServiceServicer_to_server(holding, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with Channel(f"127.0.0.1:{port}", "site-a", "0" * 32) as channel:
            for _ in range(4):
                await channel.await_round("", until_finished=False)
            with pytest.raises(FedpeftError):
                await channel.await_round("", until_finished=False)
            await channel.await_round("", until_finished=False)
    finally:
        await server.stop(None)
    assert holding.agreed == [0, 300, 0, LONGEST_HOLD_S, 200, 0]
    waited = [TIMING.call_s + max(TIMING.hold_s, agreed) for agreed in holding.agreed]
    assert all(most - 10 < left <= most + 1 for left, most in zip(holding.patience, waited, strict=True))
