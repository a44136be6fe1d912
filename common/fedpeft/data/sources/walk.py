"""The walk of an image folder: every entry below it, in order, with its fate.

Notable: links are followed, to files and to folders. A folder is known by its device and inode, so a link that leads
back ends the walk there, and one that is reached twice is read once. A file is looked into only where its name does not
say what it is; nothing is opened that is not a regular file, and no file is asked for its size.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import suppress

from fedpeft.data.sources import disks
from fedpeft.data.sources.file_names import class_name, image_suffixes, is_image, is_system, shown, suffix_of
from fedpeft.data.sources.inventory import Entry, Fate
from fedpeft.errors import DataInvalid

HIDDEN = "hidden by a dot before the name"
SYSTEM = "kept by a storage or operating system"
OUTSIDE = "outside the class folders"
NOT_REGULAR = "neither a file nor a folder"
NO_IMAGE = "without a suffix and no image by content"
EMPTY = "empty folder"
LOOP = "link back to a folder around it"
AGAIN = "folder that is read already by another way"
OTHER_CLASS = "link to the folder of another class"
DANGLING = "link to nothing"
UNLISTABLE = "folder that cannot be listed"

UNTOLD = frozenset({HIDDEN, SYSTEM, EMPTY})
"""Reasons to skip that say nothing about a class: its folder is as good as empty."""

_HEAD_BYTES = 16

_Identity = tuple[int, int]


def walk(root: str | os.PathLike[str]) -> Iterator[Entry]:
    """Yields every entry below a folder of class folders, ordered by class and then by path.

    A folder that is skipped, or cannot be listed, is one entry; one that is walked is none. A file in the folder itself
    is in no class.

    Raises:
        OSError: If the folder itself cannot be listed.
        DataInvalid: If a class folder leads nowhere, one folder is reached as two classes, or the disk fails.
    """
    return _Walk(os.fspath(root)).entries()


class _Walk:
    def __init__(self, root: str) -> None:
        self._root = root
        self._cut = len(os.path.join(root, ""))
        self._class_of: dict[_Identity, str] = {}
        self._own: set[_Identity] = set()
        self._read: set[_Identity] = set()

    def entries(self) -> Iterator[Entry]:
        top = _listing(self._root)
        around = _around(self._root)
        folders: list[tuple[str, os.DirEntry[str]]] = []
        for entry in top:
            if (found := self._beside(entry)) is not None:
                yield found
            else:
                folders.append((class_name(entry.name), entry))
        folders.sort(key=lambda each: (each[0], each[1].name))
        for group, entry in folders:
            self._claim(entry, group)
        for group, entry in folders:
            yield from self._class(entry.path, group, around)

    def _beside(self, entry: os.DirEntry[str]) -> Entry | None:
        """Returns what becomes of an entry of the root, None if it is a class folder."""
        kind = _kind(entry)
        if (reason := _by_name(entry.name, folder=kind == "folder")) is not None:
            return Entry(entry.name, "", Fate.SKIPPED, reason)
        if kind == "folder":
            return None
        if kind == DANGLING and not suffix_of(entry.name):
            raise DataInvalid(
                f"{shown(entry.path)} is a link to nothing, so its class would be lost; fix the link, or remove it"
            )
        return Entry(entry.name, "", Fate.SKIPPED, NOT_REGULAR if kind == "other" else OUTSIDE)

    def _claim(self, entry: os.DirEntry[str], group: str) -> None:
        """Notes that a folder is a class's own, whatever links lead to it."""
        try:
            own = _identity(entry.path)
        except OSError:
            return  # it cannot be listed either
        if self._class_of.setdefault(own, group) != group:
            raise DataInvalid(_contradiction(entry.path, self._class_of[own], group))
        self._own.add(own)

    def _class(self, folder: str, group: str, around: set[_Identity]) -> Iterator[Entry]:
        """Walks a class folder, depth first, with an explicit stack: trees may be deeper than Python's own."""
        stack: list[tuple[Iterator[os.DirEntry[str]], _Identity]] = []
        inside = set(around)
        found, opened = self._enter(folder, group, inside, linked=False)
        while True:
            if found is not None:
                yield found
            if opened is not None:
                stack.append(opened)
                inside.add(opened[1])
            found = opened = None
            if not stack:
                return
            if (entry := next(stack[-1][0], None)) is None:
                inside.discard(stack.pop()[1])
            elif (kind := _kind(entry)) == "folder" and _by_name(entry.name, folder=True) is None:
                found, opened = self._enter(entry.path, group, inside, linked=True)
            else:
                found = Entry(entry.path[self._cut :], group, *_fate(entry, kind))

    def _enter(
        self, folder: str, group: str, inside: set[_Identity], *, linked: bool
    ) -> tuple[Entry | None, tuple[Iterator[os.DirEntry[str]], _Identity] | None]:
        """Opens a folder; returns what becomes of it if it is not walked, or its entries and identity."""
        path = folder[self._cut :]
        try:
            own = _identity(folder)
            if own in inside:
                return Entry(path, group, Fate.SKIPPED, LOOP), None
            if linked and own in self._own:
                reason = AGAIN if self._class_of[own] == group else OTHER_CLASS
                return Entry(path, group, Fate.SKIPPED, reason), None
            if own in self._read:
                if self._class_of[own] != group:
                    raise DataInvalid(_contradiction(folder, self._class_of[own], group))
                return Entry(path, group, Fate.SKIPPED, AGAIN), None
            entries = _listing(folder)
        except OSError as error:
            disks.check(error, folder)
            return Entry(path, group, Fate.UNREADABLE, f"{UNLISTABLE} ({error.strerror})"), None
        self._read.add(own)
        self._class_of[own] = group
        if not entries:
            return Entry(path, group, Fate.SKIPPED, EMPTY), None
        return None, (iter(entries), own)


