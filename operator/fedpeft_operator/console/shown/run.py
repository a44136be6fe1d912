"""Contents of a run's page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedpeft import formatting
from fedpeft.api import views
from fedpeft.api.following import RunSnapshot
from fedpeft.api.narration import names
from fedpeft.v1 import run_pb2
from fedpeft_operator.console.feeds.facts import RoundFacts, TicketFacts
from fedpeft_operator.console.sentences import sentence

PHASES = (("waiting", "Waiting"), ("open", "Training"), ("aggregating", "Aggregating"), ("committed", "Committed"))
MOST_TICKETS = 20
"""Tickets of the round in progress that are listed; those that want a look come first."""
MOST_DECLINES = 20
MOST_AWAITED = 8
"""Awaited clients of which it is shown how far they are."""
_URGENCY = {"refused": 0, "excluded": 0, "late": 1, "issued": 2, "withdrawn": 3, "received": 4}
_COUNTED = (
    ("received", "received"),
    ("issued", "awaited"),
    ("late", "late"),
    ("refused", "refused"),
    ("excluded", "excluded"),
    ("withdrawn", "withdrawn"),
)
MOST_VERSIONS = 200
"""Earlier versions that are suggested for a rollback, the newest; every other may be typed."""


@dataclass(frozen=True, slots=True)
class Head:
    """Heading of a run's page.

    Attributes:
        id: Of the run.
        name: Its label.
        state: running, paused, completed or stopped.
        reason: Reason for which it is paused or waits.
        method: PEFT method.
        model: timm's name.
        tuned: Parameters of an adapter version.
        share: `tuned` over those of the model, as per cent.
        version: Newest adapter version.
        rounds: Rounds of the run.
        clients: Wanted in a round.
        created_at: ISO 8601.
        can: Actions that an operator may take now.
    """

    id: str
    name: str
    state: str
    reason: str
    method: str
    model: str
    tuned: int
    share: str
    version: int
    rounds: int
    clients: int
    created_at: str | None
    can: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Tile:
    """A figure with its name, and a few words beside it."""

    label: str
    value: str
    beside: str = ""


@dataclass(frozen=True, slots=True)
class Stage:
    """The round in progress.

    Attributes:
        number: Of the round.
        phase: Phase of the state machine.
        steps: Every phase as (name, `done`, `now` or `todo`).
        sentence: Event that is waited for.
        deadline: ISO 8601; None if nobody was asked yet.
        extensions: Deadlines missed.
        received: Updates that count.
        goal: Updates wanted.
        quorum: Fewest it commits with at its deadline.
        said: Number of tickets in each state.
        tickets: Those listed.
        hidden: Tickets beyond them.
    """

    number: int
    phase: str
    steps: tuple[tuple[str, str], ...]
    sentence: str
    deadline: str | None
    extensions: int
    received: int
    goal: int
    quorum: int
    said: str
    tickets: tuple[TicketFacts, ...]
    hidden: int


def head(run: run_pb2.Run) -> Head:
    """Returns the head of a run's page."""
    state, tuned = views.state(run), views.adapter_parameters(run.spec)
    can: tuple[str, ...] = {"running": ("pause", "stop"), "paused": ("resume", "stop")}.get(state, ())
    if can and run.version:
        can = (*can, "rollback")
    return Head(
        id=run.id,
        name=run.config.name or run.id,
        state=state,
        reason=run.reason,
        method=run.spec.method,
        model=run.config.model.name,
        tuned=tuned,
        share=f"{100 * tuned / run.model_parameters:.2f} %" if run.model_parameters else "",
        version=run.version,
        rounds=run.config.rounds.count,
        clients=run.config.rounds.clients,
        created_at=views.moment(run.created_at),
        can=can,
    )


def stage(snapshot: RunSnapshot, rounds: Sequence[RoundFacts]) -> Stage | None:
    """Returns the round in progress, or None if the run is over."""
    current = snapshot.current
    if current is None:
        return None
    facts = next(facts for facts in reversed(rounds) if facts.number == current.number)
    config = snapshot.run.config.rounds
    places = [name for name, _ in PHASES]
    at = places.index(facts.phase)
    steps = tuple(
        (label, "done" if place < at else "now" if place == at else "todo") for place, (_, label) in enumerate(PHASES)
    )
    listed = sorted(facts.tickets, key=lambda ticket: (_URGENCY.get(ticket.state, 9), ticket.client))
    counts = [f"{len(facts.of(state)):,} {label}" for state, label in _COUNTED if facts.of(state)]
    return Stage(
        number=facts.number,
        phase=facts.phase,
        steps=steps,
        sentence=_sentence(facts, snapshot.run),
        deadline=facts.deadline,
        extensions=facts.extensions,
        received=len(facts.of("received")),
        goal=config.clients,
        quorum=views.quorum(config),
        said=", ".join(counts),
        tickets=tuple(listed[:MOST_TICKETS]),
        hidden=max(0, len(listed) - MOST_TICKETS),
    )


def tiles(snapshot: RunSnapshot, rounds: Sequence[RoundFacts]) -> list[Tile]:
    """Returns the figures of a run that matter most."""
    committed = [facts for facts in rounds if facts.is_committed]
    run = snapshot.run
    return [
        Tile(
            "Rounds",
            f"{run.version} of {run.config.rounds.count}",
            _lasted(committed),
        ),
        _score(committed, run.initial_metrics),
        *_bytes(committed),
        *_privacy(run, committed),
    ]


