"""A tiny study as its file, and its data."""

from __future__ import annotations

from pathlib import Path

from ..data.test_sources import table, write

STUDY = """
name = "tiny"
title = "Two methods"
question = "Which of two is better?"
seeds = [0, 1]
target = 0.01
budgets_bytes = [10_000, 10_000_000]

[run.model]
name = "vit_tiny_patch16_224"
weights = "none"
image_size = 32
depth = 1
[run.peft]
method = "head"
[run.rounds]
count = 2
clients = 2
[run.simulation]
clients = 3

[data.pets.run.model]
classes = ["cat", "dog", "emu"]

[axes.method.head]
[axes.method."lora 2"]
peft.method = "lora"
peft.rank = 2

[scales.one]
seeds = [7]
[scales.one.run.rounds]
count = 1
[scales.one.axes.method."lora 2"]
training.learning_rate = 0.5
"""


def study_file(folder: Path, text: str = STUDY) -> Path:
    """Writes the study file."""
    path = folder / "study.toml"
    path.write_text(text)
    return path


def pets(folder: Path) -> Path:
    """Writes a data set with a training and a held-out part."""
    folder.mkdir(exist_ok=True)
    write(folder / "train.parquet", table(30))
    write(folder / "test.parquet", table(9))
    return folder
