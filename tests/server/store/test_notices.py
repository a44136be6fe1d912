"""Notices: texts that PostgreSQL takes, and texts of others that are none."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft_server.store.notices.notices import Notice, Topic

SENDER = "0" * 12


@given(st.lists(st.tuples(st.text(max_size=64), st.text(max_size=64), st.lists(st.text(max_size=9000), max_size=3))))
def test_each_text_is_one_that_postgresql_takes_and_only_keys_that_are_too_long_are_missing(
    keys: list[tuple[str, str, list[str]]],
) -> None:
    seats = [(client, run, tuple(left_out)) for client, run, left_out in keys]
    texts = list(Notice(SENDER, Topic.SEATS, tuple(seats)).payloads())
    assert texts and all(len(text.encode()) < 8000 for text in texts)
    told = [key for text in texts if (notice := Notice.parse(text)) for key in notice.keys]
    short = [seat for seat in seats if len(json.dumps(seat)) < 7800]
    assert [seat for seat in told if seat in short] == short
    assert all(seat in seats for seat in told)


@pytest.mark.parametrize(
    "text",
    [
        "hello",
        "[" * 5000,
        '{"a":1}',
        '["x","alive"]',
        '[1,"alive",[]]',
        '["x","news",[]]',
        '["x","progress",[1]]',
        '["x","progress",[["t",1]]]',
        '["x","progress",[["t",1,2,-3,4]]]',
        '["x","seats",[[]]]',
        '["x","seats",[["c","r",5]]]',
        '["x","seats",[["c","r"]]]',
        '["x","identity",[["king","n"]]]',
        '["x","scored",[["run","one","e","test"]]]',
        '["x","answer",[["run"]]]',
        '["x","bye",["y"]]',
        '["x","setup",[["place","ab","--blobs s3://bucket","now"]]]',
    ],
)
def test_a_text_of_another_form_is_no_notice(text: str) -> None:
    assert Notice.parse(text) is None


def test_every_topic_is_read_as_it_was_written() -> None:
    keys = {
        Topic.ANSWER: ("run", "client"),
        Topic.IDENTITY: ("client", "name"),
        Topic.SCORED: ("run", 3, "judge", "test"),
        Topic.REMOVED: ("run", 3),
        Topic.PROGRESS: ("ticket", 1, 2, 3, 4),
        Topic.SEATS: ("client", "", ("run",)),
        Topic.SETUP: ("place", "ab", "--blobs s3://bucket", 1.5),
    }
    for topic in Topic:
        of_it = () if topic in (Topic.ALL_SEATS, Topic.BYE) else (keys.get(topic, "name"),)
        notice = Notice(SENDER, topic, of_it)
        assert [Notice.parse(text) for text in notice.payloads()] == [notice]
