"""docs/record.md lists the fields that there are, and its example is a record with the digest shown."""

import re
from dataclasses import fields
from pathlib import Path

from fedpeft.record import FORMAT, Record, digest, parse

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "record.md").read_text(encoding="utf-8")
EXAMPLE = re.findall(r"^```json\n(.*?)^```$", PAGE, re.M | re.S)[0].replace("\n", "")
DIGEST = re.findall(r"^[0-9a-f]{64}$", PAGE, re.M)[0]


def test_the_example_is_a_record_with_its_digest() -> None:
    record = parse(EXAMPLE)
    assert record.round == 1
    assert digest(EXAMPLE) == DIGEST


def test_every_field_is_listed() -> None:
    first, second = (re.findall(r"^\| `(\w+)` \|", part, re.M) for part in PAGE.split("| key of a contribution"))
    assert first == ["format", *(f.name for f in fields(Record))]
    assert f"`format` | {FORMAT}" in PAGE
    assert second == [f.name for f in fields(parse(EXAMPLE).contributions[0])]
