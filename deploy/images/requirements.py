"""Writes exactly what an image needs: what the distribution and some of its extras ask for, as pip resolves it.

An image installs that in layers of its own, before the code. They depend on these files alone, so a change of the code
costs megabytes, and so does a change of a pin, unless it is one of torch's: what is heavy has a file of its own.

    python requirements.py pyproject.toml constraints.txt --out FOLDER [--pip="--extra-index-url ..."] [client ...]

pip 25.1 or newer resolves without fetching what it would install.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

OURSELVES = re.compile(r"fedpeft\[([\w,-]+)\]")
HEAVY = re.compile(r"torch|torchvision|triton|cuda-.+|nvidia-(?!ml-py).+")
"""The distributions that are gigabytes together."""


def main() -> int:
    """Writes FOLDER/heavy.txt and FOLDER/light.txt, a line `name==version` each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("project", type=Path)
    parser.add_argument("constraints", type=Path)
    parser.add_argument("extras", nargs="*")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pip", type=shlex.split, default=[], help="what else pip is told")
    given = parser.parse_intermixed_args()
    pins = resolve(needed(given.project, given.extras), given.constraints, given.pip)
    given.out.mkdir(parents=True, exist_ok=True)
    for name, lines in split(pins).items():
        (given.out / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return 0


def needed(project: Path, extras: list[str]) -> list[str]:
    """Returns what the distribution and these extras ask for, without the distribution itself."""
    stated = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
    return sorted({*stated["dependencies"], *(line for extra in extras for line in _of(stated, extra))})


def _of(stated: dict[str, Any], extra: str) -> Iterator[str]:
    """Yields what an extra needs, and what the extras that it names need."""
    for line in stated["optional-dependencies"][extra]:
        if ours := OURSELVES.fullmatch(line):
            for other in ours[1].split(","):
                yield from _of(stated, other)
        else:
            yield line


def resolve(lines: list[str], constraints: Path, arguments: list[str]) -> list[str]:
    """Asks pip which versions it would install, of these and of all that they need; installs nothing."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
        command += ["--report", str(report), "--constraint", str(constraints)]
        subprocess.run([*command, *arguments, *lines], check=True)
        found = [item["metadata"] for item in json.loads(report.read_text(encoding="utf-8"))["install"]]
    return sorted(f"{metadata['name']}=={metadata['version']}" for metadata in found)


def split(pins: list[str]) -> dict[str, list[str]]:
    """Returns the files' lines by the files' names."""
    heavy = [pin for pin in pins if HEAVY.fullmatch(pin.partition("==")[0])]
    return {"heavy.txt": heavy, "light.txt": [pin for pin in pins if pin not in heavy]}


if __name__ == "__main__":
    sys.exit(main())
