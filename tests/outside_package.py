"""A package that is installed beside fedpeft for one test, in this process and in those that it starts."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fedpeft.registry import Registry, registry_of

PRIVATE_HEAD = """
from fedpeft.adapters.spec import TensorRole
from fedpeft.peft import Method


class PrivateHead(Method):
    def tunes(self, name):
        return name.endswith("bias")

    def roles(self, name):
        return (TensorRole.LOCAL,) if name.startswith("head.") else (TensorRole.SENT,)
"""
"""Source of a PEFT method that tunes biases, and keeps the head at the client."""


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, source: str, points: Mapping[str, str]) -> None:
    """Installs a module `outside_package`.

    Args:
        folder: An empty folder.
        monkeypatch: Undoes it.
        source: The module's text.
        points: Objects in it, by `package/name`: the package whose registry finds them, and the name there.
    """
    about = folder / "outside_package-1.0.dist-info"
    about.mkdir(parents=True)
    (folder / "outside_package.py").write_text(source)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: outside_package\nVersion: 1.0\n")
    text = ""
    for place, thing in points.items():
        package, _, name = place.partition("/")
        registry = registry_of(package)
        registry.names()
        monkeypatch.delitem(registry.__dict__, "_installed", raising=False)
        monkeypatch.setitem(registry._items, name, None)  # so that it is undone
        del registry._items[name]
        text += f"[{registry.group}]\n{name} = outside_package:{thing}\n"
    (about / "entry_points.txt").write_text(text)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delenv("FEDPEFT_TESTS_PRELOADED", raising=False)  # a fork of that process would not find it
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(folder), os.environ.get("PYTHONPATH", ""))))
    monkeypatch.delitem(importlib.sys.modules, "outside_package", raising=False)


@contextmanager
def looked_up_anew(registry: Registry[Any]) -> Iterator[None]:
    """Lets a registry look at what is installed now, and again afterwards: it remembers both."""
    registry.names()  # the modules of its own package register once in a process
    before = dict(registry._items)
    registry.__dict__.pop("_installed", None)
    try:
        yield
    finally:
        registry._items = before
        registry.__dict__.pop("_installed", None)
