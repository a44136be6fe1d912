"""A server that means harm: a real gRPC server on loopback whose every answer a test chooses."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc

from fedpeft.rpc.wire import TURN_KEY
from fedpeft.v1 import federation_service_pb2 as pb
from fedpeft.v1 import federation_service_pb2_grpc as pb_grpc

Context = grpc.aio.ServicerContext[Any, Any]


class Hostile(pb_grpc.FederationServiceServicer):
    """Answers AwaitRound with `answer`, and other calls with what a test put there.

    Attributes:
        calls: Number of calls of each method.
        declined: Reasons of declines, by run.
    """

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.declined: dict[str, list[str]] = {}
        self.accepted: list[str] = []
        self.answer: Callable[[], pb.AwaitRoundResponse] = lambda: pb.AwaitRoundResponse(idle=pb.Idle(reason="wait"))
        self.standing = pb.GetUploadResponse()
        self.receipt = pb.PushUpdateResponse()
        self.pull: list[pb.PullAdapterResponse] = []
        self.refuse: Callable[[Context], Any] | None = None

    async def start(self) -> str:
        self._server = grpc.aio.server()
        pb_grpc.add_FederationServiceServicer_to_server(self, self._server)
        port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()
        return f"127.0.0.1:{port}"

    async def stop(self) -> None:
        await self._server.stop(None)

    async def Register(self, request: pb.RegisterRequest, context: Context) -> pb.RegisterResponse:
        self.calls["Register"] += 1
        return pb.RegisterResponse(protocol=1)

    async def AwaitRound(self, request: pb.AwaitRoundRequest, context: Context) -> pb.AwaitRoundResponse:
        self.calls["AwaitRound"] += 1
        if self.refuse is not None:
            await self.refuse(context)
        return self.answer()

    async def AnswerOffer(self, request: pb.AnswerOfferRequest, context: Context) -> pb.AnswerOfferResponse:
        self.calls["AnswerOffer"] += 1
        if request.answer == pb.ANSWER_ACCEPTED:
            self.accepted.append(request.run)
        else:
            self.declined[request.run] = list(request.reasons)
        return pb.AnswerOfferResponse()

    async def PullAdapter(
        self, request: pb.PullAdapterRequest, context: Context
    ) -> AsyncIterator[pb.PullAdapterResponse]:
        self.calls["PullAdapter"] += 1
        for message in self.pull:
            yield message
        if self.pull:
            while True:  # and never ends
                yield self.pull[-1]
                await asyncio.sleep(0)

    async def GetUpload(self, request: pb.GetUploadRequest, context: Context) -> pb.GetUploadResponse:
        self.calls["GetUpload"] += 1
        return self.standing

    async def PushUpdate(
        self, requests: AsyncIterator[pb.PushUpdateRequest], context: Context
    ) -> pb.PushUpdateResponse:
        self.calls["PushUpdate"] += 1
        await context.send_initial_metadata(((TURN_KEY, "1"),))
        async for _ in requests:
            pass
        return self.receipt

    async def Withdraw(self, request: pb.WithdrawRequest, context: Context) -> pb.WithdrawResponse:
        self.calls["Withdraw"] += 1
        return pb.WithdrawResponse()
