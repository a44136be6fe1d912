"""Worlds of processes under faults, held in a process that has all modules."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

Hold = Callable[[str], SimpleNamespace]


@pytest.fixture(scope="session")
def hold() -> Iterator[Hold]:
    """Holds worlds by the names of their schedules, in forks of a process that has all modules."""
    command = [sys.executable, "-m", "chaos.world"]
    folder = Path(__file__).parents[1]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder) as worlds:
        assert worlds.stdin is not None
        assert worlds.stdout is not None
        to, back = worlds.stdin, worlds.stdout

        def held(name: str) -> SimpleNamespace:
            print(f"schedule {name}")
            to.write(f"{name}\n")
            to.flush()
            return SimpleNamespace(**json.loads(back.readline()))

        yield held
        to.close()


def told(outcome: SimpleNamespace) -> str:
    """Returns the broken promises of a world, and what its processes said last."""
    return "\n".join([*outcome.faults, *outcome.notes, *outcome.log])


@pytest.fixture(scope="session")
def undisturbed(hold: Hold) -> SimpleNamespace:
    """The world of one daemon without faults."""
    outcome = hold("undisturbed")
    assert outcome.faults == [], told(outcome)
    return outcome
