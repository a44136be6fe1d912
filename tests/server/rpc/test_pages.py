"""Lists come in pages that fit into a message, however much there is to list."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.api.operator_client import OperatorClient
from fedpeft.errors import PageInvalid
from fedpeft.rpc.wire import MESSAGE_LIMIT_BYTES
from fedpeft.v1 import access_service_pb2 as access_pb
from fedpeft.v1 import access_service_pb2_grpc as access_grpc
from fedpeft.v1 import federation_service_pb2 as fed
from fedpeft.v1 import operator_service_pb2 as op
from fedpeft_server.rpc import pages

from ..conftest import Daemon, StartDaemon, config, refused
from ..long_history import PAYLOAD_UP, WIRE_UP, write_run

SHORT, WIDE, LONG = "run-short0000000", "run-wide", "run-long00"
CLIENTS, ROUNDS, FEW = 10_000, 1000, 10


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one round of very many clients, very many rounds of a few, and a run of three rounds."""
    folder = tmp_path_factory.mktemp("history")
    write_run(folder, WIDE, 1, CLIENTS)
    write_run(folder, LONG, ROUNDS, FEW)
    write_run(folder, SHORT, 3, 2)
    return folder


@pytest.fixture
async def filled(data: Path, start: StartDaemon) -> Daemon:
    return await start(data)


async def test_a_round_of_very_many_clients_is_listed_whole(filled: Daemon) -> None:
    async with OperatorClient(filled.server.settings.listen) as operator:
        (round_,) = await operator.rounds(WIDE)
        run, _ = await operator.run(WIDE)
    assert run.version == 1
    assert round_.ByteSize() > MESSAGE_LIMIT_BYTES
    assert [t.client for t in round_.tickets] == [f"client-{i:05}" for i in range(CLIENTS)]
    assert {(t.wire_bytes_up, t.examples, t.metrics["figure_2"]) for t in round_.tickets} == {(WIRE_UP, 64, 2.5)}
    assert (round_.wire_bytes_up, round_.payload_bytes_up) == (CLIENTS * WIRE_UP, CLIENTS * PAYLOAD_UP)
    assert (round_.record, round_.metrics["accuracy"]) == ("{}", 1 / 1e4)


async def test_very_many_rounds_are_listed_once_each_and_from_any_on(filled: Daemon) -> None:
    async with OperatorClient(filled.server.settings.listen) as operator:
        rounds = await operator.rounds(LONG)
        assert [r.number for r in await operator.rounds(LONG, after=997)] == [998, 999, 1000]
        assert await operator.rounds(LONG, after=2**32 - 1) == []
    assert sum(r.ByteSize() for r in rounds) > MESSAGE_LIMIT_BYTES
    assert [r.number for r in rounds] == list(range(1, ROUNDS + 1))
    assert {len(r.tickets) for r in rounds} == {FEW}
    assert all(r.metrics == {"train_loss": 1.0 / r.number, "accuracy": r.number / 1e4} for r in rounds)


async def test_page_sizes_are_held_and_the_last_page_has_no_token(filled: Daemon) -> None:
    for size in (1, 2, 3, 4):
        asked, numbers = op.ListRoundsRequest(run=SHORT, page_size=size), []
        while not numbers or asked.page_token:
            page = await filled.operator.ListRounds(asked)
            assert 1 <= len(page.rounds) <= size
            numbers += [r.number for r in page.rounds]
            asked.page_token = page.next_page_token
        assert numbers == [1, 2, 3]
        request, runs = op.ListRunsRequest(page_size=size), []
        while not runs or request.page_token:
            listed = await filled.operator.ListRuns(request)
            assert 1 <= len(listed.runs) <= size
            runs += [r.id for r in listed.runs]
            request.page_token = listed.next_page_token
        assert runs == [WIDE, LONG, SHORT]


async def test_the_round_that_nobody_was_sampled_for_comes_last_also_on_a_page_of_its_own(
    start: StartDaemon, tmp_path: Path
) -> None:
    from fedpeft_server.store.rows import RunState

    write_run(tmp_path / "data", SHORT, 2, 1, state=RunState.RUNNING)
    daemon = await start()
    assert [r.number for r in await daemon.rounds(SHORT)] == [1, 2, 3]
    page = await daemon.operator.ListRounds(op.ListRoundsRequest(run=SHORT, page_size=2))
    assert [r.number for r in page.rounds] == [1, 2]
    token = page.next_page_token
    page = await daemon.operator.ListRounds(op.ListRoundsRequest(run=SHORT, page_size=2, page_token=token))
    assert ([r.number for r in page.rounds], page.next_page_token) == ([3], "")


