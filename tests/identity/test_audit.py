"""The audit log's chain: canonical, and no change of it goes unseen."""

import hashlib
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.errors import AuditBroken
from fedpeft.identity.audit import FIRST, MAX_DETAILS, AuditEntry, Detail, entry, of_line, parse_head, verify

TEXT = st.text(max_size=40)
DETAIL = st.one_of(TEXT, st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.booleans(), st.none())
EVENT = st.tuples(
    st.floats(0, 1e11, allow_nan=False), TEXT, TEXT, TEXT, st.dictionaries(st.text(max_size=9), DETAIL, max_size=4)
)
EVENTS = st.lists(EVENT, min_size=1, max_size=6)

Event = tuple[float, str, str, str, dict[str, Detail]]


def log(events: list[Event]) -> list[AuditEntry]:
    entries: list[AuditEntry] = []
    for event in events:
        entries.append(entry(entries[-1] if entries else None, *event))
    return entries


def three() -> list[AuditEntry]:
    return log([(1.0 + n, "operator ada", "token.created", f"client site-{n}", {"life_s": 60}) for n in range(3)])


def test_canonical_json_and_its_digest() -> None:
    first = entry(None, 1, "server", "server.started", "", {"b": 1, "a": "é"})
    assert first.details == '{"a":"\\u00e9","b":1}'
    without = (
        '{"action":"server.started","actor":"server","at":1.0,"details":"{\\"a\\":\\"\\\\u00e9\\",\\"b\\":1}",'
        f'"number":1,"object":"","previous_sha256":"{FIRST}"'
    )
    digest = hashlib.sha256(f"{without}}}".encode()).hexdigest()
    assert first.sha256 == digest
    assert first.to_line() == f'{without},"sha256":"{digest}"}}'


@given(EVENTS)
def test_a_log_is_whole_and_survives_an_export(events: list[Event]) -> None:
    entries = log(events)
    again = [of_line(line.to_line() + "\n", "a line") for line in entries]
    assert again == entries
    assert verify(again) == entries[-1]
    assert verify(again, (entries[0].number, entries[0].sha256)) == entries[-1]
    assert [found.number for found in again] == list(range(1, len(events) + 1))


@given(EVENTS, st.data())
def test_no_changed_field_goes_unseen(events: list[Event], data: st.DataObject) -> None:
    entries = log(events)
    index = data.draw(st.integers(0, len(entries) - 1))
    field = data.draw(st.sampled_from(["at", "actor", "action", "object", "details", "previous_sha256", "sha256"]))
    value = getattr(entries[index], field)
    other = data.draw(st.floats(0, 1e9) if field == "at" else st.text(max_size=64))
    if other == value:
        return
    entries[index] = replace(entries[index], **{field: other})
    with pytest.raises(AuditBroken, match=rf"^entry ({index + 1}|{index + 2}) "):
        verify(entries)


@given(st.lists(EVENT, min_size=2, max_size=6), st.data())
def test_no_removed_or_moved_entry_goes_unseen(events: list[Event], data: st.DataObject) -> None:
    entries = log(events)
    index = data.draw(st.integers(0, len(entries) - 2))
    with pytest.raises(AuditBroken, match=f"^entry {index + 1} is missing: entry {index + 2} stands in its place"):
        verify([*entries[:index], *entries[index + 1 :]])
    with pytest.raises(AuditBroken):
        verify([*entries[:index], entries[index + 1], entries[index], *entries[index + 2 :]])


@given(EVENTS, EVENT)
def test_a_log_that_was_made_anew_is_whole_but_not_the_one_that_was_noted(events: list[Event], other: Event) -> None:
    entries = log(events)
    noted = (entries[-1].number, entries[-1].sha256)
    forged = log([other, *events[1:]])
    if forged == entries:
        return
    verify(forged)
    with pytest.raises(AuditBroken, match=f"^entry {noted[0]} has sha256 .* was noted"):
        verify(forged, noted)
    with pytest.raises(AuditBroken, match=f"ends with entry {noted[0] - 1}, but entry {noted[0]} was noted"):
        verify(entries[:-1], noted)


def test_an_empty_log_is_whole() -> None:
    assert verify([]) is None


@given(st.dictionaries(st.text(max_size=4000), st.text(max_size=6000), max_size=3), st.text(max_size=9000))
def test_nothing_is_too_long_to_be_logged(details: dict[str, str], name: str) -> None:
    found = entry(None, 0.0, name, name, name, details)
    assert len(found.details) <= MAX_DETAILS
    assert isinstance(json.loads(found.details), dict)
    assert max(len(found.actor), len(found.action), len(found.object)) <= 256
    assert verify([found]) == found


def test_long_details_are_shortened_before_they_are_left_out() -> None:
    found = json.loads(entry(None, 0.0, "", "", "", {"why": "x" * 5000, "life_s": 7}).details)
    assert found["life_s"] == 7
    assert found["why"] == "x" * 255 + "…"
    many = json.loads(entry(None, 0.0, "", "", "", {f"k{n}": "x" * 300 for n in range(50)}).details)
    assert list(many) == ["too_long"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", "line 7 is not JSON"),
        ("[" * 100_000, "line 7 is not JSON"),
        ("[1]", "line 7 is not an entry"),
        ("{}", "line 7 is not an entry"),
        (three()[0].to_line().replace('"number":1', '"number":true'), "line 7 is not an entry"),
        (three()[0].to_line().replace(":", ": "), r"line 7 \(entry 1\) is not in canonical form"),
    ],
)
def test_what_is_no_entry_is_refused(line: str, said: str) -> None:
    with pytest.raises(AuditBroken, match=said):
        of_line(line, "line 7")


def test_heads() -> None:
    assert parse_head("12:" + "a" * 64) == (12, "a" * 64)
    for wrong in ("", "12", "0:" + "a" * 64, "x:" + "a" * 64, "1:" + "A" * 64, "1:" + "a" * 63, "9" * 5000 + ":"):
        with pytest.raises(ValueError, match="is not NUMBER:SHA256"):
            parse_head(wrong)
