"""The bounds on callers, from the table that the server enforces."""

from collections.abc import Iterator

from fedpeft.rpc.wire import MESSAGE_LIMIT_BYTES
from fedpeft_server.access import bounds
from fedpeft_server.access.bounds import CALLERS, CALLS, PortBound, Rate
from fedpeft_server.timing import TIMING
from generators.tables import table

PAGE = "security.md"


def lines() -> Iterator[str]:
    """Yields the tables of callers, calls and ports."""
    yield from ("### Callers", "")
    yield from table(("caller", "calls", "at once"), _callers())
    yield from (
        "",
        f"A call that comes too fast waits, {TIMING.call_wait_s:.0f} s at most; if that would not be enough it is "
        f"refused, {TIMING.refusal_delay_s:.0f} s later. Log lines about one caller: {_rate(bounds.LOG_LINES)}; the "
        f"same refusal once in {TIMING.refusal_quiet_s:.0f} s, there and in the audit log.",
        "",
    )
    yield from ("### Calls", "")
    yield from table(("call", "largest message", "most fields", "besides, of one caller"), _calls())
    yield from (
        "",
        f"A stream may have {bounds.STREAM_MESSAGES:,} messages of any size; beyond, they have "
        f"{_size(bounds.CHUNK_BYTES)} on average. Fields are counted wherever there can be arbitrarily many.",
        "",
        f"gRPC takes a message of up to {_size(MESSAGE_LIMIT_BYTES)} whole before its size is known, so few are "
        f"received at once: {bounds.RECEIVING.of_one} of one caller and {bounds.RECEIVING.at_once} of all, each for "
        f"{bounds.RECEIVING.hold_s:g} s at most while others wait; beside them the chunks of the transfers that have "
        "their turn (`--max-transfers`). Of the others no more than a flow-control window of 64 KiB arrives.",
        "",
    )
    yield from ("### Ports", "")
    yield from table(("port", "bound", "value"), _ports())


def _callers() -> Iterator[tuple[str, ...]]:
    for right, bound in CALLERS.items():
        who = f"each {right}" if right else "each address without a certificate"
        yield who, _rate(bound.rate), f"{bound.under_way}"


def _calls() -> Iterator[tuple[str, ...]]:
    for method, bound in CALLS.items():
        name = method.rpartition("/")[2]
        yield f"`{name}`", _size(bound.message_bytes), f"{bound.elements:,}", _rate(bound.rate) if bound.rate else ""


def _ports() -> Iterator[tuple[str, str, str]]:
    for name, port in (("`--listen`", bounds.MAIN), ("`--enroll`", bounds.ENROLMENT)):
        yield name, "connections", f"{port.connections}" if port.connections else "half of the server's open files"
        yield from _of_port(name, port)
    yield "`--enroll`", "memory beyond that at its start", _size(bounds.ENROLMENT_MEMORY)
    metrics = bounds.METRICS
    yield "`--metrics`", "connections", f"{metrics.connections}; the oldest that asked for nothing gives way"
    yield "`--metrics`", "without a request", f"{metrics.silence_s:g} s"
    yield "`--metrics`", "life of a connection", f"{metrics.life_s:g} s"
    yield "`--metrics`", "request", _size(metrics.request_bytes)


def _of_port(name: str, port: PortBound) -> Iterator[tuple[str, str, str]]:
    if port.per_address:
        yield name, "of one address", f"{port.per_address}; its oldest gives way"
    if port.opened:
        yield name, "opened by one address", _rate(port.opened)
    if port.silence_s:
        yield name, "silence before the first message", f"{port.silence_s:g} s"
    if port.idle_s:
        yield name, "without a call", f"{port.idle_s:g} s"
    if port.life_s:
        yield name, "life of a connection", f"{port.life_s:g} s"
    if port.received_bytes:
        yield name, "bytes that one sends", _size(port.received_bytes)
    if port.streams:
        yield name, "calls at once on one", f"{port.streams}"


def _rate(rate: Rate) -> str:
    pace = f"{rate.per_s:g} a second" if rate.per_s >= 1 else f"one in {1 / rate.per_s:g} s"
    return f"{rate.burst:,} at once, then {pace}"


def _size(size: int) -> str:
    return f"{size // 2**20} MiB" if size % 2**20 == 0 else f"{size // 1024} KiB"
