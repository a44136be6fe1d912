"""Sessions, links and pages: those of one viewer take the place of its own, and never of an operator's."""

from __future__ import annotations

from contextlib import ExitStack

from fedpeft_operator.console.session_store import (
    MOST_GUESTS,
    MOST_KEYS,
    MOST_PAGES,
    MOST_PAGES_OF_A_VIEWER,
    MOST_SESSIONS,
    Doorkeeper,
    Session,
)


def let_in(door: Doorkeeper, *, may_write: bool, maker: Session | None = None) -> Session:
    session = door.enter(door.new_key(may_write=may_write, maker=maker))
    assert session is not None
    return session


def is_open(door: Doorkeeper, session: Session) -> bool:
    return door.session(session.id) is session


def test_a_viewers_links_and_their_sessions_take_nobodys_place_but_its_own() -> None:
    door = Doorkeeper(may_write=True)
    operator = let_in(door, may_write=True)
    greedy, modest = (let_in(door, may_write=False, maker=operator) for _ in range(2))
    waiting = door.new_key(may_write=True)
    guests = [let_in(door, may_write=False, maker=greedy) for _ in range(4 * MOST_SESSIONS)]
    assert all(is_open(door, each) for each in (operator, greedy, modest))
    assert [each for each in guests if is_open(door, each)] == guests[-MOST_GUESTS:]
    for _ in range(4 * MOST_KEYS):
        door.new_key(may_write=False, maker=greedy)
    assert door.enter(waiting) is not None, "an operator's link waits all the same"


def test_whom_a_viewer_let_in_is_of_its_line_however_far() -> None:
    door = Doorkeeper(may_write=True)
    viewer = let_in(door, may_write=False)
    last = viewer
    for _ in range(3 * MOST_GUESTS):
        last = let_in(door, may_write=False, maker=last)
        assert last.line == viewer.id
    assert is_open(door, viewer) and len(door._sessions) == 1 + MOST_GUESTS


def test_a_viewer_makes_no_link_that_steers() -> None:
    door = Doorkeeper(may_write=True)
    viewer = let_in(door, may_write=False)
    assert not let_in(door, may_write=True, maker=viewer).may_write


def test_viewers_and_operators_each_have_so_many_sessions() -> None:
    door = Doorkeeper(may_write=True)
    operators = [let_in(door, may_write=True) for _ in range(MOST_SESSIONS + 1)]
    viewers = [let_in(door, may_write=False) for _ in range(MOST_SESSIONS + 1)]
    for kind in (operators, viewers):
        assert [each for each in kind if is_open(door, each)] == kind[1:]


def test_a_viewers_pages_keep_no_operator_from_opening_one() -> None:
    door = Doorkeeper(may_write=True)
    operator, viewers = let_in(door, may_write=True), [let_in(door, may_write=False) for _ in range(5)]
    with ExitStack() as stack:
        for viewer in viewers[:4]:
            for _ in range(MOST_PAGES_OF_A_VIEWER):
                assert door.may_open(viewer)
                stack.enter_context(door.page_open(viewer))
            assert not door.may_open(viewer)
        assert MOST_PAGES == 4 * MOST_PAGES_OF_A_VIEWER and not door.may_open(viewers[4])
        for _ in range(MOST_PAGES):
            assert door.may_open(operator)
            stack.enter_context(door.page_open(operator))
        assert not door.may_open(operator)
    assert door.may_open(viewers[0]) and door.may_open(operator) and not door._pages


def test_a_link_is_used_once() -> None:
    door = Doorkeeper(may_write=True)
    key = door.new_key(may_write=True)
    assert door.enter(key) is not None and door.enter(key) is None
