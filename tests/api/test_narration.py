"""A watch says once that a round is committed, and that a client hangs, in which way, and that it goes on."""

from __future__ import annotations

from fedpeft.api.following import RunSnapshot
from fedpeft.api.narration import Narrator
from fedpeft.api.round_parts import folded
from fedpeft.v1 import run_pb2

from ..operator.operator_double import a_round, a_run

SILENT, STALLED = run_pb2.PROGRESS_STATE_SILENT, run_pb2.PROGRESS_STATE_STALLED
TRAINING, SLOW = run_pb2.PROGRESS_STATE_TRAINING, run_pb2.PROGRESS_STATE_SLOW


def seen(state: run_pb2.ProgressState.ValueType | None, words: str = "") -> RunSnapshot:
    run = a_run()
    if state is not None:
        run.awaited.add(client="twemoji", state=state, description=words)
    return RunSnapshot(run, {1: a_round(1, committed=False)})


def test_each_way_of_hanging_is_said_once_and_the_end_of_it() -> None:
    narrator = Narrator()
    narrator.lines(seen(TRAINING, "training, step 1 of 8, 1 s ago"))
    said = [
        narrator.lines(seen(state, words))
        for state, words in (
            (TRAINING, "training, step 2 of 8, 1 s ago"),
            (STALLED, "step 2 of 8 for 46 s"),
            (STALLED, "step 2 of 8 for 60 s"),
            (SILENT, "no word for 45 s, last at step 2 of 8"),
            (TRAINING, "training, step 3 of 8, 0 s ago"),
            (SLOW, "slower than usual: 95 s, usually 40 s, step 4 of 8"),
            (None, ""),
        )
    ]
    assert said == [
        [],
        ["round 1: twemoji: step 2 of 8 for 46 s"],
        [],
        ["round 1: twemoji: no word for 45 s, last at step 2 of 8"],
        ["round 1: twemoji goes on"],
        ["round 1: twemoji: slower than usual: 95 s, usually 40 s, step 4 of 8"],
        [],
    ]


def test_a_committed_round_is_said_once_though_its_bytes_grow_afterwards() -> None:
    narrator, run, round_ = Narrator(), a_run(), a_round(1)
    first = narrator.lines(RunSnapshot(run, {1: round_}, changed=frozenset({1})))
    later = a_round(1)
    later.wire_bytes_up += 4096
    assert sum("round 1 committed" in line for line in first) == 1
    assert narrator.lines(RunSnapshot(run, {1: later}, changed=frozenset({1}))) == []


def test_rounds_of_updates_of_several_versions_say_how_far_behind_they_are() -> None:
    run, done, now = a_run(), a_round(2), a_round(3, committed=False)
    run.config.rounds.policy = "buffered"
    for ticket, base in ((done.tickets[0], 0), (done.tickets[1], 1), (now.tickets[0], 2), (now.tickets[1], 0)):
        ticket.base_version = base
    run.version = 2
    lines = Narrator().lines(RunSnapshot(run, {2: done, 3: now}, changed=frozenset({2})))
    assert lines[0].endswith("3 rounds of 2 updates")
    assert "round 2 committed in 4.5 s: 2 clients (1 of them up to 1 version behind), up 600 B" in lines[1]
    assert "round 3 open: 1 update of 2 received, awaited: twemoji (from version 0)" in lines


def test_a_ticket_that_outlives_its_round_is_in_the_round_after_it() -> None:
    """A watcher that was told of it while the round was open."""
    before, after = a_round(1, committed=False), a_round(1)
    del after.tickets[1:]
    known = folded(folded({}, [before]), [after])
    assert [ticket.client for ticket in known[1].tickets] == ["noto"]


def test_the_wait_of_an_edge_for_the_last_version_is_said_once() -> None:
    reason = "run-0 waits for the last version of the parent's server"
    narrator, run = Narrator(), a_run(version=2, reason=reason)
    snapshot = RunSnapshot(run, {3: a_round(3)}, changed=frozenset({3}))
    assert narrator.lines(snapshot)[-1] == reason
    assert narrator.lines(snapshot) == []


def test_a_ticket_that_was_given_back_is_said_once_with_its_reason() -> None:
    narrator, round_ = Narrator(), a_round(1, committed=False)
    round_.tickets[1].state, round_.tickets[1].reason = run_pb2.TICKET_STATE_WITHDRAWN, "DISK_FULL: no room; make some"
    snapshot = RunSnapshot(a_run(), {1: round_})
    assert narrator.lines(snapshot)[-1] == "round 1: the ticket of twemoji was withdrawn: DISK_FULL: no room; make some"
    assert narrator.lines(snapshot) == []
    round_.tickets[1].reason = "TRAINING_FAILED: the loss is not finite"
    assert len(narrator.lines(snapshot)) == 1
