"""Records: canonical, and chained so that no round can be changed unseen."""

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fedpeft.errors import BlobCorrupt
from fedpeft.rounds.record import Contributed, Excluded, Record, digest, parse, verify_chain
from fedpeft.rounds.screening import NormBound


def hexadecimal(number: int) -> str:
    return f"{number:064x}"


def chain(n: int) -> list[Record]:
    records: list[Record] = []
    for number in range(1, n + 1):
        contributions = tuple(
            Contributed(f"client-{i}", f"ticket-{number}-{i}", 10 + i, 10.0 + i, hexadecimal(100 * number + i))
            for i in range(3)
        )
        records.append(
            Record(
                run="run-1",
                round=number,
                base_sha256=hexadecimal(number - 1),
                contributions=contributions,
                strategy="fedadam",
                options={"tau": 1e-3, "beta1": 0.9, "bias_correction": False},
                adapter_sha256=hexadecimal(number),
                state_sha256=hexadecimal(number + 50),
                previous_sha256=digest(records[-1].to_json()) if records else "",
            )
        )
    return records


def texts(records: list[Record]) -> list[str]:
    return [record.to_json() for record in records]


def test_canonical_json() -> None:
    text = chain(1)[0].to_json()
    assert text == json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"))
    assert text.isascii() and " " not in text
    assert '"options":{"beta1":0.9,"bias_correction":false,"tau":0.001}' in text
    assert '"weight":10.0' in text
    turned = replace(chain(1)[0], options=dict(reversed(chain(1)[0].options.items())))
    assert turned.to_json() == text


def test_staleness_is_said_only_where_there_is_some() -> None:
    fresh = chain(2)[1]
    assert "staleness" not in fresh.to_json() and '"format":1' in fresh.to_json()
    late = (replace(fresh.contributions[0], staleness=1), *fresh.contributions[1:])
    stale = replace(fresh, contributions=late).to_json()
    assert stale.count('"staleness":1') == 1 and stale.count("staleness") == 1 and '"format":3' in stale
    assert parse(stale).contributions == late
    never = replace(fresh, contributions=(replace(fresh.contributions[0], staleness=2), *fresh.contributions[1:]))
    with pytest.raises(BlobCorrupt, match="an update starts from a version that never was"):
        verify_chain([chain(1)[0].to_json(), never.to_json()])


def test_the_digest_is_of_these_very_bytes() -> None:
    small = replace(chain(1)[0], contributions=(Contributed("c", "t", 1, 0.1, hexadecimal(7)),), options={})
    assert small.to_json() == (
        '{"adapter_sha256":"' + hexadecimal(1) + '","base_sha256":"' + hexadecimal(0) + '",'
        '"contributions":[{"client":"c","examples":1,"sha256":"' + hexadecimal(7) + '","ticket":"t","weight":0.1}],'
        '"format":1,"options":{},"previous_sha256":"","round":1,"run":"run-1",'
        '"state_sha256":"' + hexadecimal(51) + '","strategy":"fedadam"}'
    )


@given(weight=st.floats(1e-300, 1e300), name=st.text(min_size=1), examples=st.integers(1, 10**9))
def test_parse_gives_the_record_back(weight: float, name: str, examples: int) -> None:
    record = replace(chain(1)[0], run=name, contributions=(Contributed(name, "t", examples, weight, hexadecimal(1)),))
    assert parse(record.to_json()) == record


def passes(records: Sequence[Record]) -> bool:
    try:
        verify_chain([record.to_json() for record in records])
    except BlobCorrupt:
        return False
    return True


def test_a_chain_passes_up_to_any_round_and_in_no_other_order() -> None:
    records = chain(6)
    assert all(passes(records[:length]) for length in range(7))
    assert [order for order in permutations(chain(4)) if passes(order)] == [tuple(chain(4))]
    assert passes([replace(records[0], state_sha256="")]), "a strategy may keep no state"


