"""Sessions, links and pages: those of one viewer take the place of its own, and never of an operator's."""

from __future__ import annotations

from contextlib import ExitStack

from fedpeft_operator.console.session_store import (
    MOST_GUESTS,
    MOST_KEYS,
    MOST_PAGES,
    MOST_PAGES_OF_A_VIEWER,
    MOST_SESSIONS,
    Session,
    SessionStore,
)


def let_in(sessions: SessionStore, *, may_write: bool, maker: Session | None = None) -> Session:
    session = sessions.redeem(sessions.new_key(may_write=may_write, maker=maker))
    assert session is not None
    return session


def is_open(sessions: SessionStore, session: Session) -> bool:
    return sessions.get(session.id) is session


def test_a_viewers_links_and_their_sessions_take_nobodys_place_but_its_own() -> None:
    sessions = SessionStore(may_write=True)
    operator = let_in(sessions, may_write=True)
    greedy, modest = (let_in(sessions, may_write=False, maker=operator) for _ in range(2))
    waiting = sessions.new_key(may_write=True)
    guests = [let_in(sessions, may_write=False, maker=greedy) for _ in range(4 * MOST_SESSIONS)]
    assert all(is_open(sessions, each) for each in (operator, greedy, modest))
    assert [each for each in guests if is_open(sessions, each)] == guests[-MOST_GUESTS:]
    for _ in range(4 * MOST_KEYS):
        sessions.new_key(may_write=False, maker=greedy)
    assert sessions.redeem(waiting) is not None, "an operator's link waits all the same"


def test_a_session_from_a_viewers_link_counts_against_that_viewer_however_far() -> None:
    sessions = SessionStore(may_write=True)
    viewer = let_in(sessions, may_write=False)
    last = viewer
    for _ in range(3 * MOST_GUESTS):
        last = let_in(sessions, may_write=False, maker=last)
        assert last.viewer == viewer.id
    assert is_open(sessions, viewer) and len(sessions._sessions) == 1 + MOST_GUESTS


def test_a_viewer_makes_no_link_that_steers() -> None:
    sessions = SessionStore(may_write=True)
    viewer = let_in(sessions, may_write=False)
    assert not let_in(sessions, may_write=True, maker=viewer).may_write


def test_viewers_and_operators_each_have_so_many_sessions() -> None:
    sessions = SessionStore(may_write=True)
    operators = [let_in(sessions, may_write=True) for _ in range(MOST_SESSIONS + 1)]
    viewers = [let_in(sessions, may_write=False) for _ in range(MOST_SESSIONS + 1)]
    for kind in (operators, viewers):
        assert [each for each in kind if is_open(sessions, each)] == kind[1:]


def test_a_viewers_pages_keep_no_operator_from_opening_one() -> None:
    sessions = SessionStore(may_write=True)
    operator, viewers = let_in(sessions, may_write=True), [let_in(sessions, may_write=False) for _ in range(5)]
    with ExitStack() as stack:
        for viewer in viewers[:4]:
            for _ in range(MOST_PAGES_OF_A_VIEWER):
                assert sessions.may_open(viewer)
                stack.enter_context(sessions.page_open(viewer))
            assert not sessions.may_open(viewer)
        assert MOST_PAGES == 4 * MOST_PAGES_OF_A_VIEWER and not sessions.may_open(viewers[4])
        for _ in range(MOST_PAGES):
            assert sessions.may_open(operator)
            stack.enter_context(sessions.page_open(operator))
        assert not sessions.may_open(operator)
    assert sessions.may_open(viewers[0]) and sessions.may_open(operator) and not sessions._pages


def test_a_link_is_used_once() -> None:
    sessions = SessionStore(may_write=True)
    key = sessions.new_key(may_write=True)
    assert sessions.redeem(key) is not None and sessions.redeem(key) is None
