"""Records of rounds are read where they are asked for, as many as fit, and one that does not fit comes in pieces."""

from __future__ import annotations

import hashlib
import sqlite3
from pathlib import Path

import pytest
from sqlalchemy import update

from fedpeft.api.operator_client import OperatorClient
from fedpeft.api.round_parts import folded
from fedpeft.rpc.wire import MESSAGE_LIMIT_BYTES
from fedpeft.v1 import operator_service_pb2 as op
from fedpeft.v1 import run_pb2
from fedpeft_server.rpc.pages import PAGE_BYTES
from fedpeft_server.store import tables
from fedpeft_server.store.database import Database
from fedpeft_server.store.rows import Place, RunState
from fedpeft_server.timing import TIMING

from ..conftest import Daemon, StartDaemon
from ..connections import on_each_connection
from ..long_history import write_run

RUN = "run-records0"
SIZES = {1: 10, 2: 600_000, 3: 600_000, 4: 2_600_000, 5: 10, 6: PAGE_BYTES, 7: 5 * 1024 * 1024}


def record(number: int) -> str:
    """Made so that a piece that is lost, repeated or out of place is seen."""
    return "".join(f"{number}:{i};" for i in range(SIZES[number] // 4 + 1))[: SIZES[number]]


RECORDS = {number: record(number) for number in SIZES}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("records")
    write_run(folder, RUN, len(SIZES), 3, state=RunState.COMPLETED)
    database = Database.open(f"sqlite:///{folder / 'fedpeft.db'}", TIMING)
    with database.transactions.begin() as connection:
        for number, text in RECORDS.items():
            facts = {"record": text, "record_sha256": hashlib.sha256(text.encode()).hexdigest()}
            t = tables.rounds
            connection.execute(update(t).where(t.c.run == RUN, t.c.number == number).values(**facts))
    database.close()
    return folder


@pytest.fixture
async def daemon(data: Path, start: StartDaemon) -> Daemon:
    return await start(data)


class ReadsOfRecords:
    """Counts the statements of the server that read a round's record."""

    def __init__(self, daemon: Daemon) -> None:
        self.count = 0
        on_each_connection(daemon, lambda connection: connection.set_authorizer(self._asked))

    def _asked(self, action: int, table: str | None, column: str | None, *_: object) -> int:
        self.count += action == sqlite3.SQLITE_READ and (table, column) == ("rounds", "record")
        return sqlite3.SQLITE_OK


async def test_records_of_any_size_are_listed_whole_in_pages_that_fit(daemon: Daemon) -> None:
    request, parts = op.ListRoundsRequest(run=RUN), list[run_pb2.Round]()
    pages = 0
    while True:
        page = await daemon.operator.ListRounds(request)
        assert page.ByteSize() < PAGE_BYTES + 64 * 1024 < MESSAGE_LIMIT_BYTES
        parts += page.rounds
        pages += 1
        if not page.next_page_token:
            break
        request.page_token = page.next_page_token
    whole = folded({}, parts)
    assert {number: round_.record for number, round_ in whole.items()} == RECORDS
    assert all(len(round_.tickets) == 3 and not round_.record_offset for round_ in whole.values())
    assert pages < sum(SIZES.values()) / PAGE_BYTES + 5
    async with OperatorClient(daemon.server.settings.listen) as operator:
        assert {round_.number: round_.record for round_ in await operator.rounds(RUN)} == RECORDS
        assert [round_.number for round_ in await operator.rounds(RUN, after=6)] == [7]


async def test_who_wants_no_records_gets_none_and_the_server_reads_none(daemon: Daemon) -> None:
    reads = ReadsOfRecords(daemon)
    async with OperatorClient(daemon.server.settings.listen) as operator:
        rounds = await operator.rounds(RUN, records=False)
        assert [len(round_.tickets) for round_ in rounds] == [3] * len(SIZES)
        assert not any(round_.record for round_ in rounds) and all(round_.record_sha256 for round_ in rounds)
        async for change in operator.watch(RUN):
            assert not any(round_.record for round_ in change.rounds)
        await operator.run(RUN)
        await operator.runs()
        assert reads.count == 0
        await operator.rounds(RUN)
        assert reads.count > 0, "the counter counts"


async def test_a_token_is_for_the_list_that_it_came_from(daemon: Daemon) -> None:
    from ..conftest import refused

    token = (await daemon.operator.ListRounds(op.ListRoundsRequest(run=RUN))).next_page_token
    without = op.ListRoundsRequest(run=RUN, page_token=token, without_records=True)
    assert await refused(daemon.operator.ListRounds(without)) == "PAGE_INVALID"


def test_a_page_reads_no_more_than_it_sends(data: Path) -> None:
    """Of 7 rounds with 9 MB of records, the first page has those up to 1 MiB, whole, and no part of the next."""
    database = Database.open(f"sqlite:///{data / 'fedpeft.db'}", TIMING)
    rows, then = database.rounds_from(RUN, Place(), 1000, 2000, {})
    assert [(row.round.number, len(row.record)) for row in rows] == [(1, 10), (2, 600_000)] and then == Place(2)
    rows, then = database.rounds_from(RUN, Place(3), 1000, 2000, {})
    assert [(row.round.number, len(row.record), len(row.tickets)) for row in rows] == [(4, PAGE_BYTES, 0)]
    assert then == Place(3, "", PAGE_BYTES)
    rows, _ = database.rounds_from(RUN, Place(3, "", 2_500_000), 1, 2000, {})
    assert [(row.record_offset, len(row.record), len(row.tickets)) for row in rows] == [(2_500_000, 100_000, 3)]
    rows, _ = database.rounds_from(RUN, Place(3, "client-00000"), 1, 2000, {})
    assert [(row.record, len(row.tickets)) for row in rows] == [("", 2)], "its record was sent before its tickets"
    rows, _ = database.rounds_from(RUN, Place(3, "", 2**60), 1, 2000, {})
    assert rows[0].record == "", "a forged place gives nothing"
    database.close()


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 1, 1, 2)])
def test_pieces_of_a_record_are_put_together(order: tuple[int, ...]) -> None:
    pieces = [run_pb2.Round(number=1, record=text, record_offset=at) for text, at in (("ab", 0), ("cd", 2), ("e", 4))]
    known: dict[int, run_pb2.Round] = {}
    for which in order:
        known = folded(known, [pieces[which]])
    assert (known[1].record, known[1].record_offset) == ("abcde", 0)
