"""Folders of clients: which members are clients, that none is a split of one data set, and the classes of all."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from fedpeft import text_files
from fedpeft.config.model import LEAST_CLASSES, MOST_CLASSES
from fedpeft.config.section import class_fault
from fedpeft.config_errors import LONGEST_VALUE
from fedpeft.data.examples import Examples
from fedpeft.data.labels import nfc
from fedpeft.data.partition_writer import RECORD, file_name
from fedpeft.data.sources.file_names import is_system, shown
from fedpeft.data.sources.interface import Source
from fedpeft.data.sources.opening import INDEX_SUFFIX, is_index, open_source, parquet_files
from fedpeft.data.sources.parquet_labels import NO_LABEL
from fedpeft.data.sources.splits import one_to_train_on, splits_among
from fedpeft.errors import DataInvalid
from fedpeft.formatting import counted

_NAMED = 5


def clients_in(path: Path) -> dict[str, Path]:
    """Returns the clients of a folder of clients, as `fedpeft partition` writes it, by name; none if it is none.

    A client is a subfolder with parquet files, or an index file.

    Raises:
        DataInvalid: If a client of `partition.json` is missing; without one, if a member is named like a split; or if
            what is meant cannot be told: parquet files beside the clients, a folder and an index file of one name.
        OSError: If the folder cannot be read.
    """
    folders = {sub.name: sub for sub in subfolders(path) if parquet_files(sub)}
    indexed = {file.name[: -len(INDEX_SUFFIX)]: file for file in _files(path) if is_index(file)}
    if twice := folders.keys() & indexed.keys():
        name = min(twice)
        raise DataInvalid(f"{path}: client {name} has a folder and {name}{INDEX_SUFFIX}; remove one of them")
    found = dict(sorted((folders | indexed).items()))
    if os.path.lexists(path / RECORD):
        _check_record(path, found)
    elif found:
        refuse_splits(path, found)
        _refuse_beside(path, found)
    return found


def classes_there(
    path: Path,
    image_column: str | None = None,
    label_column: str | None = None,
    label_map: Mapping[str, str | None] | None = None,
) -> list[str]:
    """Returns the classes of a run on images that names none: of all clients where there are several.

    Args:
        path: A folder of clients, or one data set as `open_source` takes it.
        image_column: Column of parquet that holds the images.
        label_column: Column of parquet that holds the labels.
        label_map: Own class name to the run's, None to drop the class.

    Raises:
        DataInvalid: If the data cannot be read, or no run can have their classes.
    """
    try:
        places = list(clients_in(path).values()) if path.is_dir() else []
    except OSError as error:
        raise DataInvalid(f"cannot read {error.filename or path}: {error.strerror}") from None
    sources = (open_source(place, image_column, label_column) for place in places or [path])
    return classes_of(sources, str(path), label_map)


def classes_of(
    sources: Iterable[Source | Examples], where: str, label_map: Mapping[str, str | None] | None = None
) -> list[str]:
    """Returns the classes of a run on sources that names none, in the order in which they are found.

    Rows without a label, and numbers without a name where others have one (-1, 255), are of no class unless the label
    map gives them one, so that the run refuses them.

    Args:
        sources: The data of all clients.
        where: Name of the data in messages.
        label_map: Own class name to the run's, None to drop the class.

    Raises:
        DataInvalid: If a class, or the number of them, is none that a run can have.
    """
    found: dict[str, None] = {}
    without_class = {NO_LABEL}
    for source in sources:
        found |= dict.fromkeys(map(nfc, source.class_names))
        without_class |= source.unnamed
    renamed = {nfc(own): name for own, name in (label_map or {}).items()}
    mapped = (renamed.get(own, None if own in without_class else own) for own in found)
    classes = list(dict.fromkeys(nfc(name) for name in mapped if name is not None))
    for name in classes:
        if fault := class_fault(name):
            short = repr(name) if len(name) <= LONGEST_VALUE else f"{name[:LONGEST_VALUE]!r}..."
            raise DataInvalid(
                f"{where}: class {short} is none that a run can have: {fault}; a label map can rename it or leave its "
                "rows out"
            )
    if not LEAST_CLASSES <= len(classes) <= MOST_CLASSES:
        only = f", {classes[0]!r}" if len(classes) == 1 else ""
        needed = f"at least {LEAST_CLASSES}" if len(classes) < LEAST_CLASSES else f"at most {MOST_CLASSES:,}"
        raise DataInvalid(
            f"{where} has {counted(len(classes), 'class', 'classes')}{only}; a run needs {needed}: give other data, or "
            "name all classes of the run in its file's model.classes"
        )
    return classes


def subfolders(path: Path) -> list[Path]:
    """Returns the subfolders that are no system's own, by name; links to folders are some."""
    with os.scandir(path) as entries:
        return sorted(
            Path(e.path)
            for e in entries
            if e.is_dir() and not e.name.startswith(".") and not is_system(e.name, folder=True)
        )


def refuse_splits(path: Path, names: Iterable[str]) -> None:
    """Refuses clients that are named like splits: what is held out would be trained on.

    Raises:
        DataInvalid: If one is.
    """
    found = splits_among(names)
    if splits := list(found):
        more = f" and {len(splits) - _NAMED:,} more" if len(splits) > _NAMED else ""
        train = path / one_to_train_on(found)
        raise DataInvalid(
            f"{path}: {', '.join(map(shown, splits[:_NAMED]))}{more} {'is' if len(splits) == 1 else 'are'} named like "
            f"the splits of one data set, not like clients; name the one to train on ({train}), or rename "
            f"the folders if they are clients; a folder that fedpeft partition wrote, with {RECORD}, is taken as it is"
        )


def _refuse_beside(path: Path, found: Iterable[str]) -> None:
    if files := parquet_files(path):
        raise DataInvalid(
            f"{path} holds parquet files ({files[0].name}) and folders of them ({', '.join(list(found)[:_NAMED])}); "
            "give the files a folder of their own, so that it is clear which data are meant"
        )


def _check_record(path: Path, found: Iterable[str]) -> None:
    """Refuses a partition of which a client is missing: the others would be trained on as if they were all."""
    try:
        record = text_files.json_of(text_files.read(path / RECORD, text_files.MOST_LISTED_BYTES))
        names = [file_name(client["name"]) for client in record["clients"]]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataInvalid(f"{path / RECORD} cannot be read: {error}; partition the data again") from None
    if not found:
        raise DataInvalid(f"{path} has a {RECORD} and no client: neither NAME/*.parquet nor NAME{INDEX_SUFFIX}")
    if missing := sorted(set(names) - set(found)):
        more = f" and {len(missing) - _NAMED:,} more" if len(missing) > _NAMED else ""
        raise DataInvalid(
            f"{path} lacks clients that its {RECORD} names: {', '.join(missing[:_NAMED])}{more}; partition the data "
            f"again, or remove {RECORD} to take the folders that are there"
        )


def _files(path: Path) -> list[Path]:
    with os.scandir(path) as entries:
        return sorted(Path(e.path) for e in entries if e.is_file() and not e.name.startswith("."))
