"""From one adapter version to the next: a round's updates folded into files, its record, and its figures.

The daemon and the simulation both call this, which is why they give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

from fedpeft.adapters import adapter_file
from fedpeft.adapters.adapter_file import AdapterInfo, Written
from fedpeft.adapters.payload import Manifest, Tensors, squared_norm
from fedpeft.adapters.spec import AdapterSpec
from fedpeft.aggregation import Strategy, UpdateFacts, strategy
from fedpeft.config import RunConfig
from fedpeft.errors import Internal, UpdateExcluded
from fedpeft.privacy import accounting
from fedpeft.privacy.central import NoisedSum
from fedpeft.privacy.events import Event
from fedpeft.privacy.round_privacy import round_privacy_of
from fedpeft.privacy.statement import EPSILON
from fedpeft.process.mapped_files import releaser
from fedpeft.rounds.acceptance import norm_of
from fedpeft.rounds.folding.contributions import Contribution, Overflow
from fedpeft.rounds.folding.fold import State, fold_sums, fold_tensors
from fedpeft.rounds.metric_values import ROLLED_BACK_TO
from fedpeft.rounds.policies import policy_of
from fedpeft.rounds.record import Contributed, Excluded, Record, digest
from fedpeft.rounds.screening import FACTOR, Extent, NormBound, bound, local_steps, median


@dataclass(frozen=True, slots=True)
class RunHeader:
    """The facts of a run that all its versions share.

    Attributes:
        run: Id of the run.
        config: Its run file.
        spec: The tuned tensors.
        fingerprint: Of the frozen ones, hexadecimal.
    """

    run: str
    config: RunConfig
    spec: AdapterSpec
    fingerprint: str

    def info(self, version: int) -> AdapterInfo:
        """Returns what the file of a version says about itself."""
        model = self.config.model
        # Sorted, because options come in the order of a protobuf map, which is another one in every process.
        config = json.dumps(self.config.model_dump(mode="json", exclude_none=True), sort_keys=True)
        extra = {"name": self.config.name, "config": config}
        if self.spec.sections:
            extra[adapter_file.SECTIONS] = json.dumps([section.name for section in self.spec.sections])
        return AdapterInfo(self.run, version, self.spec.method, self.fingerprint, model.name, model.classes, extra)


@dataclass(frozen=True, slots=True)
class Stored:
    """A file with the digest it must have, hexadecimal."""

    path: Path
    sha256: str


@dataclass(frozen=True)
class Update:
    """A received update: `payload` holds the bytes that `manifest` describes; `metrics` are the client's figures.

    `measured` is its norm, if that was computed before; a fold then need not read the payload twice. `staleness` is the
    number of versions made since the one that it starts from.
    """

    ticket: str
    client: str
    examples: int
    metrics: Mapping[str, float]
    manifest: Manifest
    payload: memoryview
    measured: float | None = None
    staleness: int = 0

    @cached_property
    def norm(self) -> float:
        """The Euclidean norm of the decoded update; of a sum of several, that of their mean."""
        if self.measured is not None:
            return self.measured
        squared = squared_norm(self.manifest, self.payload, releaser(self.payload))
        return norm_of(self.manifest, squared, self.examples)


@dataclass(frozen=True, slots=True)
class Outcome:
    """Result of folding a round.

    Attributes:
        made: The file that it made: the next version's, or that of the sum.
        state_sha256: Digest of the strategy's state file; empty if it keeps none.
        weights: Share in the mean, by ticket; they sum to 1.
        record: Canonical JSON of the round's record.
        record_sha256: Its digest.
        metrics: `train_examples`, `train_loss` in nats, a mean by examples, and the strategy's figures; with noise also
            `privacy_epsilon`.
        excluded: By ticket, why an update was not folded, as its ticket says it.
        extent: Medians of what was folded; see `fedpeft.rounds.screening`.
        events: Events of the folded updates.
        overspent: Reason for which the next round must not be held; empty if it may be.
    """

    made: Written
    state_sha256: str
    weights: dict[str, float]
    record: str
    record_sha256: str
    metrics: dict[str, float]
    excluded: dict[str, str]
    extent: Extent
    events: tuple[Event, ...] = ()
    overspent: str = ""


class RoundEmptied(Exception):
    """None of a round's updates can be folded.

    Attributes:
        excluded: By ticket, why it was not, as its ticket says it.
    """

    def __init__(self, excluded: Mapping[str, str]) -> None:
        super().__init__("; ".join(excluded.values()))
        self.excluded = dict(excluded)


def _create(path: Path) -> BinaryIO:
    return path.open("wb")


def write_version(header: RunHeader, tensors: Tensors, path: Path, version: int = 0) -> Written:
    """Writes the file of a version that no round here made: the first one, or that of a parent's server."""
    with path.open("wb") as stream:
        return adapter_file.write_adapter(stream, header.info(version), header.spec.shared, tensors)


