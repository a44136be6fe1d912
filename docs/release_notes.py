"""Prints the notes of one release, cut from CHANGELOG.md: `python docs/release_notes.py 0.2.0` (or v0.2.0).

`unreleased` prints what the next release would say. Ends with 1 if the changelog has no such version, or an empty one.
"""

import re
import sys
from pathlib import Path

CHANGELOG = Path(__file__).resolve().parent.parent / "CHANGELOG.md"
HEADING = re.compile(r"^## \[?v?([^\s\]]+)\]?(?: - (\d{4}-\d{2}-\d{2}))?$", re.M)


def sections(text: str) -> dict[str, str]:
    """Returns the text below each heading of the second level, by version; the unreleased one is `unreleased`."""
    marks = list(HEADING.finditer(text))
    ends = [m.start() for m in marks[1:]] + [len(text)]
    return {m[1].lower(): text[m.end() : end].strip() for m, end in zip(marks, ends, strict=True)}


def notes(text: str, version: str) -> str:
    """Returns the notes of a version.

    Raises:
        LookupError: If there are none; the message says which versions have some.
    """
    found = sections(text)
    wanted = version.lower().removeprefix("v")
    if wanted not in found:
        raise LookupError(f"CHANGELOG.md has no section for {version}; there are: {', '.join(found)}")
    if not found[wanted]:
        raise LookupError(f"CHANGELOG.md says nothing about {version}")
    return found[wanted]


def main() -> int:
    """Prints the notes of the version on the command line."""
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        print(notes(CHANGELOG.read_text(encoding="utf-8"), sys.argv[1]))
    except LookupError as error:
        print(f"release_notes: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
