"""Content of a run on one machine: all that decides its result, and no place where anything lies.

A cell of a study is named by it, so its result is found again whatever study asks; a simulation that was killed goes on
only if it is the same still, wherever its data lie by now.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import numpy as np

from fedpeft import extensions
from fedpeft.config import RunConfig
from fedpeft.data.contents import digest_of, images_digest, rows_digest
from fedpeft.data.examples import Examples
from fedpeft.data.sources.folders import FolderSource
from fedpeft.data.sources.hub import local_path
from fedpeft.data.sources.interface import origin
from fedpeft.data.sources.opening import is_index, read_index
from fedpeft.data.sources.parquet import ParquetSource
from fedpeft.errors import DataInvalid
from fedpeft.rounds.commit import RunHeader
from fedpeft.simulation.clients import Clients, Data, place_of
from fedpeft.simulation.engines import Engine
from fedpeft.simulation.report import Json

FORMAT = 2
"""Raised when equal content would give another result; so also when a default of the run file changes."""
WHOLE_BYTES = 4 * 1024 * 1024 * 1024
"""Images of a data set that are read whole for its name, once for all clients; of a larger one those that they have."""
NAME_DIGITS = 16
"""Hexadecimal digits of a content's digest that name it."""


def content_of(
    config: RunConfig, *, train: str, test: str | None, weights: str | None, threads: int, device: str
) -> Json:
    """Returns the content of a run, as JSON has it.

    Of the run file, what differs from the defaults counts, so a field that is new to this version leaves the names of
    older results as they are.

    Args:
        config: The run file.
        train: Digest of the training data.
        test: Digest of the held-out data; None without.
        weights: Digest of the pre-trained weights; None if no file of them is there.
        threads: Of torch.
        device: cpu, cuda or cuda:N; never auto, which is another device on another machine.
    """
    # Folders of another task than images are clients unless a field says how one data set is divided, its default too.
    divides = bool(config.model.task) and config.simulation is not None and config.simulation.divides
    return {
        "format": FORMAT,
        "run": config.model_dump(mode="json", exclude={"name"}, exclude_defaults=True),
        **({"divides": True} if divides else {}),
        "train": train,
        "test": test,
        "weights": weights,
        "threads": threads,
        "device": device,
        **({"imports": extensions.digests()} if extensions.extensions() else {}),
    }


def name_of(content: Json) -> str:
    """Returns the name of a content: the beginning of its SHA-256."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:NAME_DIGITS]


def content_of_simulation(header: RunHeader, engine: Engine) -> Json:
    """Returns the content of a simulation that is about to begin: with what is known by then only.

    The run file has no `[simulation]` here, because an engine of the same arithmetic goes on with what another began.
    """
    import torch

    inputs, config = engine.trainer.inputs, header.config
    digest = cache(digest_of)  # index files of many clients name one data set
    content = content_of(
        config,
        train=_clients_digest(inputs.clients, config, digest),
        test=None if inputs.evaluation is None else _data_digest(inputs.evaluation, config, digest),
        weights=header.fingerprint,
        threads=torch.get_num_threads(),
        device=str(engine.trainer.run.device),
    )
    return {
        **content,
        "id": header.run,
        "held_out": inputs.held_out,
        "ranks": list(inputs.ranks),
        "reading": str(inputs.reading),
        "label_map": None if inputs.label_map is None else digest_of(inputs.label_map),
        "torch": torch.__version__,
        **({"arithmetic": engine.arithmetic} if engine.arithmetic else {}),
    }


def _clients_digest(clients: Clients, config: RunConfig, digest: Callable[[Path], str]) -> str:
    """Returns a digest of the clients' names and data; data that cannot be read are the end of their client's turn."""
    found: dict[str, str] = {}
    for name, data in clients.items():
        try:
            found[name] = _data_digest(data, config, digest)
        except DataInvalid:
            found[name] = "unreadable"
    return _digest_of_json(found)


def _data_digest(data: Path | Data, config: RunConfig, digest: Callable[[Path], str]) -> str:
    """Returns a digest of data.

    A data set of a program is known by its labels alone: to ask it for images may cost what decoding does, and draw at
    random.
    """
    if isinstance(data, Path):
        return path_digest(local_path(place_of(data, config)), digest)
    values = data.values.tobytes() if isinstance(data, Examples) else b""
    of_images = ""
    if not isinstance(data, Examples):
        whole, rows = origin(data, np.arange(len(data)))
        values = rows.astype("<i8").tobytes()
        if isinstance(whole, ParquetSource | FolderSource):
            is_small = whole.image_bytes_total <= WHOLE_BYTES
            of_images = images_digest(whole) if is_small else rows_digest(whole, rows.tolist())
    return _digest_of_json(
        {
            "images": of_images,
            "values": hashlib.sha256(values).hexdigest(),
            "labels": hashlib.sha256(data.labels.astype("<i8").tobytes()).hexdigest(),
            "classes": list(data.class_names),
        }
    )


def path_digest(path: Path, digest: Callable[[Path], str]) -> str:
    """Returns the digest of data by path: of index files, alone or in a folder, also of the data sets that they are of.

    Args:
        path: A file, a folder or a pattern.
        digest: `digest_of`, or one that keeps what it found.

    Raises:
        DataInvalid: If it cannot be read.
    """
    if is_index(path):
        rows, source = _index(path)
        return _digest_of_json({"rows": rows, "source": path_digest(source, digest)})
    try:
        indexes = [each for each in path.iterdir() if is_index(each)] if path.is_dir() else []
    except OSError as error:
        raise DataInvalid(f"cannot read {path}: {error.strerror}") from None
    sources = sorted({source for _, source in map(_index, indexes)})
    if not sources:
        return digest(path)
    return _digest_of_json({"folder": digest(path), "sources": [path_digest(each, digest) for each in sources]})


def _index(path: Path) -> tuple[list[int], Path]:
    """Returns the rows of an index file, and the place of the data set that they are of."""
    try:
        said = read_index(path)
    except OSError as error:
        raise DataInvalid(f"cannot read {path}: {error.strerror}") from None
    return said["rows"], (path.parent / said["source"]).resolve()


def _digest_of_json(value: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
