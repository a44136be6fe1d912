"""Data by name from the Hugging Face hub: `hub:NAME[@REVISION]/[CONFIG/]SPLIT`, as parquet files in its cache.

Notable: what was fetched is read like any other parquet. The cache is that of `huggingface_hub`: its `HF_HOME`
says where it is, and with `HF_HUB_OFFLINE=1` nothing is asked of the network.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from fedpeft.errors import DataInvalid

PREFIX = "hub:"
KNOWN = {
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
    "patchcamelyon": "1aurent/PatchCamelyon",
    "resisc45": "timm/resisc45",
}
"""Short names of data sets, and their repositories."""
FORM = "hub:OWNER/NAME[@REVISION]/[CONFIG/]SPLIT, such as hub:uoft-cs/cifar10/train"


@dataclass(frozen=True)
class HubPlace:
    """A split of a data set on the hub.

    Attributes:
        repository: OWNER/NAME.
        revision: Branch, tag or commit; None for the newest.
        config: Folder of its configuration; empty if it is not said.
        split: The beginning of the files' names.
    """

    repository: str
    revision: str | None
    config: str
    split: str


def is_hub(place: str) -> bool:
    """Returns whether data are named by the hub."""
    return place.startswith(PREFIX)


def parsed(place: str) -> HubPlace:
    """Returns the split that a text names.

    Raises:
        DataInvalid: If it is not of the form.
    """
    repository, revision, rest = _parts(place)
    if len(rest) not in (1, 2) or not all(rest):
        raise DataInvalid(f"{place} is not {FORM}; short names are {', '.join(KNOWN)}: hub:cifar10/train")
    return HubPlace(repository, revision or None, "".join(rest[:-1]), rest[-1])


def has_split(place: str) -> bool:
    """Returns False if a text names a data set and no split of it: `hub:cifar10`."""
    return bool(_parts(place)[2])


def _parts(place: str) -> tuple[str, str, list[str]]:
    """Returns repository, revision, and what follows."""
    name, *rest = place.removeprefix(PREFIX).split("/")
    name, _, revision = name.partition("@")
    repository = KNOWN.get(name, "")
    if not repository and rest:
        second, *rest = rest
        second, _, revision = second.partition("@")
        repository = f"{name}/{second}"
    return repository, revision, rest


def local_path(path: Path | str) -> Path:
    """Returns the place of data on this machine: what `hub:` names is fetched, and anything else is a path already.

    Raises:
        DataInvalid: As `fetched`.
    """
    return fetched(str(path)) if is_hub(str(path)) else Path(path)


def fetched(place: str) -> Path:
    """Returns the file, or the pattern of the files, of a split in the cache; fetches what is not there.

    Raises:
        DataInvalid: If it can neither be fetched nor is in the cache, or the data set has no such split in parquet.
    """
    wanted = parsed(place)
    folder = _snapshot(wanted)
    there = sorted(file for file in folder.rglob("*.parquet") if not file.name.startswith("."))
    files = [file for file in there if _is_of(file, wanted)]
    places = sorted({file.parent for file in files})
    if not files:
        splits = sorted({re.split(r"-\d", file.stem)[0] for file in there})
        known = f"in the cache of it are: {', '.join(splits)}" if splits else "it has no parquet files"
        raise DataInvalid(f"{wanted.repository} on the Hugging Face hub has no {_said(wanted)} in parquet; {known}")
    if len(places) > 1:
        configs = ", ".join(str(each.relative_to(folder)) for each in places)
        raise DataInvalid(
            f"{wanted.repository} has split {wanted.split!r} in several configurations: {configs}; name one: "
            f"{PREFIX}{wanted.repository}/{places[0].name}/{wanted.split}"
        )
    return files[0] if files[0].stem == wanted.split else places[0] / f"{wanted.split}-*.parquet"


def _snapshot(wanted: HubPlace) -> Path:
    """Returns the folder of a data set's revision in the cache, with the files of the split if they can be had."""
    from huggingface_hub import snapshot_download

    name = f"{wanted.split}*.parquet"
    patterns = [f"{wanted.config}/{name}", f"*/{wanted.config}/{name}"] if wanted.config else [name, f"*/{name}"]
    try:
        folder = snapshot_download(
            wanted.repository, repo_type="dataset", revision=wanted.revision, allow_patterns=patterns
        )
    except (OSError, ValueError) as error:  # the library's own are of these: no network, no such data set, gated
        raise DataInvalid(
            f"cannot fetch {wanted.repository} from the Hugging Face hub: {str(error).strip().splitlines()[0]}"
        ) from error
    return Path(folder)


def _is_of(file: Path, wanted: HubPlace) -> bool:
    in_config = not wanted.config or file.parent.name == wanted.config
    return in_config and (file.stem == wanted.split or file.stem.startswith(f"{wanted.split}-"))


def _said(wanted: HubPlace) -> str:
    return f"split {wanted.split!r}" + (f" of configuration {wanted.config!r}" if wanted.config else "")