def test_what_breaks_a_chain() -> None:
    good = chain(4)
    one = good[0].contributions[0]
    faults = {
        "record 3 of 3: it is of round 4": [good[0], good[1], good[3]],
        "record 1 of 3: it is of round 2": good[1:],
        "record 2 of 4: its previous_sha256 is not": [replace(good[0], strategy="fedavg"), *good[1:]],
        "record 2 of 2: it is of run run-2": [good[0], replace(good[1], run="run-2")],
        "record 2 of 2: it does not start from the adapter": [good[0], replace(good[1], base_sha256=hexadecimal(9))],
        "record 1 of 1: no update was folded": [replace(good[0], contributions=())],
        "record 1 of 1: its clients are not sorted": [replace(good[0], contributions=(one, one))],
        "record 1 of 1: a digest has not 64": [replace(good[0], adapter_sha256="AB" * 32)],
        "record 1 of 1: a weight": [replace(good[0], contributions=(replace(one, weight=0.0),))],
        "record 1 of 1: its previous_sha256 is not empty": [replace(good[0], previous_sha256=hexadecimal(1))],
    }
    for message, records in faults.items():
        with pytest.raises(BlobCorrupt, match=message):
            verify_chain(texts(records))


@given(place=st.integers(0, 10_000), character=st.characters(codec="ascii"), which=st.integers(0, 2))
def test_any_changed_character_is_found(place: int, character: str, which: int) -> None:
    """In all but the last record, whose digest is kept elsewhere."""
    records = texts(chain(4))
    text = records[which]
    place %= len(text)
    assume(text[place] != character)
    records[which] = text[:place] + character + text[place + 1 :]
    with pytest.raises(BlobCorrupt):
        verify_chain(records)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "1", '{"format":1}', "[" * 100_000, '{"format":2}', "NaN"])
def test_what_is_no_record(text: str) -> None:
    with pytest.raises(BlobCorrupt):
        parse(text)


def test_a_record_in_another_order_is_not_canonical() -> None:
    record = chain(1)[0]
    with pytest.raises(BlobCorrupt, match="not in canonical form"):
        parse(json.dumps(json.loads(record.to_json()), separators=(",", ":"), indent=1))
    with pytest.raises(BlobCorrupt, match="format 5"):
        parse(record.to_json().replace('"format":1', '"format":5'))
    with pytest.raises(BlobCorrupt, match="not in canonical form"):
        parse(record.to_json().replace('"format":1', '"format":2'))


def screened(record: Record) -> Record:
    left_out = Excluded("mallory", "ticket-9", 5, 1e30, hexadecimal(5), "norm")
    return replace(record, excluded=(left_out,), bound=NormBound(30.0, 2.0, 4.0, 60.0, 1e5))


def test_what_was_excluded_is_in_the_record_of_its_round_and_in_no_other() -> None:
    plain = chain(1)[0]
    assert not {"excluded", "bound", "rolled_back_to"} & json.loads(plain.to_json()).keys()
    record = screened(plain)
    assert '"bound":{"factor":30.0,"largest":100000.0,"limit":60.0,"reference":2.0,"steps":4.0}' in record.to_json()
    assert '"format":2' in record.to_json()
    assert parse(record.to_json()) == record
    assert passes([record])


def test_what_cannot_have_been_excluded() -> None:
    record = screened(chain(1)[0])
    (left_out,) = record.excluded
    faults = {
        "both folded and excluded": replace(record, excluded=(replace(left_out, client="client-0"),)),
        "for a norm within the limit": replace(record, excluded=(replace(left_out, norm=59.0),)),
        "its clients are not sorted": replace(record, excluded=(left_out, left_out)),
        "a digest has not 64": replace(record, excluded=(replace(left_out, sha256="0"),)),
    }
    for message, wrong in faults.items():
        with pytest.raises(BlobCorrupt, match=message):
            verify_chain(texts([wrong]))
