"""Log lines about calls: bounded for each caller, and what is left out is counted and said."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from structlog.testing import capture_logs
from structlog.typing import EventDict

from fedpeft.errors import RoleMayNot, TicketNotFound
from fedpeft.identity.subject import Role
from fedpeft_server.access import bounds
from fedpeft_server.access.call import CALL, Call, Party
from fedpeft_server.access.throttle import Throttle
from fedpeft_server.metrics import Metrics
from fedpeft_server.rpc.caller_log import CallerLog
from fedpeft_server.timing import TIMING

from ..conftest import Daemon, config
from ..secured import Federation, outcome


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Desk:
    """A log with a clock that stands still, and a caller."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.metrics = Metrics()
        self.log = CallerLog(self.metrics, TIMING, self.clock)

    def call(self, name: str = "a", method: str = "/x/y") -> None:
        CALL.set(Call(method, party=Party(Role.CLIENT, name)))


@pytest.fixture
def desk() -> Desk:
    desk = Desk()
    desk.call()
    return desk


@pytest.fixture
def lines() -> Iterator[list[EventDict]]:
    with capture_logs() as found:
        yield found


def test_the_same_refusal_is_said_once_and_then_with_its_number(desk: Desk, lines: list[EventDict]) -> None:
    for _ in range(100):
        desk.log.refused(RoleMayNot("no"))
    desk.log.refused(TicketNotFound("another"))
    assert [line["reason"] for line in lines] == ["ROLE_MAY_NOT", "TICKET_NOT_FOUND"]
    desk.clock.now += TIMING.refusal_quiet_s
    desk.log.refused(RoleMayNot("no"))
    assert lines[-1]["unsaid_before"] == 99
    assert desk.metrics.lines_left_out._value.get() == 99


def test_one_caller_has_so_many_lines_and_another_its_own(desk: Desk, lines: list[EventDict]) -> None:
    for number in range(3 * bounds.LOG_LINES.burst):
        desk.log.info("run accepted", number=number)
    assert len(lines) == bounds.LOG_LINES.burst
    desk.call("b")
    desk.log.info("run accepted")
    assert len(lines) == bounds.LOG_LINES.burst + 1
    desk.call("a")
    desk.clock.now += 1
    for _ in range(10):
        desk.log.info("run accepted")
    assert len(lines) == bounds.LOG_LINES.burst + 1 + bounds.LOG_LINES.per_s


def test_kinds_of_refusals_beyond_number_are_bounded_too(desk: Desk, lines: list[EventDict]) -> None:
    for number in range(1000):
        desk.call(method=f"/x/{number}")
        desk.log.refused(RoleMayNot("no"))
    assert len(lines) == bounds.LOG_LINES.burst


def test_a_servers_fault_is_said_once_with_its_place(desk: Desk, lines: list[EventDict]) -> None:
    for _ in range(10):
        desk.log.failed(ZeroDivisionError("x"))
    (line,) = lines
    assert line["log_level"] == "error" and isinstance(line["exc_info"], ZeroDivisionError)


def test_what_was_left_out_is_told(desk: Desk, lines: list[EventDict]) -> None:
    desk.log.log_suppressed()
    assert not lines, "nothing was"
    for name in ("a", "b", "b"):
        desk.call(name)
        for _ in range(3):
            desk.log.refused(RoleMayNot("no"))
    lines.clear()
    desk.log.log_suppressed()
    desk.log.log_suppressed()
    (line,) = lines
    assert (line["lines"], line["most"]) == (7, {"client b": 5, "client a": 2})


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "MOST_REMEMBERED", 10)
    throttle = Throttle[int](60.0, Clock())
    for key in range(100):
        assert throttle.suppressed(key) == 0
    assert len(throttle._said) == 10


async def test_refused_calls_write_one_line(secured: Federation, lines: list[EventDict]) -> None:
    client = secured.certificate(Role.CLIENT, "a")
    for _ in range(30):
        assert await outcome(client, "/fedpeft.v1.OperatorService/ListRuns") == "ROLE_MAY_NOT"
    assert len([line for line in lines if line["event"] == "refused"]) == 1


async def test_a_client_that_flips_its_answer_writes_a_bounded_log(
    daemon: Daemon, lines: list[EventDict], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounds, "LOG_LINES", bounds.Rate(0.001, 10))
    run = await daemon.create(config())
    (client,) = await daemon.clients("a")
    for number in range(30):
        await client.answer(run.id, *(["no"] if number % 2 else []))
    told = [line for line in lines if line["event"] in ("run accepted", "run declined", "client registered")]
    assert len(told) == 10


async def test_every_call_has_a_line_for_whoever_wants_details(daemon: Daemon) -> None:
    with capture_logs() as lines:
        run = await daemon.create(config(rounds={"count": 1, "clients": 1}))
        (client,) = await daemon.clients("site-a")
        await client.task()
    said = [(line["method"], line["code"], line["caller"]) for line in lines if line["event"] == "call"]
    assert ("/fedpeft.v1.OperatorService/CreateRun", "OK", "local") in said and run.id
    assert ("/fedpeft.v1.FederationService/AwaitRound", "OK", "site-a") in said
    assert all(line["log_level"] == "debug" for line in lines if line["event"] == "call")
