"""The clients of a simulation: where each one's data comes from, and what is kept open of it.

Notable: a client of `[simulation]` has the rows that `fedpeft partition` would write for it, in the same order, so it
trains to the same bits as an agent on the written folder.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpeft.config import RunConfig, SimulationConfig
from fedpeft.data import partitions, pixel_cache
from fedpeft.data.client_folders import clients_in, refuse_splits, subfolders
from fedpeft.data.division import Division
from fedpeft.data.examples import Examples
from fedpeft.data.partition_writer import RECORD, file_names
from fedpeft.data.partitions import Partition
from fedpeft.data.reading import MAX_PIXELS, Reading
from fedpeft.data.sources.interface import Source
from fedpeft.errors import ConfigInvalid, DataInvalid
from fedpeft.models.tasks import split_data, task_of
from fedpeft.training.local_round import LoadedRun

CACHE_BYTES = 1024 * 1024 * 1024
"""Decoded and encoded images kept of all clients together; whose turn was longest ago goes first."""

HISTOGRAM_CLIENTS = 256
"""Clients whose examples are counted by class in the report."""

OPEN_CLIENTS = 256
"""Clients whose data is open at once: each may hold a mapped file."""

Data = Source | Examples
Clients = Mapping[str, Path | Data]


def reading_of(
    config: RunConfig,
    image_column: str | None = None,
    label_column: str | None = None,
    max_image_pixels: int | None = None,
) -> Reading:
    """Returns how the images of a simulation are read: as given, else as `[simulation]` says."""
    said = config.simulation or SimulationConfig()
    return Reading(
        image_column or said.image_column,
        label_column or said.label_column,
        max_image_pixels or said.max_image_pixels or MAX_PIXELS,
        pixel_cache.folder_here(),
    )


def clients_of(
    data: Path | Data, config: RunConfig, reading: Reading | None = None
) -> tuple[dict[str, Path | Data], dict[str, Any] | None]:
    """Finds the clients in the data of a simulation.

    Args:
        data: A folder of clients as `fedpeft partition` writes it: each is a client by its name. Anything else that
            `open_source` takes is one data set, which `[simulation]` divides. For another task (`TASK:PATH`,
            or just the path) each folder in it is a client, or all of it is one data set where `[simulation]` says how
            one is divided. What is open already is one data set too.
        config: The run file.
        reading: Settings of reading images; as in `[simulation]` if absent.

    Returns:
        Data by client, and how it was divided (variant, alpha, seed, draws, digest, skew), None where it was before.

    Raises:
        DataInvalid: If the data cannot be read, or not be divided so, or its members are splits and no clients.
        ConfigInvalid: If there is one data set and no `[simulation]`.
    """
    where = str(data) if isinstance(data, Path) else "what is given"
    if isinstance(data, Path):
        data = place_of(data, config)
        if folders := clients_there(data, config):
            return dict(folders), None
    task = task_of(config.model.task).reading(reading or reading_of(config))
    source = task.read(data) if isinstance(data, Path) else data
    if config.simulation is None:
        raise ConfigInvalid(
            f"{where} is one data set and the run file has no [simulation] section that divides it; add one, or give "
            "a folder that fedpeft partition wrote"
        )
    split = division_of(config.simulation).of(source, config.rounds.seed)
    clients = {name: task.select(source, rows) for name, rows in zip(file_names(split.names), split.parts, strict=True)}
    return clients, division_record(source, split)


def division_record(source: Data, split: Partition) -> dict[str, Any]:
    """Returns what a report says of a division: variant, alpha, seed, draws, digest, rows, skew, classes, histogram."""
    return {
        "variant": split.variant,
        "alpha": split.alpha,
        "seed": split.seed,
        "draws": split.draws,
        "digest": split.digest,
        "rows": sum(map(len, split.parts)),
        "skew": partitions.skew(source.labels, split.parts, len(source.class_names)).as_dict(),
        "classes": list(source.class_names),
        "histogram": _histogram(source, file_names(split.names), split.parts),
    }


def _histogram(source: Data, names: Sequence[str], parts: Sequence[NDArray[np.int64]]) -> dict[str, list[int]]:
    """Returns the examples of each class by client, of at most `HISTOGRAM_CLIENTS`."""
    some = list(zip(names, parts, strict=True))[:HISTOGRAM_CLIENTS]
    return {name: np.bincount(source.labels[rows], minlength=len(source.class_names)).tolist() for name, rows in some}


def place_of(path: Path, config: RunConfig) -> Path:
    """Returns data without the task before it; raises `DataInvalid` if that is not the run's."""
    task, place = split_data(str(path))
    if task not in ("", config.model.task):
        raise DataInvalid(f"{path} is data for task {task}; the run's model is {config.model.name}")
    return Path(place)