def fold_round(
    header: RunHeader,
    number: int,
    updates: Sequence[Update],
    base: Stored,
    state: Stored | None,
    previous: str,
    folder: Path,
    create: Callable[[Path], BinaryIO] = _create,
    past: Sequence[Extent] = (),
    *,
    screened: bool = True,
    ledger: Sequence[Event] = (),
    epsilon: float = 0.0,
) -> Outcome:
    """Folds round `number` into the files `adapter` and `state` of `folder`, tensor by tensor.

    Equal arguments give equal bytes, whatever the order of the updates; unless the server adds noise, which is drawn
    anew in every fold, and nowhere kept.

    Args:
        header: The run.
        number: Number of the round, and of the version it makes.
        updates: Received updates, checked.
        base: The version before, from which the updates started that are not stale.
        state: The strategy's state of that version, if it keeps any.
        previous: Digest of the record before; empty for round 1.
        folder: Target folder; both files are made, the state's empty of tensors if the strategy keeps none. Where a
            parent's server makes the versions, it is one file, `sum`: the payload of the sum that is sent there.
        create: Opens a new file for writing.
        past: Medians of the comparable rounds before; see `fedpeft.rounds.screening`.
        screened: True if updates are judged; False where a record says which were folded. With noise none is judged:
            that it was left out would say something of the others, and the bound does the work.
        ledger: Events of all rounds before, oldest first.
        epsilon: Figure of that name of the committed round before; 0 where it has none.

    Raises:
        BlobCorrupt: If `base` or `state` does not have its digest.
        RoundEmptied: If all updates are excluded.
        BudgetSpent: If the run may not publish another round.
        Internal: If there is no update.
    """
    if not updates:
        raise Internal(f"round {number} of {header.run} has nothing to fold")
    if why := accounting.overspent(header.config, ledger, number):
        raise accounting.BudgetSpent(why)
    updates = sorted(updates, key=lambda update: update.client)
    privacy, values = round_privacy_of(header.config), sum(tensor.size for tensor in header.spec.sent(number))
    judged = screened and privacy.judges
    verdict = _screen(header, updates, past, values) if judged else _Verdict(None, {}, {})
    noised = privacy.noised_sum(((u.client, u.norm) for u in updates), ledger, values)
    files = _Files(header, number, base, state, folder, create)
    folded = _fold(files, updates, verdict, clips=not judged, noised=noised)
    kept = folded.updates
    events = privacy.events(len(kept), (u.norm for u in kept), ledger)
    ledger = [*ledger, *events]
    record = _record(files, updates, folded, verdict, previous, events)
    spent = (u.metrics.get(EPSILON, 0.0) for u in kept)
    return Outcome(
        folded.made,
        folded.state_sha256,
        folded.shares,
        record,
        digest(record),
        folded.figures | _figures(kept) | privacy.figures(ledger, epsilon, spent),
        verdict.words,
        median(extents(header, kept)) if screened else Extent(0.0, 0.0),
        events,
        accounting.overspent(header.config, ledger, number + 1),
    )


def extents(header: RunHeader, updates: Iterable[Update]) -> list[Extent]:
    """Returns the extents of some updates of a run."""
    return [Extent(u.norm, local_steps(u.examples, header.config.training)) for u in updates]


def _facts(header: RunHeader, update: Update) -> UpdateFacts:
    """Returns the facts of an update that decide its weight."""
    training = header.config.training
    momentum = training.momentum if training.optimizer == "sgd" else 0.0
    return UpdateFacts(update.examples, local_steps(update.examples, training), momentum, update.staleness)


@dataclass(frozen=True, slots=True)
class _Verdict:
    """The updates of a round that are not folded, and why.

    Attributes:
        bound: The limit of the norms, if there is one.
        reasons: By ticket, `norm` or `overflow`.
        words: By ticket, the sentence that its client is told.
    """

    bound: NormBound | None
    reasons: dict[str, str]
    words: dict[str, str]

    def exclude(self, ticket: str, reason: str, why: str) -> None:
        """Leaves an update out."""
        self.reasons[ticket] = reason
        self.words[ticket] = f"{UpdateExcluded.reason}: {why}"


