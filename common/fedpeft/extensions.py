"""Modules of one's own that bring methods, strategies, codecs or algorithms without being an installed package.

A module is named by its dotted name or its file, by `--import` or in `FEDPEFT_IMPORT`. Registries import them after
their own package, so every process that a command starts knows what they register: the variable passes to all of them.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from types import ModuleType

from fedpeft.errors import ConfigInvalid

VARIABLE = "FEDPEFT_IMPORT"
"""Environment variable: modules, with `os.pathsep` between."""


_registrations: list[tuple[str, Callable[[], object]]] = []
"""Registrations, oldest first: the name of the module that made it, and a call that undoes it."""


def extend(modules: Iterable[str]) -> None:
    """Imports modules now, and in every process that this one starts from now on.

    Raises:
        ConfigInvalid: If one cannot be imported, with what it raised.
    """
    for module in modules:
        named = str(Path(module).resolve()) if _is_file(module) else module
        if os.pathsep in named:
            raise ConfigInvalid(f"--import {named}: a path with {os.pathsep!r} in it cannot be handed on; rename it")
        _imported(named)
        if named not in (known := extensions()):
            os.environ[VARIABLE] = os.pathsep.join([*known, named])


def extensions() -> list[str]:
    """Returns the modules of this process, in their order."""
    return [each for each in os.environ.get(VARIABLE, "").split(os.pathsep) if each]


def load() -> None:
    """Imports the modules of this process.

    Raises:
        ConfigInvalid: If one cannot be imported, with what it raised.
    """
    for module in extensions():
        _imported(module)


def digests() -> dict[str, str]:
    """Returns the sha256 of the file of each module of this process, hexadecimal, by the module's name.

    What a module imports in turn is not in it.

    Raises:
        ConfigInvalid: If a module has no file of its own.
    """
    found = {}
    for module in map(_imported, extensions()):
        if module.__file__ is None:
            raise ConfigInvalid(f"--import {module.__name__}: it is a folder without __init__.py; name a module in it")
        found[module.__name__] = sha256(Path(module.__file__).read_bytes()).hexdigest()
    return found


def registered(module: str, undo: Callable[[], object]) -> None:
    """Notes what a module registered, to be undone if its import fails."""
    _registrations.append((module, undo))


@contextmanager
def undone_on_failure() -> Iterator[None]:
    """Undoes what modules registered whose import failed in the block, so that it can be tried again.

    What they imported and what did not fail stays as it is, as in `sys.modules`.
    """
    before = len(_registrations)
    try:
        yield
    except BaseException:
        since = _registrations[before:]
        _registrations[before:] = [each for each in since if each[0] in sys.modules]
        for module, undo in since:
            if module not in sys.modules:
                undo()
        raise


def _imported(name: str) -> ModuleType:
    try:
        with undone_on_failure():
            return _of_file(Path(name)) if _is_file(name) else importlib.import_module(name)
    except Exception as error:  # whatever the import of somebody's module raises
        raise ConfigInvalid(f"--import {name}: {type(error).__name__}: {error}") from error


def _is_file(name: str) -> bool:
    return name.endswith(".py")


def _of_file(file: Path) -> ModuleType:
    """Imports a file once, under the name of its stem.

    Raises:
        ImportError: If a module of that name is there already.
    """
    known = sys.modules.get(file.stem)
    if known is not None:
        if getattr(known, "__file__", None) != str(file):
            raise ImportError(f"there is a module {file.stem!r} already; name the file otherwise")
        return known
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise ImportError("it is no Python file")
    module = sys.modules[file.stem] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[file.stem]
        raise
    return module