def clients_there(path: Path, config: RunConfig) -> dict[str, Path]:
    """Returns the clients of a folder of clients; none if it is one data set."""
    try:
        return _folders(path, config) if config.model.task else _written(path)
    except OSError as error:
        raise DataInvalid(f"cannot read {error.filename or path}: {error.strerror}") from None


def _folders(path: Path, config: RunConfig) -> dict[str, Path]:
    """Returns the clients of another task than images: the folders in `path`, unless `[simulation]` divides it."""
    if (config.simulation is not None and config.simulation.divides) or not path.is_dir():
        return {}
    found = {sub.name: sub for sub in subfolders(path)}
    if not (path / RECORD).exists():
        refuse_splits(path, found)
    return found


def _written(path: Path) -> dict[str, Path]:
    """Returns the clients of a folder of clients; none if it is none."""
    return clients_in(path) if path.is_dir() else {}


def division_of(simulation: SimulationConfig) -> Division:
    """Returns the rule of `[simulation]`, which is that of `fedpeft partition` with the same flags."""
    return Division(
        simulation.scheme,
        simulation.clients,
        simulation.alpha,
        simulation.variant,
        simulation.shards,
        simulation.column,
        simulation.examples,
    )


class ClientData:
    """The data sets of all clients, opened when asked for and kept while they fit.

    Args:
        clients: Data by client.
        run: The run that the data are for.
        label_map: Own class names to the run's, for all clients.
        cache_bytes: Images kept, decoded and encoded; examples of another task.
    """

    def __init__(
        self,
        clients: Clients,
        run: LoadedRun,
        label_map: Mapping[str, str | None] | None,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self._clients = clients
        self._run = run
        self._label_map = label_map or {}
        self._cache_bytes = cache_bytes
        self._open: OrderedDict[str, tuple[Any, int]] = OrderedDict()
        self._held_bytes = 0

    def of(self, client: str) -> Any:
        """Returns a client's data set.

        Raises:
            DataInvalid: If it cannot be read or does not fit the run's classes; the client is named.
        """
        if client not in self._open:
            dataset, cost = self.open(self._clients[client], f"client {client}")
            while self._open and (self._held_bytes + cost > self._cache_bytes or len(self._open) >= OPEN_CLIENTS):
                self._held_bytes -= self._open.popitem(last=False)[1][1]
            self._open[client] = dataset, cost
            self._held_bytes += cost
        self._open.move_to_end(client)
        return self._open[client][0]

    def open(self, data: Path | Data, who: str) -> tuple[Any, int]:
        """Opens a data set of this run as its task wants it, and says how many bytes it may come to hold.

        Raises:
            DataInvalid: If it cannot be used; `who` begins the sentence.
        """
        try:
            source = self._run.task.read(place_of(data, self._run.config)) if isinstance(data, Path) else data
            dataset = self._run.dataset(source, self._label_map, self._cache_bytes)
        except DataInvalid as error:
            raise DataInvalid(f"{who}: {error.message}") from None
        if isinstance(source, Examples):
            return dataset, 2 * source.values.nbytes
        images = self._run.model.backbone.images
        assert images is not None  # or the task had raised
        pixels = 3 * images.image_size**2 * len(source)
        kept = pixels if pixels <= self._cache_bytes else 0
        # The parts of one data set share its encoded images, which are there anyway.
        return dataset, kept + (source.image_bytes_total if isinstance(data, Path) else 0)
