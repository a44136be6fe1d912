"""Writes the parts of the reference pages that are made from the code; `--check` fails when one is stale.

A page is written by hand down to the mark, and made by a module of `generators` from there on.
"""

import sys
from pathlib import Path

from generators import commands, durations, metrics, protocol, run_file, security, settings, site_owner

DOCS = Path(__file__).resolve().parent
BEGIN = "<!-- made by docs/generate.py from the code: change it there -->\n"
GENERATORS = (commands, durations, metrics, protocol, run_file, security, settings, site_owner)
"""Modules with `PAGE`, the name of a file in docs/, and `lines()`, which yields what stands below the mark."""


def main() -> int:
    """Writes the pages, or compares."""
    stale = 0
    for generator in GENERATORS:
        path = DOCS / generator.PAGE
        now = path.read_text(encoding="utf-8")
        written, mark, _ = now.partition(BEGIN)
        if not mark:
            raise SystemExit(f"docs/{generator.PAGE} has no line {BEGIN}")
        fresh = written + BEGIN + "\n" + "\n".join(generator.lines()).rstrip() + "\n"
        if fresh == now:
            continue
        if "--check" in sys.argv[1:]:
            print(f"docs/{generator.PAGE} is stale; run `.venv/bin/python docs/generate.py`")
            stale = 1
        else:
            path.write_text(fresh, encoding="utf-8")
            print(f"wrote docs/{generator.PAGE}")
    return stale


if __name__ == "__main__":
    sys.exit(main())
