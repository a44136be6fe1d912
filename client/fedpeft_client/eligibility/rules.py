"""Eligibility of a run at this site: one pure function over both, which returns the reasons against it.

Whatever may speak against a run is a check in `CHECKS`, and is asked nowhere else. It is asked twice: before the model
is built, so that nothing is loaded or fetched for a run that cannot be; and afterwards, with what was built. A fact
that is not known yet speaks against nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import numpy as np
from pydantic import ValidationError

from fedpeft.adapters.spec import AdapterSpec
from fedpeft.config import TrainingConfig
from fedpeft.config_errors import faults_of
from fedpeft.data.labels import ClassMap, MappedLabels, map_labels
from fedpeft.data.sources.interface import too_many_unreadable
from fedpeft.errors import (
    BackboneMismatch,
    ConfigInvalid,
    DataInvalid,
    FedpeftError,
    IdentityInvalid,
    ModelInvalid,
    RefusedByPolicy,
    SpecInvalid,
    StateInvalid,
    TrainingFailed,
    of_reason,
)
from fedpeft.formatting import counted
from fedpeft.privacy.example_level import no_protection
from fedpeft.rpc import wire
from fedpeft.v1 import federation_service_pb2 as pb
from fedpeft_client.eligibility.policy_rules import RunDemand, Weights, broken
from fedpeft_client.owner.policy import NO_LIMITS, Policy
from fedpeft_client.state.runs import KnownRun

_PRIVATE: dict[type[FedpeftError], str] = {
    DataInvalid: "its images cannot be used as they are",
    ModelInvalid: "the run's model cannot be built there, or its weights are missing or do not fit",
    StateInvalid: "its state directory cannot be used",
    IdentityInvalid: "the edge's server does not let its agent in",
}
"""Errors whose sentence may name files, classes or images of this site, and what the server is told instead."""


@dataclass(frozen=True)
class Reason:
    """One reason why a run does not suit this site.

    Attributes:
        kind: The `reason` of the error that it is.
        public_text: A sentence for the server and its operator; it names nothing of this site.
        local_text: A sentence for this site: what is wrong, where, and what would be right.
    """

    kind: str
    public_text: str
    local_text: str

    @classmethod
    def of(cls, error: FedpeftError, public_text: str = "") -> Self:
        """Returns an error as a reason; without a text for the server its own is told, unless that is private."""
        return cls(error.reason, public_text or _PRIVATE.get(type(error), error.message), error.message)

    @property
    def error(self) -> FedpeftError:
        """The error that it is."""
        return of_reason(self.kind, TrainingFailed)(self.local_text)

    def as_json(self) -> dict[str, Any]:
        """Returns it for the way between worker and agent."""
        return asdict(self)


@dataclass(frozen=True)
class Built:
    """Result of building a run's model: the tensors its method tunes, the fingerprint of the rest, the input's side."""

    spec: AdapterSpec
    fingerprint: str
    image_size: int | None = None


@dataclass(frozen=True)
class Site:
    """Facts about this site.

    Attributes:
        methods: PEFT methods of the software here.
        classes: Images by own class name.
        label_map: Own class name to run class, None to drop the class.
        unreadable: Of the images of each class, how many cannot be read; None if they were not looked through.
        built: The run's model, or why it could not be built; None if that was not tried.
        task: Name of the task that the data are for; empty for images.
        policy: Limits that its owner sets.
        weights: The owner's --weights.
        trains: True if it trains; otherwise it scores.
    """

    methods: frozenset[str]
    classes: Mapping[str, int]
    label_map: Mapping[str, str | None] = field(default_factory=dict)
    unreadable: Mapping[str, int] | None = None
    built: Built | FedpeftError | None = None
    task: str = ""
    policy: Policy = NO_LIMITS
    weights: Weights = ""
    trains: bool = True


def reasons_against(run: KnownRun, site: Site) -> tuple[Reason, ...]:
    """Returns every reason why a run does not suit a site, as far as the facts go; none if it does."""
    return tuple(reason for check in CHECKS for reason in check(run, site))


def reasons_against_ticket(
    policy: Policy, run: KnownRun, task: pb.TrainingTask, examples: int | None, taken: int
) -> tuple[Reason, ...]:
    """Returns every reason why the training of a ticket is refused: a server may ask for more than it offered.

    Args:
        policy: The policy of this site.
        run: The run as it was offered and accepted.
        task: The ticket's task.
        examples: Images of the run's classes; None if that is not known, of a relay.
        taken: Other tickets of the run that this device has sent updates for.
    """
    settings = wire.training_data(task.settings)
    try:
        training = TrainingConfig.model_validate(settings)
    except ValidationError as error:
        faults = faults_of(error, settings, "training")
        return (Reason.of(ConfigInvalid("; ".join(f"{path}: {text}" for path, text in faults), faults)),)
    asked = RunDemand(run, training, task.round, examples, taken=taken)
    return tuple(Reason.of(RefusedByPolicy(each.local_text), each.public_text) for each in broken(policy, asked))


def mapped(run: KnownRun, site: Site) -> MappedLabels:
    """Returns the site's images with the run's labels, one class after the other.

    Raises:
        DataInvalid: As `map_labels`.
    """
    labels = np.repeat(np.arange(len(site.classes)), list(site.classes.values()))
    return map_labels(tuple(site.classes), labels, run.config.model.classes, site.label_map)


def _task(run: KnownRun, site: Site) -> Iterable[Reason]:
    wanted = run.config.model.task
    if wanted != site.task:
        theirs, own = (task or "images" for task in (wanted, site.task))
        told = f"the run's model {run.config.model.name} is for {theirs}, its data are for {own}"
        start = f"--data {wanted}:PATH" if wanted else "--data PATH"
        yield Reason.of(ModelInvalid(f"{told}; a client with data for it is started with {start}"), told)


def _policy(run: KnownRun, site: Site) -> Iterable[Reason]:
    try:
        examples = mapped(run, site).examples
    except DataInvalid:
        examples = None  # that is a reason of its own
    training = run.config.training if site.trains else None
    size = site.built.image_size if isinstance(site.built, Built) else None
    for each in broken(site.policy, RunDemand(run, training, None, examples, size, site.weights)):
        yield Reason.of(RefusedByPolicy(each.local_text), each.public_text)


def _method(run: KnownRun, site: Site) -> Iterable[Reason]:
    method = run.config.peft.method
    if method not in site.methods:
        known = ", ".join(sorted(site.methods))
        yield Reason.of(ConfigInvalid(f"there is no PEFT method {method!r}; there are: {known}"))
    elif run.spec.method != method:
        yield Reason.of(SpecInvalid(f"the run's spec is of method {run.spec.method}, its file of {method}"))


def _delta(run: KnownRun, site: Site) -> Iterable[Reason]:
    privacy = run.config.privacy
    if privacy is None or not site.trains:
        return
    try:
        examples = mapped(run, site).examples
    except DataInvalid:
        return  # that is a reason of its own
    if why := no_protection(privacy, examples):
        told = f"privacy.delta is {privacy.delta:g}, which is no protection for one of its examples: it must be far"
        yield Reason.of(ConfigInvalid(why), f"{told} below 1 / their number")


def _labels(run: KnownRun, site: Site) -> Iterable[Reason]:
    try:
        mapped(run, site)
    except DataInvalid as error:
        yield Reason.of(error, _told_of_labels(run, site))


def _told_of_labels(run: KnownRun, site: Site) -> str:
    """Returns what the server may know of labels that do not fit: numbers, and no name."""
    try:
        known = ClassMap(run.config.model.classes, site.label_map)
    except DataInvalid:
        return "its label map names a class that the run does not have"
    own = [name for name, count in site.classes.items() if count]
    unknown = [name for name in own if known.of(name) == -1]
    if unknown:
        some = f"{len(unknown)} of its {counted(len(own), 'class', 'classes')} {'is' if len(unknown) == 1 else 'are'}"
        return f"{some} not among the run's; a label map can rename or drop them"
    return "it has no image of the run's classes"


def _images(run: KnownRun, site: Site) -> Iterable[Reason]:
    if site.unreadable is None:
        return
    try:
        known = ClassMap(run.config.model.classes, site.label_map)
    except DataInvalid:
        return  # that is a reason of its own
    kept = [name for name in site.classes if known.of(name) not in (None, -1)]
    bad, total = (sum(counts.get(name, 0) for name in kept) for counts in (site.unreadable, site.classes))
    if text := too_many_unreadable(bad, total):
        yield Reason.of(DataInvalid(text), text)


def _backbone(run: KnownRun, site: Site) -> Iterable[Reason]:
    match site.built:
        case FedpeftError() as error:
            yield Reason.of(error)
        case Built(spec, _) if spec != run.spec:
            yield Reason.of(SpecInvalid(_other_spec(spec, run.spec)))
        case Built(_, own) if own != run.fingerprint:
            name = run.config.model.name
            here = (
                f"the backbone {name} here has fingerprint {own}, that of run {run.id} has {run.fingerprint}; the "
                "frozen weights differ: give the file that the run was created with as --weights"
            )
            yield Reason.of(
                BackboneMismatch(here), f"its backbone {name} has fingerprint {own}, the run's {run.fingerprint}"
            )


def _other_spec(own: AdapterSpec, wanted: AdapterSpec) -> str:
    """Returns the first tensor in which what the method tunes here differs from what the run says it tunes."""
    mine = {tensor.name: tensor for tensor in own.tensors}
    theirs = {tensor.name: tensor for tensor in wanted.tensors}
    name = next(n for n in sorted(mine.keys() | theirs.keys()) if mine.get(n) != theirs.get(n))
    return (
        f"method {own.method} here has tensor {name} as {mine.get(name, 'none')}, the run as "
        f"{theirs.get(name, 'none')}; use the version of the software that the run was created with"
    )


CHECKS: tuple[Callable[[KnownRun, Site], Iterable[Reason]], ...] = (
    _policy,
    _task,
    _method,
    _delta,
    _labels,
    _images,
    _backbone,
)
"""The checks, in their order; each knows the run and the site and nothing else."""
