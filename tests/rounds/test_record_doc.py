"""docs/record.md lists the fields that there are, and its example is a record with the digest shown."""

import re
from dataclasses import MISSING, fields
from pathlib import Path

from fedpeft.rounds.record import PARTLY, PLAIN, SUM, Excluded, Record, digest, parse
from fedpeft.rounds.screening import NormBound

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "record.md").read_text(encoding="utf-8")
EXAMPLE = re.findall(r"^```json\n(.*?)^```$", PAGE, re.M | re.S)[0].replace("\n", "")
DIGEST = re.findall(r"^[0-9a-f]{64}$", PAGE, re.M)[0]


def test_the_example_is_a_record_with_its_digest() -> None:
    record = parse(EXAMPLE)
    assert record.round == 1
    assert digest(EXAMPLE) == DIGEST


def test_every_field_is_listed() -> None:
    first, second, third = (
        re.findall(r"^\| `(\w+)` \|", part, re.M)
        for part in re.split(r"\| key of a contribution|## Updates that were not folded", PAGE)
    )
    assert first == ["format", *(f.name for f in fields(Record) if f.default is MISSING)]
    assert f"`format` | {PLAIN}; {PARTLY} for" in PAGE
    assert f"format {SUM}" in PAGE
    assert second == [f.name for f in fields(parse(EXAMPLE).contributions[0])]
    assert third == [f.name for f in fields(Record) if f.default is not MISSING]
    assert all(f"`{f.name}`" in PAGE for cls in (Excluded, NormBound) for f in fields(cls))