def _fate(entry: os.DirEntry[str], kind: str) -> tuple[Fate, str]:
    if kind == "file" and entry.name[0] not in ".~" and os.path.splitext(entry.name)[1].lower() in image_suffixes():
        return Fate.TAKEN, ""  # nearly all entries, of which there may be millions
    if (hidden := _by_name(entry.name, folder=kind == "folder")) is not None:
        return Fate.SKIPPED, hidden
    if kind == "other":
        return Fate.SKIPPED, NOT_REGULAR
    suffix = suffix_of(entry.name)
    if suffix and suffix not in image_suffixes():
        return Fate.SKIPPED, f"with suffix {suffix}"
    if kind != "file":
        return Fate.UNREADABLE, kind
    return (Fate.TAKEN, "") if suffix else _by_content(entry.path)


def _by_content(path: str) -> tuple[Fate, str]:
    try:
        with open(path, "rb", buffering=0) as file:
            head = file.read(_HEAD_BYTES)
    except OSError as error:
        disks.check(error, path)
        return Fate.UNREADABLE, f"file that cannot be opened ({error.strerror})"
    return (Fate.TAKEN, "") if is_image(head) else (Fate.SKIPPED, NO_IMAGE)


def _by_name(name: str, *, folder: bool) -> str | None:
    if is_system(name, folder=folder):
        return SYSTEM
    return HIDDEN if name.startswith(".") else None


def _kind(entry: os.DirEntry[str]) -> str:
    """Returns "file", "folder" or "other"; or why a link cannot be followed."""
    try:
        if entry.is_file():
            return "file"
        if entry.is_dir():
            return "folder"
        if not entry.is_symlink():
            return "other"
        mode = entry.stat().st_mode
    except FileNotFoundError:
        return DANGLING
    except OSError as error:
        disks.check(error, entry.path)
        return f"link that cannot be followed ({error.strerror})"
    return "other" if not stat.S_ISREG(mode) else "file"


def _listing(folder: str) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)


def _identity(folder: str) -> _Identity:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _around(root: str) -> set[_Identity]:
    """Returns the identities of a folder and of all folders that it lies in."""
    found, folder = {_identity(root)}, os.path.realpath(root)
    while (above := os.path.dirname(folder)) != folder:
        folder = above
        with suppress(OSError):  # what may not be looked at from here, no link is followed into
            found.add(_identity(folder))
    return found


def _contradiction(folder: str, first: str, second: str) -> str:
    return (
        f"{shown(folder)} is reached as class {first!r} and as class {second!r}; its images can have one label only: "
        "remove one of the links"
    )