def versions(run: run_pb2.Run, rounds: Sequence[RoundFacts]) -> list[tuple[int, str]]:
    """Returns the earlier versions that a rollback may go to, newest first, each with its score in words."""
    figures = {facts.number: facts.metrics for facts in rounds if facts.is_committed}
    numbers = range(run.version - 1, max(-1, run.version - 1 - MOST_VERSIONS), -1)
    return [(number, _scored(figures.get(number, {}) if number else run.initial_metrics)) for number in numbers]


def declines(run: run_pb2.Run) -> list[tuple[str, str, str | None]]:
    """Returns who does not take part, why, and when they said so."""
    return [(d.client, "; ".join(d.reasons), views.moment(d.at)) for d in run.declines[:MOST_DECLINES]]


def awaited(run: run_pb2.Run) -> list[tuple[str, str, bool]]:
    """Returns client, how far it is, and whether it is well, of those that the open round awaits; worst first."""
    return [(each.client, each.description, views.is_well(each)) for each in run.awaited[:MOST_AWAITED]]


def _sentence(facts: RoundFacts, run: run_pb2.Run) -> str:
    if run.state == run_pb2.RUN_STATE_PAUSED:
        return f"Paused: {run.reason}" if run.reason else "Paused; no new round opens until the run is resumed."
    if facts.phase == "waiting":
        words = run.reason.removeprefix(f"round {facts.number} of {run.id} ")  # the page has said both
        return sentence(words) if words else "Waiting for enough clients."
    if facts.phase == "aggregating":
        after = "later ones count in the next version" if views.is_buffered(run) else "no more are accepted"
        return f"The updates are being aggregated; {after}."
    awaited = [ticket.words for ticket in facts.of("issued")]
    if views.is_buffered(run):
        wanted = run.config.rounds.clients
        has = f"{len(facts.of('received'))} of the {formatting.counted(wanted, 'update')} of this version received"
        return f"{has}; waiting for {names(awaited)}." if awaited else f"{has}; waiting for clients."
    return f"Waiting for {names(awaited)}." if awaited else "All updates have been received."


def _scored(metrics: Mapping[str, float]) -> str:
    if "accuracy" in metrics:
        return f"accuracy {formatting.percent(metrics['accuracy'])}"
    return f"loss {metrics['loss']:.3f}" if "loss" in metrics else "not scored"


def _lasted(committed: Sequence[RoundFacts]) -> str:
    taken = [facts.seconds for facts in committed[-10:] if facts.seconds is not None]
    return f"{sum(taken) / len(taken):.1f} s per round recently" if taken else "none committed yet"


def _privacy(run: run_pb2.Run, committed: Sequence[RoundFacts]) -> list[Tile]:
    """Returns what of the privacy budget is spent, if the run adds noise."""
    stated = views.privacy(run, (facts.metrics for facts in committed))
    if stated is None:
        return []
    limit = "" if stated["target_epsilon"] is None else f"of {stated['target_epsilon']:g}, "
    beside = f"{limit}delta {stated['delta']:g}; unit: {stated['unit']} ({stated['relation']})"
    return [Tile("Epsilon spent", f"{stated['epsilon']:.3g}", beside)]


def _score(committed: Sequence[RoundFacts], first: Mapping[str, float]) -> Tile:
    initial = first.get("accuracy")
    scored = [facts for facts in committed if "accuracy" in facts.metrics]
    if scored:
        begun = "" if initial is None else f"from {formatting.percent(initial)}"
        best = max(scored, key=lambda facts: facts.metrics["accuracy"])
        last = scored[-1]
        where = f"version {last.number}" + (
            "" if best is last else f", best {formatting.percent(best.metrics['accuracy'])}"
        )
        return Tile("Accuracy", formatting.percent(last.metrics["accuracy"]), ", ".join(filter(None, (begun, where))))
    if initial is not None:
        return Tile("Accuracy", formatting.percent(initial), "version 0")
    losses = [(facts.number, facts.metrics["loss"]) for facts in committed if "loss" in facts.metrics]
    losses = [(0, first["loss"]), *losses] if "loss" in first else losses
    if losses:
        return Tile("Loss", f"{losses[-1][1]:.3f}", f"on held-out data, version {losses[-1][0]}")
    trained = [facts.metrics["train_loss"] for facts in committed if "train_loss" in facts.metrics]
    if trained:
        return Tile("Training loss", f"{trained[-1]:.3f}", "no version has been scored")
    return Tile("Accuracy", "-", "no version has been scored")


def _bytes(committed: Sequence[RoundFacts]) -> list[Tile]:
    up, down = sum(facts.up for facts in committed), sum(facts.down for facts in committed)
    full = sum(facts.full for facts in committed)
    sent = Tile("Sent up", formatting.size(up), f"down {formatting.size(down)}")
    if not full or not up:
        return [sent, Tile("Full fine-tuning", "-", "no update has been counted yet")]
    return [
        sent,
        Tile("Full fine-tuning", formatting.size(full), f"each way, {formatting.as_much(full / up)} as sent up"),
    ]
