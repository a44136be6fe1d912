"""Walks the first table of docs/errors.md: every reason is really provoked on the wire, with its status."""

from __future__ import annotations

import re
from pathlib import Path

import grpc
import pytest

from fedpeft.api.operator_client import OperatorClient
from fedpeft.rpc.status import from_rpc_error

from ...ports import free_port
from ..conftest import StartDaemon
from ..provocations import PROVOCATIONS
from ..provoked_world import World

PAGE = (Path(__file__).parents[3] / "docs" / "errors.md").read_text(encoding="utf-8")
ON_THE_WIRE = dict(re.findall(r"^\| `([A-Z_]+)` \| ([A-Z_]+) \|", PAGE, re.M))


def test_every_reason_on_the_wire_has_a_provocation() -> None:
    assert PROVOCATIONS.keys() == ON_THE_WIRE.keys(), "docs/errors.md and the provocations here differ"


@pytest.mark.parametrize("reason", ON_THE_WIRE)
async def test_what_the_page_lists_really_happens(
    start: StartDaemon, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await PROVOCATIONS[reason](World(start, request, monkeypatch))
    error = from_rpc_error(caught.value)
    assert (error.reason, caught.value.code().name) == (reason, ON_THE_WIRE[reason]), error.message
    assert error.status == ON_THE_WIRE[reason]
    assert len(error.message.split()) > 4, "a sentence says what, where, and what would be right"
    assert "Traceback" not in error.message
    assert not re.search(r"(?<![\w-])--[a-z]", error.message), "a client in another language has no such flag"
    if error.status == "INVALID_ARGUMENT":
        assert error.fields and all(field and text for field, text in error.fields), "the faulty field is named"


async def test_the_operators_client_raises_the_class_of_the_reason() -> None:
    from fedpeft.errors import ServerUnreachable

    async with OperatorClient(f"127.0.0.1:{free_port()}", attempts=1) as server:
        with pytest.raises(ServerUnreachable, match="no FedPEFT server answers at"):
            await server.runs()
