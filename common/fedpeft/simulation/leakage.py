"""The check before a simulation that what it is scored on is not what it is trained on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import structlog

from fedpeft.config import RunConfig
from fedpeft.data.examples import Examples
from fedpeft.data.overlap import Overlap, overlap
from fedpeft.data.reading import Reading
from fedpeft.data.sources.interface import Source
from fedpeft.data.sources.opening import open_source
from fedpeft.errors import DataInvalid
from fedpeft.models.tasks import split_data
from fedpeft.simulation.clients import Clients, Data

NAMED = 5
"""Clients whose data cannot be opened that are named; all are counted."""

_log = structlog.get_logger(__name__)


def leakage(clients: Clients, evaluate: Path | Data | None, config: RunConfig, reading: Reading) -> Overlap | None:
    """Compares the clients' images with the held-out ones; the log says if some are the same or were not compared.

    Args:
        clients: Data by client.
        evaluate: The held-out data.
        config: The run file.
        reading: Settings of reading images.

    Returns:
        The overlap; None where there are no held-out data, or none of images.

    Raises:
        DataInvalid: If the held-out data cannot be opened.
    """
    if evaluate is None or config.model.task:
        return None

    unopened = 0

    def training() -> Iterator[tuple[str, Source]]:
        nonlocal unopened
        for name, data in sorted(clients.items()):
            try:
                source = _opened(data, reading)
            except DataInvalid as error:
                unopened += 1
                if unopened <= NAMED:  # the run ends with it if the client's turn comes, and else goes on
                    _log.warning("a client's data cannot be opened", client=name, why=error.message)
                continue
            if source is not None:
                yield f"{name}: ", source

    held_out = _opened(evaluate, reading)
    if held_out is None:
        return None
    found = overlap(training(), len(clients), held_out)
    found = replace(found, unopened=unopened)
    if found.images or found.not_compared:
        _log.warning(str(found))
    return found


def _opened(data: Path | Data, reading: Reading) -> Source | None:
    """Opens data of images; returns None for those of another task."""
    if isinstance(data, Examples):
        return None
    if not isinstance(data, Path):
        return data
    return open_source(split_data(str(data))[1], reading.image_column, reading.label_column)
