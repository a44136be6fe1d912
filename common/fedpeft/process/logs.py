"""Log lines on standard error: for people or as JSON, with client, run and round where they are known."""

from __future__ import annotations

import logging
import os
import re
import sys
from typing import Literal

import structlog

_WARNING = re.compile(r"^.*?:\d+: (?=\w*: )")
"""File and line before a warning's class and text."""

_OF_A_CLOSED_LOOP = "PollerCompletionQueue._handle_events"
"""gRPC's callback in an event loop that is closed, or that another loop's events woke: nothing is left to do there."""

Log = structlog.typing.FilteringBoundLogger
LogFormat = Literal["auto", "console", "json"]
Level = Literal["debug", "info", "warning", "error"]


def configure(form: LogFormat, level: Level) -> None:
    """Sets up this process's log lines; called once, at its start.

    Args:
        form: console for people, coloured where a terminal takes colours; json for machines; auto is console on a
            terminal and json elsewhere.
        level: Least severity logged.
    """
    terminal = sys.stderr.isatty()
    last: structlog.typing.Processor
    if form == "json" or (form == "auto" and not terminal):
        last = structlog.processors.JSONRenderer()
    else:
        plain = "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb"
        last = structlog.dev.ConsoleRenderer(colors=terminal and not plain)
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            last,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    logging.captureWarnings(True)
    logging.basicConfig(handlers=[_Forward()], level=logging.WARNING, force=True)


def to_standard_error() -> None:
    """Sends the log lines of a command, or of its worker, to standard error: standard output carries results."""
    # Looked up anew for each line, because who captures standard error replaces it.
    structlog.configure(logger_factory=lambda *_: structlog.PrintLogger(sys.stderr))


class _Forward(logging.Handler):
    """Makes lines of this process's log of what libraries say by `logging` and `warnings`."""

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler.emit`."""
        text = record.getMessage()
        if record.name == "asyncio" and _OF_A_CLOSED_LOOP in text:
            return
        if record.name == "py.warnings":
            text = _WARNING.sub("", text).split("\n", 1)[0]  # where in which library is of no use here
        structlog.get_logger().log(record.levelno, text, library=record.name, exc_info=record.exc_info)


def logger(**context: object) -> Log:
    """Returns a logger whose every line carries `context`."""
    log: Log = structlog.get_logger(**context)
    return log