def _screen(header: RunHeader, updates: Sequence[Update], past: Sequence[Extent], values: int) -> _Verdict:
    """Judges updates of so many values by their norms."""
    given = header.config.aggregation.norm_factor
    known = extents(header, updates)
    limit = bound(known, past, values, FACTOR if given is None else given)
    verdict = _Verdict(limit, {}, {})
    for update, extent in zip(updates, known, strict=True):
        if limit is not None and (why := limit.against(extent)):
            verdict.exclude(update.ticket, "norm", why)
    return verdict


@dataclass(frozen=True, slots=True)
class _Files:
    """The files that a round is folded from and into; the arguments of `fold_round`."""

    header: RunHeader
    number: int
    base: Stored
    state: Stored | None
    folder: Path
    create: Callable[[Path], BinaryIO]

    @property
    def rule(self) -> Strategy:
        """The aggregation strategy."""
        return strategy(self.header.config.aggregation.strategy, self.header.config.aggregation.options)

    @property
    def makes_version(self) -> bool:
        """True if the round makes a version, and not a sum."""
        return policy_of(self.header.config.rounds).makes_versions


@dataclass(frozen=True, slots=True)
class _Folded:
    """The result of folding updates.

    Attributes:
        updates: Those that were folded.
        weights: By ticket.
        figures: Of the strategy.
        made: The adapter file, or that of the sum.
        state_sha256: Digest of the state file.
    """

    updates: list[Update]
    weights: dict[str, float]
    figures: dict[str, float]
    made: Written
    state_sha256: str

    @property
    def shares(self) -> dict[str, float]:
        """Share in the mean, by ticket."""
        total = sum(self.weights.values())
        return {ticket: weight / total for ticket, weight in self.weights.items()}


def _fold(
    files: _Files, updates: Sequence[Update], verdict: _Verdict, *, clips: bool, noised: NoisedSum | None
) -> _Folded:
    """Folds what is not excluded; what would leave the range of float32 is excluded on the way.

    Raises:
        RoundEmptied: If none is left.
    """
    rule, header = files.rule, files.header
    while kept := [u for u in updates if u.ticket not in verdict.reasons]:
        facts = {u.client: _facts(header, u) for u in kept}
        contributions = [
            Contribution(u.client, facts[u.client], u.manifest, u.payload, releaser(u.payload)) for u in kept
        ]
        figures: dict[str, float] = {}
        try:
            if files.makes_version:
                made, state_sha256 = _write(
                    files, rule, contributions, clips=clips, noised=noised, measured=figures.update
                )
            else:
                made, state_sha256 = _write_sum(files, rule, contributions), ""
        except Overflow as error:
            ticket = next(u.ticket for u in kept if u.client == error.client)
            verdict.exclude(ticket, "overflow", str(error))
            continue
        weights = {u.ticket: noised.weights[u.client] if noised else rule.weigh(facts[u.client]) for u in kept}
        return _Folded(kept, weights, figures, made, state_sha256)
    raise RoundEmptied(verdict.words)


def _record(
    files: _Files,
    updates: Sequence[Update],
    folded: _Folded,
    verdict: _Verdict,
    previous: str,
    events: tuple[Event, ...],
) -> str:
    """Returns the round's record as canonical JSON."""
    header = files.header
    return Record(
        run=header.run,
        round=files.number,
        base_sha256=files.base.sha256,
        contributions=tuple(_contributed(u, folded.weights[u.ticket]) for u in folded.updates),
        strategy=header.config.aggregation.strategy,
        options=files.rule.options.model_dump(mode="json"),
        adapter_sha256=folded.made.sha256 if files.makes_version else "",
        sum_sha256="" if files.makes_version else folded.made.sha256,
        state_sha256=folded.state_sha256,
        previous_sha256=previous,
        excluded=tuple(_excluded(u, verdict.reasons[u.ticket]) for u in updates if u.ticket in verdict.reasons),
        bound=verdict.bound if verdict.reasons else None,
        sections=header.spec.sections,
        events=events,
    ).to_json()


