"""Traces: one for each round, over server and clients, by OpenTelemetry; nothing is recorded unless it is configured.

    round                         from the moment it opened until it was committed or given up (server)
    ├── open                      until it took no more updates (server)
    ├── pull, train, push         of each client (client)
    ├── receive                   of each update (server)
    ├── fold                      the aggregate, and its commit (server)
    └── evaluate                  of the version it made (client)

Notable: the trace's id, and that of its first span, are digests of run and round. So nothing need travel for the spans
of all processes to find each other, and a process that was killed goes on with the same trace.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import NonRecordingSpan, SpanContext, SpanKind, TraceFlags

from fedpeft import __version__
from fedpeft.errors import SettingsInvalid
from fedpeft.process.logs import Log, logger

EXPORT_S = 5.0
"""Time that a batch of spans may take to the collector; beyond it they are dropped, and the log says so."""

Value = str | int | float | bool | Sequence[str]

_FIRST: ContextVar[SpanContext | None] = ContextVar("first", default=None)
"""The ids that the next span takes instead of random ones."""


def of_round(run: str, number: int) -> SpanContext:
    """Returns the ids of a round's trace and of the first span in it."""
    digest = hashlib.sha256(f"fedpeft round {number} of {run}".encode()).digest()
    return SpanContext(
        trace_id=int.from_bytes(digest[:16]),
        span_id=int.from_bytes(digest[16:24]),
        is_remote=True,
        trace_flags=TraceFlags(TraceFlags.SAMPLED),
    )


@contextmanager
def span(name: str, run: str, number: int, **attributes: Value) -> Iterator[None]:
    """Records what the block does as a span of a round's trace; an error that leaves it is recorded too."""
    with _tracer().start_as_current_span(
        name, _below(run, number), attributes={"fedpeft.run": run, "fedpeft.round": number, **_named(attributes)}
    ):
        yield


def past(name: str, run: str, number: int, began: float, ended: float, **attributes: Value) -> None:
    """Records a span that is over; times are seconds since the epoch."""
    _record(name, _below(run, number), run, number, (began, ended), attributes)


def round_over(run: str, number: int, began: float, ended: float, **attributes: Value) -> None:
    """Records the first span of a round's trace, once the round is over."""
    chosen = _FIRST.set(of_round(run, number))
    try:
        _record("round", Context(), run, number, (began, ended), attributes)
    finally:
        _FIRST.reset(chosen)


@contextmanager
def traced(endpoint: str, service: str, instance: str) -> Iterator[None]:
    """Records the spans of this process while the block lasts, and sends them to a collector; once a process.

    Args:
        endpoint: `http://HOST:PORT` or `https://HOST:PORT` of an OTLP receiver that speaks gRPC; empty: none.
        service: Name of the program.
        instance: Name that tells this process from others of the program.

    Raises:
        SettingsInvalid: If the packages for it are not installed.
    """
    if not endpoint:
        yield
        return
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
    except ModuleNotFoundError as error:
        raise SettingsInvalid(f"--traces needs {error.name}: pip install 'fedpeft[tracing]'") from None

    class Ids(RandomIdGenerator):
        """Random ids, but those of a round's first span."""

        def generate_trace_id(self) -> int:
            first = _FIRST.get()
            return first.trace_id if first else super().generate_trace_id()

        def generate_span_id(self) -> int:
            first = _FIRST.get()
            return first.span_id if first else super().generate_span_id()

    _tell_in_our_log(logger(), "opentelemetry")
    resource = Resource({"service.name": service, "service.instance.id": instance, "service.version": __version__})
    provider = TracerProvider(resource=resource, id_generator=Ids())
    exporter = OTLPSpanExporter(endpoint, insecure=endpoint.startswith("http://"), timeout=EXPORT_S)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    try:
        yield
    finally:
        provider.shutdown()  # which sends what is left, or gives up after EXPORT_S


class _OurLog(logging.Handler):
    """Tells what a library logs in the form of our own lines."""

    def __init__(self, log: Log) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        self._log.warning("traces", message=record.getMessage())


def _tell_in_our_log(log: Log, library: str) -> None:
    known = logging.getLogger(library)
    known.propagate = False
    known.handlers = [_OurLog(log)]


def _tracer() -> trace.Tracer:
    return trace.get_tracer("fedpeft", __version__)


def _below(run: str, number: int) -> Context:
    return trace.set_span_in_context(NonRecordingSpan(of_round(run, number)), Context())


def _named(attributes: Mapping[str, Value]) -> dict[str, Value]:
    return {f"fedpeft.{name}": value for name, value in attributes.items()}


def _record(
    name: str, parent: Context, run: str, number: int, when: tuple[float, float], attributes: Mapping[str, Value]
) -> None:
    began, ended = (int(moment * 1e9) for moment in when)
    said = {"fedpeft.run": run, "fedpeft.round": number, **_named(attributes)}
    _tracer().start_span(name, parent, SpanKind.INTERNAL, said, start_time=began).end(ended)
