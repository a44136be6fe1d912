"""Packages that are installed beside fedpeft for one program: a module and its entry points."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..programs import run_program

LINE = """
import numpy as np
from fedpeft.data.examples import Examples
from fedpeft.models.structure import ModelStructure
from fedpeft.models.tasks import Task
from torch import nn


class Line(Task):
    def module(self, config):
        return nn.Sequential(nn.Linear(1, 1))

    def structure(self, module, config):
        return ModelStructure("0")

    def read(self, path):
        return Examples.unlabelled(np.loadtxt(path, dtype=np.float32))

    def loss(self, module, batch):
        x, y = batch["values"].split(1, 1)
        return (module(x) - y).square().sum(1)
"""
"""A task of two parameters."""


def install(folder: Path, name: str, source: str, points: str) -> None:
    """Puts a package of one module where `run` finds it; `points` are its entry points, in the form of their file."""
    about = folder / f"{name}-1.0.dist-info"
    about.mkdir()
    (folder / f"{name}.py").write_text(source)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(points)


def run(folder: Path, code: str) -> dict[str, Any]:
    """Runs a program, whose argument is the folder, with its packages installed; returns the JSON of its last line."""
    done = run_program(folder, code, str(folder))
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