def roll_back(
    header: RunHeader,
    number: int,
    to: int,
    source: Stored,
    base_sha256: str,
    state_sha256: str,
    previous: str,
    folder: Path,
    create: Callable[[Path], BinaryIO] = _create,
    epsilon: float | None = None,
) -> Outcome:
    """Makes version `number` of the tensors of an earlier one, in the file `adapter` of `folder`.

    The strategy's state is that of the earlier version, to the byte.

    Args:
        header: The run.
        number: Number of the version, and of the round that it takes.
        to: The earlier version.
        source: Its file.
        base_sha256: Digest of version `number - 1`.
        state_sha256: Digest of the state that belongs to version `to`; empty if there is none.
        previous: Digest of the record before.
        folder: Target folder.
        create: Opens a new file for writing.
        epsilon: Spent by version `number - 1`; going back gives none of it back. None where the run adds no noise.

    Raises:
        BlobCorrupt: If `source` does not have its digest.
    """
    aggregation = header.config.aggregation
    rule = strategy(aggregation.strategy, aggregation.options)
    with adapter_file.open_adapter(source.path, source.sha256) as old, create(folder / "adapter") as stream:
        adapter = adapter_file.write_adapter(stream, header.info(number), header.spec.shared, old)
    record = Record(
        run=header.run,
        round=number,
        base_sha256=base_sha256,
        contributions=(),
        strategy=aggregation.strategy,
        options=rule.options.model_dump(mode="json"),
        adapter_sha256=adapter.sha256,
        state_sha256=state_sha256,
        previous_sha256=previous,
        rolled_back_to=to,
        sections=header.spec.sections,
    ).to_json()
    figures = {ROLLED_BACK_TO: float(to)} | ({} if epsilon is None else {EPSILON: epsilon})
    return Outcome(adapter, state_sha256, {}, record, digest(record), figures, {}, Extent(0.0, 0.0))


def _contributed(update: Update, weight: float) -> Contributed:
    sha256 = update.manifest.sha256.hex()
    return Contributed(update.client, update.ticket, update.examples, weight, sha256, update.staleness)


def _excluded(update: Update, reason: str) -> Excluded:
    sha256 = update.manifest.sha256.hex()
    return Excluded(update.client, update.ticket, update.examples, update.norm, sha256, reason)


def _write(
    files: _Files,
    rule: Strategy,
    contributions: Sequence[Contribution],
    *,
    clips: bool,
    measured: Callable[[Mapping[str, float]], object],
    noised: NoisedSum | None,
) -> tuple[Written, str]:
    """Folds contributions into the files; returns the adapter's, and the digest of the state's."""
    header, base, state = files.header, files.base, files.state
    info, specs, exact = header.info(files.number), header.spec.shared, bool(header.config.aggregation.exact_sum)
    with ExitStack() as stack:
        old = stack.enter_context(adapter_file.open_adapter(base.path, base.sha256))
        kept: State = {}
        if state:
            file = stack.enter_context(adapter_file.open_state(state.path, state.sha256))
            kept = adapter_file.slots(file, rule.slots)
        to_adapter = stack.enter_context(files.create(files.folder / "adapter"))
        to_state = stack.enter_context(files.create(files.folder / "state"))
        adapter_out = adapter_file.adapter_writer(to_adapter, info, specs)
        shared = header.spec.adapter.shared
        state_out = adapter_file.state_writer(to_state, info, shared, rule.slots, rule.shared_slots)
        for tensor in fold_tensors(
            contributions, specs, rule, old, kept, clips=clips, noised=noised, measured=measured, exact=exact
        ):
            adapter_out.add(tensor.values)
            for slot in tensor.state:  # in the strategy's order; other sections than the adapter have none
                state_out.add(tensor.state[slot])
    return adapter_out.finish(), state_out.finish().sha256 if rule.slots else ""


def _write_sum(files: _Files, rule: Strategy, contributions: Sequence[Contribution]) -> Written:
    sha256, size_bytes = hashlib.sha256(), 0
    with files.create(files.folder / "sum") as stream:
        for piece in fold_sums(contributions, files.header.spec.sent(files.number), rule):
            stream.write(piece)
            sha256.update(piece)
            size_bytes += len(piece)
    return Written(sha256.hexdigest(), size_bytes)


def _figures(updates: Sequence[Update]) -> dict[str, float]:
    figures = {"train_examples": float(sum(u.examples for u in updates))}
    factors = [u.metrics["clip_factor"] for u in updates if "clip_factor" in u.metrics]
    if factors:
        figures["clipped_updates"] = float(sum(factor < 1 for factor in factors))
    losses = [(u.metrics["loss"], u.examples) for u in updates if "loss" in u.metrics]
    if losses:
        total = sum(n for _, n in losses)
        # Shares first, so that no client's figure, however large, makes the mean infinite.
        figures["train_loss"] = sum(loss * (n / total) for loss, n in losses)
    return figures
