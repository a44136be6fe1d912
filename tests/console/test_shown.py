"""Contents of the pages, as functions of rounds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from fedpeft.api.following import RunSnapshot
from fedpeft.rpc import wire
from fedpeft.v1 import operator_service_pb2 as op
from fedpeft.v1 import run_pb2
from fedpeft_operator.console.examples import EXAMPLES
from fedpeft_operator.console.feeds.disks import disk_facts
from fedpeft_operator.console.feeds.facts import Reader, RoundFacts, TicketFacts
from fedpeft_operator.console.pages.creation import excerpts
from fedpeft_operator.console.renderer import Renderer
from fedpeft_operator.console.run_file import RunFileInvalid, read
from fedpeft_operator.console.shown.captions import captions
from fedpeft_operator.console.shown.client import Followed, chart, history, remarks, tiles
from fedpeft_operator.console.shown.configuration import MOST_LINES, configuration, whole
from fedpeft_operator.console.shown.members import members
from fedpeft_operator.console.shown.outliers import norms, times
from fedpeft_operator.console.shown.overview import card
from fedpeft_operator.console.shown.overview import tiles as overview_tiles
from fedpeft_operator.console.shown.pagination import paginate
from fedpeft_operator.console.shown.run import Tile, head, stage
from fedpeft_operator.console.shown.run import tiles as run_tiles
from fedpeft_operator.console.shown.series import MOST_NORMS, MOST_POINTS, series, thinned
from fedpeft_operator.console.shown.sparkline import sparkline

from ..operator.operator_double import a_round, a_run

GOOD = '[model]\nname = "vit"\nclasses = ["a", "b"]\n[peft]\nmethod = "bias"\n'


def ticket(client: str, norm: float = 1.0, state: str = "received", **changes: Any) -> TicketFacts:
    received = state == "received"
    fields: dict[str, Any] = {
        "reason": "",
        "examples": 100 if received else 0,
        "weight": 0.25 if received else 0.0,
        "norm": norm if received else 0.0,
        "loss": 1.0 if received else None,
        "up": 1000 if received else 0,
        "down": 2000,
    }
    return TicketFacts(client=client, state=state, **{**fields, **changes})


def round_(number: int, tickets: Sequence[TicketFacts], **changes: Any) -> RoundFacts:
    fields: dict[str, Any] = {
        "phase": "committed",
        "opened_at": "2026-01-01T00:00:00.000Z",
        "deadline": None,
        "committed_at": "2026-01-01T00:00:05.000Z",
        "seconds": 5.0,
        "extensions": 0,
        "metrics": {"train_loss": 2.0 / number, "accuracy": number / (number + 9)},
        "up": sum(t.up for t in tickets),
        "down": sum(t.down for t in tickets),
        "payload_up": 900,
        "payload_down": 1900,
        "full": 4_000_000,
        "record_sha256": "ab" * 32,
    }
    return RoundFacts(number=number, tickets=tuple(tickets), **{**fields, **changes})


def usual(number: int, **norms_: float) -> RoundFacts:
    return round_(number, [ticket(name, norms_.get(name, 1.0)) for name in ("a", "b", "c", "d")])


def test_a_ticket_says_how_many_versions_its_client_is_behind() -> None:
    assert (ticket("a").words, ticket("a", staleness=2).words) == ("a", "a (2 versions behind)")


def test_a_round_of_updates_of_several_versions_says_what_it_has_and_how_far_behind_others_are() -> None:
    run, now = a_run(version=2), a_round(3, committed=False)
    run.config.rounds.policy = "buffered"
    now.tickets[0].base_version, now.tickets[1].base_version = 2, 0
    snapshot = RunSnapshot(run, {3: now})
    shown = stage(snapshot, Reader().rounds(snapshot))
    assert shown is not None
    waits = "waiting for twemoji (2 versions behind)"
    assert shown.sentence == f"1 of the 2 updates of this version received; {waits}."
    now.phase = run_pb2.ROUND_PHASE_AGGREGATING
    shown = stage(snapshot, Reader().rounds(snapshot))
    assert shown is not None and shown.sentence.endswith("later ones count in the next version.")


def test_a_norm_stands_out_beside_the_median_of_its_round() -> None:
    found = {(n.round, n.client): n for n in norms([usual(1), usual(2, d=3.0), usual(3, d=2.9), usual(4, a=0.3)])}
    assert [key for key, norm in found.items() if norm.is_odd] == [(2, "d"), (4, "a")]
    assert found[2, "d"].ratio == 3.0


def test_a_round_of_two_is_compared_with_the_rounds_before() -> None:
    pair = round_(2, [ticket("a", 1.0), ticket("b", 5.0)])
    assert [(n.client, n.is_odd) for n in norms([usual(1), pair]) if n.round == 2] == [("a", False), ("b", True)]
    assert [n.ratio for n in norms([pair])] == [None, None]


def test_norms_of_nothing_are_not_divided_by() -> None:
    flat = round_(1, [ticket(name, 0.0) for name in "abc"])
    assert [n.ratio for n in norms([flat])] == [None, None, None]
    assert [times(ratio) for ratio in (4.21, 0.2, 0.0)] == ["4.2 times", "1/5 of", "less than 1/1000 of"]


def test_members_with_remarks_come_first() -> None:
    late = round_(3, [*usual(3).tickets[:2], ticket("c", state="late"), ticket("d", state="refused", reason="too big")])
    found = members([usual(1), usual(2, d=9.0), late])
    assert [member.client for member in found] == ["d", "a", "b", "c"]
    assert found[0].remarks == ("update norm 9.0 times the median in round 2", "refused in round 3: too big")
    assert (found[0].sampled, found[0].counted, found[0].missed) == (3, 2, 1)
    assert found[3].remarks == ()  # late once in three


def test_a_client_of_few_examples_or_of_a_high_loss_is_remarked() -> None:
    tickets = [ticket("a", examples=5), ticket("b", loss=4.0), ticket("c"), ticket("d", state="late")]
    found = {member.client: member.remarks for member in members([round_(1, tickets)])}
    assert found["a"] == ("trains on 5 examples (median 100)",)
    assert found["b"] == ("training loss 4.000 (median 1.000)",)
    assert found["c"] == ()
    assert found["d"] == ("late in round 1",)


def test_what_was_long_ago_is_not_remarked() -> None:
    rounds = [usual(1, d=9.0), *(usual(number) for number in range(2, 30))]
    assert not any(member.remarks for member in members(rounds))


def test_a_thousand_rounds_are_thinned_and_keep_their_extremes() -> None:
    points = [(number, 1.0) for number in range(1, 1001)]
    points[499] = (500, 9.0)
    kept = thinned(points)
    assert len(kept) <= MOST_POINTS + 2
    assert {points[0], (500, 9.0), points[-1]} <= set(kept)
    drawn = series([usual(number, d=9.0 if number == 77 else 1.0) for number in range(1, 1001)], {"accuracy": 0.1})
    assert drawn["accuracy"]["x"][0] == 0
    assert len(drawn["norms"]["usual"]) <= MOST_NORMS
    assert drawn["norms"]["apart"] == [[77, 9.0, "d", 9.0]]


def test_a_round_that_was_not_scored_has_no_point() -> None:
    rounds = [usual(1), round_(2, usual(2).tickets, metrics={"train_loss": 1.0}), usual(3)]
    drawn = series(rounds, {})
    assert drawn["accuracy"] == {"x": [1, 3], "accuracy": [0.1, 0.25]}
    assert drawn["loss"]["x"] == [1, 2, 3]
    assert drawn["loss"]["loss"] == [None, None, None]


def test_accuracy_is_drawn_against_all_that_was_sent_until_then() -> None:
    unscored = round_(2, usual(2).tickets, metrics={"train_loss": 1.0})
    drawn = series([usual(1), unscored, usual(3)], {"accuracy": 0.05})
    assert drawn["spent"] == {"x": [0, 12_000, 36_000], "accuracy": [0.05, 0.1, 0.25]}
    assert series([unscored], {})["spent"] == {"x": [], "accuracy": []}
    long = series([usual(number) for number in range(1, 1001)], {})["spent"]
    assert len(long["x"]) <= MOST_POINTS + 2 and long["x"][-1] == 12_000_000


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_a_run_file(name: str) -> None:
    config = read(EXAMPLES[name].text)
    assert (config.peft.method == name) == (name != "trial")


def test_the_configuration_of_a_run_is_a_run_file_again() -> None:
    run = a_run()
    found = configuration(run)
    assert read(found.text) == wire.config_from_proto(run.config)
    assert (found.hidden, found.problem) == (0, "")
    run.config.codec.up = "of a later version"
    assert configuration(run).problem.startswith("the configuration cannot be shown by this version: ")


def test_a_configuration_of_many_classes_is_cut_on_the_page_and_whole_for_a_new_run() -> None:
    run = a_run()
    run.config.model.classes[:] = [f"class {number}" for number in range(5000)]
    found = configuration(run)
    assert len(found.text.splitlines()) == MOST_LINES and found.hidden > 4000
    assert read(whole(run)).model.classes[-1] == "class 4999"


def test_charts_are_said_in_words() -> None:
    said = captions([usual(1), usual(2, d=9.0)], {"accuracy": 0.05})
    assert said["accuracy"] == "From 5.0 % (version 0) to 18.2 % (version 2)."
    assert said["loss"] == "Training loss from 2.000 to 1.000, in nats."
    assert said["bytes"].startswith("Round 2: 3.9 KiB up (above the line), 7.8 KiB down (below it); full fine-tuning")
    assert said["spent"] == "18.2 % after 23.4 KiB in both directions. Full fine-tuning would have sent 15.26 MiB."
    worse = [usual(1), round_(2, usual(2).tickets, metrics={"accuracy": 0.05})]
    assert captions(worse, {})["spent"].startswith(
        "5.0 % after 23.4 KiB in both directions; the best, 10.0 %, after 11.7 KiB"
    )
    assert captions([], {"accuracy": 0.1})["spent"] == "No version has been scored since a round was committed."
    assert said["norms"] == "8 updates; outliers: d (1, 9.0 times the median)."
    assert captions([], {})["norms"] == "No update has been received yet."


def test_a_sparkline_runs_from_edge_to_edge() -> None:
    line = sparkline([(0, 0.1), (5, 0.2), (10, 0.3)])
    assert line is not None
    assert line.points == "3.0,29.0 60.0,16.0 117.0,3.0"
    assert sparkline([(1, 0.5)]) is None
    flat = sparkline([(1, 0.5), (2, 0.5)])
    assert flat is not None
    assert flat.end_y == 29.0


@pytest.mark.parametrize(("number", "items"), [(0, [0, 1, 2]), (1, [0, 1, 2]), (3, [6]), (9, [6])])
def test_pages(number: int, items: list[int]) -> None:
    found = paginate(range(7), number, 3)
    assert list(found.items) == items
    assert (found.last, found.total) == (3, 7)
    assert paginate([], 1, 3).last == 1


def test_the_history_of_a_client() -> None:
    new = Followed("run-2", "second", [usual(1), usual(2, a=9.0)])
    old = Followed("run-1", "first", [round_(1, [ticket("a", state="refused"), ticket("b")])])
    entries = history("a", [new, old])
    assert [(e.run, e.round, e.is_odd) for e in entries] == [
        ("run-2", 2, True),
        ("run-2", 1, False),
        ("run-1", 1, False),
    ]
    assert [tile.value for tile in tiles(entries)] == ["3", "2", "2.0 KiB", "1"]
    assert [remark for _, remark in remarks("a", [new])] == ["update norm 9.0 times the median in round 2"]
    drawn = chart("a", [old, new])
    assert drawn is not None
    assert drawn[0] is new
    assert len(drawn[1]["apart"]) == 2
    assert chart("z", [old, new]) is None


def test_the_disks_of_a_server() -> None:
    disks = [
        op.Disk(place="data", folder="/data", size_bytes=4 * 2**30, free_bytes=2**30, spared_bytes=2**28),
        op.Disk(place="blobs", folder="/blobs", size_bytes=2**30, free_bytes=2**20, spared_bytes=2**26),
    ]
    stored = {"blobs": 2**29, "spool": 2**20, "database": 2**20}
    told = overview_tiles([], {}, disk_facts(op.GetStorageResponse(disks=disks, stored_bytes=stored)))[4:]
    full = "512.00 MiB in use by the server; uploads are refused, for 64.00 MiB are kept for the server itself"
    assert told == [
        Tile("Disk", "1.00 GiB free", "of 4.00 GiB; 2.00 MiB in use by the server"),
        Tile("Disk of blobs", "1.00 MiB free", f"of 1.00 GiB; {full}"),
    ]
    (fresh,) = disk_facts(op.GetStorageResponse(disks=disks[:1]))
    assert overview_tiles([], {}, [fresh])[4].beside == "of 4.00 GiB", "nothing is measured yet"


@pytest.mark.parametrize(
    ("text", "line", "field"),
    [
        (GOOD.replace('"bias"', '"bias"\nrank = [1]').replace("[peft]", "[peft"), 4, ""),
        (GOOD + "[rounds]\n\ncount = 0\n", 8, "rounds.count"),
        (GOOD + "[round]\n", 6, "round"),
        ('[peft]\nmethod = "bias"\n', 1, "model"),
    ],
)
def test_faults_of_a_run_file_have_lines(text: str, line: int, field: str) -> None:
    with pytest.raises(RunFileInvalid) as caught:
        read(text)
    assert (caught.value.faults[0].line, caught.value.faults[0].field) == (line, field)


def test_the_lines_around_a_fault() -> None:
    text = "\n".join("abcdefghij")
    assert excerpts(text, {1, 8}) == [[(1, "a"), (2, "b"), (3, "c")], [(n, "abcdefghij"[n - 1]) for n in range(6, 11)]]
    assert excerpts(text, {0}) == []


def test_a_run_file_that_is_right() -> None:
    assert read(GOOD).peft.method == "bias"


def test_a_run_without_classes_is_scored_by_its_loss() -> None:
    rounds = [round_(number, [ticket("a")], metrics={"train_loss": 2.0, "loss": 1.0 / number}) for number in (1, 2)]
    run = a_run(version=2, initial_metrics={"loss": 1.5})
    shown = card(run, None, rounds)
    assert (shown.score, shown.scored_by) == ("0.500", "loss")
    assert shown.line is not None
    assert run_tiles(RunSnapshot(run), rounds)[1] == Tile("Loss", "0.500", "on held-out data, version 2")
    assert captions(rounds, {"loss": 1.5})["accuracy"] == "Versions are scored by loss only."
    unscored = card(a_run(), None, [])
    assert (unscored.score, unscored.scored_by) == ("", "")


def test_a_run_of_an_edge_says_that_it_waits_for_the_last_version() -> None:
    run = a_run(version=2, reason="run-0 waits for the last version of the parent's server")
    snapshot = RunSnapshot(run, {3: a_round(3)})
    now = stage(snapshot, [round_(3, [ticket("a")])])
    assert now is None
    page = Renderer("127.0.0.1:7070", False).fragment("run/stage.html", stage=now, head=head(run), declines=[])
    assert "waits for the last version of the parent&#39;s server" in page
    assert card(run, snapshot, []).sentence == run.reason
