"""Prints what the distribution and some of its extras need, a line each, without the distribution itself.

An image installs that in a layer of its own, before the code: a change of the code then costs megabytes, not gigabytes.

    python deploy/images/requirements.py pyproject.toml client
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

OURSELVES = re.compile(r"fedpeft\[([\w,-]+)\]")


def main(arguments: list[str]) -> int:
    """Prints the requirements; the first argument is pyproject.toml, the others are extras."""
    project = tomllib.loads(Path(arguments[0]).read_text(encoding="utf-8"))["project"]
    needed = {*project["dependencies"], *(line for extra in arguments[1:] for line in _of(project, extra))}
    print("\n".join(sorted(needed)))
    return 0


def _of(project: dict[str, Any], extra: str) -> Iterator[str]:
    """Yields what an extra needs, and what the extras that it names need."""
    for line in project["optional-dependencies"][extra]:
        if ours := OURSELVES.fullmatch(line):
            for other in ours[1].split(","):
                yield from _of(project, other)
        else:
            yield line


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
