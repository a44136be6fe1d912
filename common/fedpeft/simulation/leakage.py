"""The check before a simulation that what it is scored on is not what it is trained on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import structlog

from fedpeft.config import RunConfig
from fedpeft.data.interface import Source
from fedpeft.data.overlap import Overlap, overlap
from fedpeft.data.reading import Reading
from fedpeft.data.sources import open_source
from fedpeft.errors import DataInvalid
from fedpeft.kind import Examples
from fedpeft.learning import where
from fedpeft.simulation.clients import Clients, Data

_log = structlog.get_logger(__name__)


def leakage(clients: Clients, evaluate: Path | None, config: RunConfig, reading: Reading) -> Overlap | None:
    """Compares the clients' images with the held-out ones, and says in the log if some are the same.

    Args:
        clients: Data by client.
        evaluate: The held-out data.
        config: The run file.
        reading: How images are read.

    Returns:
        What was found; None where there are no held-out data, or none of images.
    """
    if evaluate is None or config.model.kind:
        return None

    def opened(data: Path | Data) -> Source | None:
        if isinstance(data, Examples):
            return None
        if not isinstance(data, Path):
            return data
        try:
            return open_source(where(str(data))[1], reading.image_column, reading.label_column)
        except DataInvalid:
            return None  # said when it is this client's turn

    def training() -> Iterator[tuple[str, Source]]:
        for name, data in sorted(clients.items()):
            if (source := opened(data)) is not None:
                yield f"{name}: ", source

    held_out = opened(evaluate)
    if held_out is None:
        return None
    found = overlap(training(), len(clients), held_out)
    if found.images:
        _log.warning(str(found))
    return found
