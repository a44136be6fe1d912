"""Registries of PEFT methods, strategies, codecs and tasks: one file each, which registers itself and touches no other.

A name is found in three places. The modules of the registry's own package, and of packages in it, register when it is
first asked, so a new file is found without being named anywhere; so do modules of one's own, see `fedpeft.extensions`.
A package that is installed beside fedpeft names its own under the registry's entry point group, and is imported when
that name is asked for. What a run names and none of them brings is refused. So is a name that means two things, built
in and installed or from two packages: neither is chosen.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Callable
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from fedpeft import extensions
from fedpeft.errors import ConfigInvalid

T = TypeVar("T")


class Registry(Generic[T]):
    """Maps names to the things that modules of one package, and packages installed beside it, registered.

    Args:
        package: Dotted name of the package whose modules register.
        group: Entry point group under which other packages name theirs.
        kind: Kind of its entries, for messages ("PEFT method").
        former: An earlier name of the group, which is still read; empty for none.
    """

    def __init__(self, package: str, group: str, kind: str, former: str = "") -> None:
        self._package = package
        self.group, self._former = group, former
        self._kind = kind
        self._items: dict[str, T] = {}
        self._loaded = False
        _registries[package] = self

    def register(self, name: str) -> Callable[[T], T]:
        """Returns a decorator that registers a class or function under `name`."""
        module = str(sys._getframe(1).f_globals.get("__name__", ""))  # that of an instance may be its class's only

        def add(item: T) -> T:
            if name in self._items:
                raise ValueError(f"{self._kind} {name!r} is registered twice")
            self._items[name] = item
            extensions.registered(module, lambda: self._items.pop(name, None))
            return item

        return add

    def get(self, name: str) -> T:
        """Returns what is registered under `name`.

        Raises:
            ConfigInvalid: If there is no such name; the message lists those there are. Likewise, if the installed
                package that brings it cannot be imported, or the name means two things; both are named.
        """
        self._load()
        for point in self._installed.get(name, ()):
            self._add(point)
        self._installed.pop(name, None)  # of a name that is refused they stay, and it is refused again
        try:
            return self._items[name]
        except KeyError:
            known = ", ".join(filter(None, self.names())) or "none"
            raise ConfigInvalid(f"there is no {self._kind} {name!r}; there are: {known}") from None

    def __contains__(self, name: str) -> bool:
        """Returns whether `get` knows a name, without importing what a package installed beside brings."""
        self._load()
        return name in self._items or name in self._installed

    def names(self) -> list[str]:
        """Returns all names, sorted."""
        self._load()
        return sorted({*self._items, *self._installed})

    @cached_property
    def _installed(self) -> dict[str, list[EntryPoint]]:
        """The entry points by name, until it is asked for; a package may have one under the former group beside."""
        found: dict[str, dict[str, EntryPoint]] = {}
        for group in filter(None, (self._former, self.group)):
            for point in entry_points(group=group):
                found.setdefault(point.name, {})[_package(point)] = point
        return {name: list(points.values()) for name, points in found.items()}

    def _add(self, point: EntryPoint) -> None:
        item = self._imported(point)
        known = self._items.setdefault(point.name, item)
        if known is not item:
            brought = f"{point.value} of the installed package {_package(point)}"
            raise ConfigInvalid(
                f"{self._kind} {point.name!r} is both {_origin(known)} and {brought}; name that entry point otherwise"
            )

    def _imported(self, point: EntryPoint) -> T:
        try:
            with extensions.undone_on_failure():
                item: T = point.load()
        except Exception as error:  # whatever the import of somebody's package raises
            cause = f"{type(error).__name__}: {error}"
            raise ConfigInvalid(f"{self._kind} {point.name!r} ({point.value}): {cause}") from error
        return item

    def _load(self) -> None:
        if not self._loaded:
            package = importlib.import_module(self._package)
            with extensions.undone_on_failure():
                for module in pkgutil.walk_packages(package.__path__, f"{self._package}."):
                    importlib.import_module(module.name)
            self._loaded = True  # before the extensions, which may ask this registry
            try:
                extensions.load()
            except BaseException:
                self._loaded = False  # or it would answer without them when asked again
                raise


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.module


def _origin(item: object) -> str:
    """Returns a class or an object as an entry point writes it."""
    cls = item if isinstance(item, type) else type(item)
    return f"{cls.__module__}:{cls.__qualname__}"


_registries: dict[str, Registry[Any]] = {}


def registry_of(package: str) -> Registry[Any]:
    """Returns the registry of a package, for modules below it that check the names of a run file."""
    importlib.import_module(package)
    return _registries[package]
