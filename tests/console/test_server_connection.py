"""One connection for all that the console asks: a question that fails takes nobody else's answer away."""

from __future__ import annotations

import asyncio

import pytest
from structlog.testing import capture_logs

from fedpeft.api import operator_client
from fedpeft.api.operator_client import OperatorClient
from fedpeft.errors import ServerUnreachable
from fedpeft_operator.console.feeds.change_signal import ChangeSignal
from fedpeft_operator.console.feeds.directory import Directory
from fedpeft_operator.console.feeds.server_connection import ServerConnection

from .federation import Federation

pytestmark = pytest.mark.xdist_group("console")


async def test_a_question_that_fails_leaves_those_under_way_their_connection(federation: Federation) -> None:
    opened: list[OperatorClient] = []

    def connect() -> OperatorClient:
        opened.append(OperatorClient(federation.address))
        return opened[-1]

    connection, asked, failed = ServerConnection(connect), asyncio.Event(), asyncio.Event()

    async def slow(server: OperatorClient) -> int:
        asked.set()
        await failed.wait()
        return len(await server.runs())

    async def away(_: OperatorClient) -> int:
        await asked.wait()
        raise ServerUnreachable("the server is away")

    answer = asyncio.create_task(connection.ask(slow))
    with pytest.raises(ServerUnreachable):
        await connection.ask(away)
    failed.set()
    assert await answer >= 0
    assert await connection.ask(lambda server: server.clients()) is not None
    assert len(opened) == 2, "the next question takes a new connection"
    await connection.close()


async def test_a_connection_is_not_kept_for_ever(federation: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operator_client, "KEEP_S", 0.5)
    opened: list[OperatorClient] = []

    def connect() -> OperatorClient:
        opened.append(OperatorClient(federation.address))
        return opened[-1]

    connection = ServerConnection(connect)
    for _ in range(2):
        assert await connection.ask(lambda server: server.runs()) is not None
    assert len(opened) == 1
    await asyncio.sleep(0.6)
    assert await connection.ask(lambda server: server.runs()) is not None
    assert len(opened) == 2, "an identity is renewed when a connection is opened"
    await connection.close()


async def test_a_fault_in_a_look_is_said_and_the_next_look_is_made() -> None:
    class Faulty:
        async def ask(self, _: object) -> list[object]:
            raise RuntimeError("a fault of ours")

    directory = Directory(Faulty(), ChangeSignal(), lambda: None)  # type: ignore[arg-type]
    with capture_logs() as said:
        await directory.refresh()
        assert directory.lost == "the console cannot read the server's lists: RuntimeError: a fault of ours"
        await directory.refresh(force=True)
    assert [connection["event"] for connection in said] == ["the lists cannot be read"] * 2