async def test_clients_come_in_pages_by_id_and_none_is_too_large(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["Z", "a", "a-b", "a.b", "b_", "b0"]
    for name in names:
        client = daemon.client(name)
        said = fed.Capabilities(device="x" * 200)
        request = fed.RegisterRequest(min_protocol=1, max_protocol=1, role=fed.CLIENT_ROLE_TRAINER, capabilities=said)
        await client.stub.Register(request, metadata=client.metadata)
    page = await daemon.operator.ListClients(op.ListClientsRequest(page_size=4))
    assert [c.id for c in page.clients] == sorted(names)[:4]
    rest = await daemon.operator.ListClients(op.ListClientsRequest(page_size=4, page_token=page.next_page_token))
    assert ([c.id for c in rest.clients], rest.next_page_token) == (sorted(names)[4:], "")
    monkeypatch.setattr(pages, "PAGE_BYTES", 600)
    cut = await daemon.operator.ListClients(op.ListClientsRequest())
    assert len(cut.clients) == 2 and cut.next_page_token


async def test_a_wrong_size_or_token_is_refused_with_its_field(filled: Daemon) -> None:
    token = (await filled.operator.ListRounds(op.ListRoundsRequest(run=SHORT, page_size=1))).next_page_token
    assert token
    for request in (
        op.ListRoundsRequest(run=SHORT, page_size=-1),
        op.ListRoundsRequest(run=SHORT, page_token="nonsense"),
        op.ListRoundsRequest(run=SHORT, page_token=token[:-1]),
        op.ListRoundsRequest(run=SHORT, page_token=token, after=1),
        op.ListRoundsRequest(run=LONG, page_token=token),
    ):
        assert await refused(filled.operator.ListRounds(request)) == "PAGE_INVALID"
    assert await refused(filled.operator.ListRuns(op.ListRunsRequest(page_token=token))) == "PAGE_INVALID"
    assert await refused(filled.operator.ListClients(op.ListClientsRequest(page_token="é"))) == "PAGE_INVALID"


FORGED: tuple[object, ...] = (
    *([], [0, 0], ["a", 0.5], [None], [[0], {}], [0, "", 0], ["", 0], [True, ""], {"a": 1}, 7, None, "x" * 9),
    *([2**63, ""], [-1, ""], [2**70], [-(2**63) - 1], ["\ud800"], [0.0, "\ud800"], ["\0", "\0"], ["a", "\ud800"]),
    *([float("nan"), ""], [float("inf"), ""], [10**400, ""]),
)
"""Positions that no list gives, though anybody can make the token for them: its digest has no key."""


def forged_token(position: object, of: pages.Position) -> str:
    """Makes a token as anybody can who has read the code."""
    body = json.dumps(position).encode()
    digest = hashlib.sha256(json.dumps(list(of)).encode() + b"\0" + body).digest()[:6]
    return base64.urlsafe_b64encode(digest + body).decode().rstrip("=")


async def test_a_forged_token_is_refused_as_one_by_every_list(daemon: Daemon) -> None:
    run = await daemon.create(config())
    access = access_grpc.AccessServiceStub(daemon.channel)
    lists: list[tuple[Callable[[Any], Awaitable[object]], Any, pages.Position]] = [
        (daemon.operator.ListRuns, op.ListRunsRequest(), ("runs",)),
        (daemon.operator.ListRounds, op.ListRoundsRequest(run=run.id), ("rounds", run.id, 0)),
        (daemon.operator.ListClients, op.ListClientsRequest(), ("clients",)),
        (access.ListTokens, access_pb.ListTokensRequest(), ("tokens",)),
        (access.ListIdentities, access_pb.ListIdentitiesRequest(), ("identities",)),
        (access.ListAuditEntries, access_pb.ListAuditEntriesRequest(), ("audit", 0)),
    ]
    for call, request, of in lists:
        for forged in FORGED:
            request.page_token = forged_token(forged, of)
            assert await refused(call(request)) == "PAGE_INVALID", (of, forged)


ATOMS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
JSON = st.recursive(ATOMS, lambda each: st.lists(each, max_size=3) | st.dictionaries(st.text(max_size=3), each))
OF: pages.Position = ("rounds", "run-1", 3)


@given(
    given=st.text()
    | st.binary().map(lambda data: base64.urlsafe_b64encode(data).decode())
    | JSON.map(lambda found: forged_token(found, OF)),
    first=st.sampled_from([(0, ""), (0.0, ""), ("",), ("", ""), (0,)]),
)
def test_whatever_the_token_it_is_refused_or_stands_for_a_place_of_such_a_list(
    given: str, first: tuple[str | int | float, ...]
) -> None:
    try:
        found = pages.position(given, of=OF, first=first)
    except PageInvalid as error:
        assert [field for field, _ in error.fields] == ["page_token"]
        return
    assert [type(each) for each in found] == [type(each) for each in first]
    if given:
        assert pages.token(found, of=OF) == given
        assert all(each.isascii() for each in found if isinstance(each, str))
        assert all(0 <= each < 2**63 for each in found if not isinstance(each, str))


@given(
    place=st.tuples(st.integers(0, 2**63 - 1), st.text("abc-._019", max_size=64)),
    of=st.lists(st.text(max_size=5) | st.integers(), max_size=3),
)
def test_a_token_of_a_list_stands_for_its_place_in_this_list_only(place: tuple[int, str], of: list[str | int]) -> None:
    token = pages.token(place, of=of)
    assert pages.position(token, of=of, first=(0, "")) == place
    for other in ([*of, "more"], of[1:] if of else ["one"]):
        with pytest.raises(PageInvalid):
            pages.position(token, of=other, first=(0, ""))
