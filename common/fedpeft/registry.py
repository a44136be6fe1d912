"""Registries: one file a PEFT method, a strategy, a codec; each registers itself and touches nothing else.

A registry imports every module of its package on first use, so a new file is found without being named anywhere.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Generic, TypeVar

from fedpeft.errors import ConfigInvalid

T = TypeVar("T")


class Registry(Generic[T]):
    """Maps names to the things that modules of one package registered.

    Args:
        package: Dotted name of the package whose modules register.
        kind: What the things are, for messages ("PEFT method").
    """

    def __init__(self, package: str, kind: str) -> None:
        self._package = package
        self._kind = kind
        self._items: dict[str, T] = {}
        self._loaded = False

    def register(self, name: str) -> Callable[[T], T]:
        """Returns a decorator that registers a class or function under `name`."""

        def add(item: T) -> T:
            if name in self._items:
                raise ValueError(f"{self._kind} {name!r} is registered twice")
            self._items[name] = item
            return item

        return add

    def get(self, name: str) -> T:
        """Returns what is registered under `name`.

        Raises:
            ConfigInvalid: If there is no such name; the message lists those there are.
        """
        self._load()
        try:
            return self._items[name]
        except KeyError:
            known = ", ".join(sorted(self._items))
            raise ConfigInvalid(f"there is no {self._kind} {name!r}; there are: {known}") from None

    def names(self) -> list[str]:
        """Returns all names, sorted."""
        self._load()
        return sorted(self._items)

    def _load(self) -> None:
        if not self._loaded:
            package = importlib.import_module(self._package)
            for module in pkgutil.iter_modules(package.__path__):
                importlib.import_module(f"{self._package}.{module.name}")
            self._loaded = True
