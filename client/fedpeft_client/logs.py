"""Log lines: on stderr, for people or as JSON, with client, run and round where they are known."""

from __future__ import annotations

import logging
import sys
from typing import Literal

import structlog

Log = structlog.typing.FilteringBoundLogger
LogFormat = Literal["auto", "console", "json"]


def configure(form: LogFormat, verbose: bool) -> None:
    """Sets up this process's log lines; called once, at its start."""
    last: structlog.typing.Processor
    if form == "json":
        last = structlog.processors.JSONRenderer()
    else:
        last = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            last,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG if verbose else logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


def logger(**context: object) -> Log:
    """Returns a logger whose every line carries `context`."""
    log: Log = structlog.get_logger(**context)
    return log
