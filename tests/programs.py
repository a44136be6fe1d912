"""Programs of tests, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from .conftest import preloaded_environment


def run_program(folder: Path, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a program in a process of its own, for which the modules of a folder are installed.

    It is a fork of the process that has imported torch (`tests/preloaded`), which knows nothing of the folder.
    """
    (folder / "fedpeft_tests_program.py").write_text(code, encoding="utf-8")
    environment = {**os.environ, **preloaded_environment()}
    environment["PYTHONPATH"] = os.pathsep.join((str(folder), environment.get("PYTHONPATH", "")))
    command = [sys.executable, "-m", "fedpeft_tests_program", *arguments]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=120)
