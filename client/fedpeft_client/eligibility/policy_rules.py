"""Rules of a policy that a server's request breaks. Pure: the same for an offer and for a ticket.

A rule gives two sentences. What is told to the server says which limit of the owner is passed, in terms of what the
server asked for; it names no path, no class and no number of images of this site. The other one is for the owner.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedpeft.adapters.spec import AdapterSpec
from fedpeft.config import PrivacyConfig, TrainingConfig
from fedpeft.formatting import counted
from fedpeft_client.egress.message_entries import largest_update
from fedpeft_client.owner.policy import Policy, matches
from fedpeft_client.state.runs import KnownRun

CYCLE = 64
"""Rounds whose updates are looked at when a run is offered; the roles of tensors repeat after one or two."""

MOST_STEPS = 1_000_000
"""Optimizer steps in a round that are allowed where the owner bounds neither epochs nor steps."""

Weights = Literal["", "file", "folder"]
"""The owner's --weights: nothing, a file that stands for any weights, or a folder to look names up in."""

Rule = Callable[[Policy, "RunDemand"], "Iterator[Violation]"]


@dataclass(frozen=True)
class RunDemand:
    """A server's request: a run, when it is offered, or the training of a ticket.

    Attributes:
        run: The run, as it was offered.
        training: Settings of the training; None if nothing is trained, by an evaluator.
        number: The ticket's round; None at the offer.
        examples: Images of the run's classes; None if not known yet.
        image_size: Side of the model's input in pixels; None if not known yet.
        weights: The owner's --weights.
        taken: Tickets of the run that this device has sent updates for, this one left out.
    """

    run: KnownRun
    training: TrainingConfig | None
    number: int | None = None
    examples: int | None = None
    image_size: int | None = None
    weights: Weights = ""
    taken: int = 0

    @property
    def steps_a_pass(self) -> int | None:
        """Optimizer steps in a pass over the data, if that is known."""
        if self.training is None or not self.examples:
            return None
        return math.ceil(self.examples / self.training.batch_size)


@dataclass(frozen=True)
class Violation:
    """A violated rule: its key in the policy file, the text for the server, and the text for the owner."""

    key: str
    public_text: str
    local_text: str


def broken(policy: Policy, asked: RunDemand) -> tuple[Violation, ...]:
    """Returns every rule that what is asked for breaks, as far as the facts go."""
    return tuple(each for rule in RULES for each in rule(policy, asked))


def _runs(policy: Policy, asked: RunDemand) -> Iterator[Violation]:
    rules, run = policy.runs, asked.run
    if rules.ids is None and rules.names is None:
        return
    if run.id not in (rules.ids or ()) and not matches(rules.names or (), run.config.name):
        key = "runs.ids" if rules.names is None else "runs.names"
        here = f"run {run.id} ({run.config.name!r}) is not among the policy's {key}"
        yield Violation(key, "its owner allows only certain runs, and this is not one of them", here)


def _rounds(policy: Policy, asked: RunDemand) -> Iterator[Violation]:
    most, count = policy.runs.max_rounds, asked.run.config.rounds.count
    if asked.number is not None and not 1 <= asked.number <= count:
        text = f"the server asks for round {asked.number} of a run that it offered with {counted(count, 'round')}"
        yield Violation("runs.max_rounds", text, text)
    elif most is not None and count > most:
        yield _over("runs.max_rounds", "rounds", count, most)
    elif most is not None and asked.taken >= most:
        yield Violation(
            "runs.max_rounds",
            f"its owner allows {counted(most, 'update')} of a run, and that many were sent",
            f"of run {asked.run.id} {counted(asked.taken, 'update was', 'updates were')} sent; "
            f"the policy's runs.max_rounds is {most:,}",
        )


def _model(policy: Policy, asked: RunDemand) -> Iterator[Violation]:
    rules, run = policy.model, asked.run
    name = run.config.model.name
    if rules.names is not None and not matches(rules.names, name):
        here = f"model {name} is not among the policy's model.names"
        yield Violation("model.names", f"its owner does not allow the model {name}", here)
    if rules.fingerprints is not None and not any(run.fingerprint.startswith(each) for each in rules.fingerprints):
        here = f"backbone {run.fingerprint} is not among the policy's model.fingerprints"
        yield Violation("model.fingerprints", "its owner does not allow the run's backbone", here)
    size = run.config.model.image_size or asked.image_size
    if rules.max_image_size is not None and size is not None and size > rules.max_image_size:
        yield _over("model.max_image_size", "pixels a side", size, rules.max_image_size)


def _weights(policy: Policy, asked: RunDemand) -> Iterator[Violation]:
    wanted, folders = asked.run.config.model.weights, policy.model.weights_folders
    if wanted == "none" or asked.weights == "file":
        return
    if wanted == "hub":
        if not policy.model.hub:
            here = (
                "the run's weights come from the hub, and the policy's model.hub is false; give a file with --weights"
            )
            yield Violation("model.hub", "its owner does not allow weights from the hub", here)
    elif folders is not None and not asked.weights:
        path = Path(wanted).absolute()
        if ".." in path.parts or not any(path.is_relative_to(folder) for folder in folders):
            here = f"the run's weights file {path} is in none of the policy's model.weights_folders"
            yield Violation(
                "model.weights_folders", "its owner does not allow the folder of the run's weights file", here
            )


def _peft(policy: Policy, asked: RunDemand) -> Iterator[Violation]:
    rules, spec = policy.peft, asked.run.spec
    names = {asked.run.config.peft.method, spec.method}
    if rules.methods is not None and not names.issubset(rules.methods):
        method = next(name for name in sorted(names) if name not in rules.methods)
        here = f"PEFT method {method!r} is not among the policy's peft.methods"
        yield Violation("peft.methods", f"its owner does not allow the PEFT method {method!r}", here)
    if rules.max_parameters is not None and spec.parameters > rules.max_parameters:
        yield _over("peft.max_parameters", "parameters tuned", spec.parameters, rules.max_parameters)


def _training(policy: Policy, asked: RunDemand) -> Iterator[Violation]:
    rules, training, a_pass = policy.training, asked.training, asked.steps_a_pass
    if training is None:
        return
    epochs = training.epochs or (None if training.steps else 1)
    if rules.max_epochs is None and rules.max_steps is None:
        yield from _for_ever(training.steps or (epochs * a_pass if epochs and a_pass else 0))
    if rules.max_epochs is not None:
        if epochs is not None and epochs > rules.max_epochs:
            yield _over("training.max_epochs", "epochs", epochs, rules.max_epochs)
        elif training.steps and a_pass and training.steps > rules.max_epochs * a_pass:
            yield _longer(
                "training.max_epochs",
                counted(training.steps, "step is", "steps are"),
                rules.max_epochs,
                "passes over the data",
            )
    if rules.max_steps is not None:
        if training.steps and training.steps > rules.max_steps:
            yield _over("training.max_steps", "steps", training.steps, rules.max_steps)
        elif epochs is not None and a_pass and epochs * a_pass > rules.max_steps:
            text = counted(epochs, "epoch is", "epochs are")
            yield _longer("training.max_steps", text, rules.max_steps, "steps")
    if rules.max_batch_size is not None and training.batch_size > rules.max_batch_size:
        yield _over("training.max_batch_size", "images in a batch", training.batch_size, rules.max_batch_size)


def _for_ever(steps: int) -> Iterator[Violation]:
    if steps > MOST_STEPS:
        told = (
            f"the training is longer than the {MOST_STEPS:,} steps that are allowed where an owner sets no other bound"
        )
        here = f"{told}; the policy's training.max_steps or training.max_epochs sets one"
        yield Violation("training.max_steps", told, here)


def _data(policy: Policy, asked: RunDemand) -> Iterator[Violation]:
    least = policy.data.min_examples
    if least is not None and asked.examples is not None and asked.examples < least:
        images = counted(asked.examples, "image is", "images are")
        here = f"{images} of the run's classes; the policy's data.min_examples is {least:,}"
        yield Violation("data.min_examples", "it has fewer images of the run's classes than its owner wants", here)


def _privacy(policy: Policy, asked: RunDemand) -> Iterator[Violation]:
    rules, privacy = policy.privacy, asked.run.config.privacy or PrivacyConfig()
    if asked.training is None:
        return
    if rules.mechanisms is not None and privacy.mechanism not in rules.mechanisms:
        allowed = ", ".join(map(repr, rules.mechanisms))
        has = "no noise" if privacy.mechanism is None else f"noise of mechanism {privacy.mechanism!r}"
        text = f"the run has {has}"
        key = "privacy.mechanisms"
        yield Violation(key, f"{text}; its owner wants {allowed}", f"{text}; the policy's {key} is {allowed}")
    limits = (
        ("target_epsilon", privacy.target_epsilon, "privacy.max_epsilon", rules.max_epsilon),
        ("delta", privacy.delta, "privacy.max_delta", rules.max_delta),
    )
    for field, wanted, key, most in limits:
        if most is not None and (wanted is None or wanted > most):
            text = f"the run's privacy.{field} is {'not given' if wanted is None else f'{wanted:g}'}"
            yield Violation(key, f"{text}; its owner allows {most:g}", f"{text}; the policy's {key} is {most:g}")


def _transfer(policy: Policy, asked: RunDemand) -> Iterator[Violation]:
    rules, run = policy.transfer, asked.run
    encoding = run.encoding
    if rules.encodings is not None and encoding not in rules.encodings:
        here = f"encoding {encoding} is not among the policy's transfer.encodings"
        yield Violation("transfer.encodings", f"its owner does not allow updates as {encoding}", here)
    if asked.training is None:
        return
    most = rules.max_payload_bytes
    if most is not None and (size := max(run.upload_bounds(number)[1] for number in _rounds_of(asked))) > most:
        yield _over("transfer.max_payload_bytes", "bytes in an update", size, most)
    most = rules.max_bytes_a_day
    if most is not None and (size := max(largest_update(run, number) for number in _rounds_of(asked))) > most:
        yield _over("transfer.max_bytes_a_day", "bytes in the upload of an update", size, most)


def _rounds_of(asked: RunDemand) -> range:
    """Returns the rounds whose updates are looked at: the ticket's, or all while the roles of tensors differ."""
    if asked.number is not None:
        return range(asked.number, asked.number + 1)
    return range(1, min(_cycle(asked.run.spec), asked.run.config.rounds.count) + 1)


def _cycle(spec: AdapterSpec) -> int:
    """Returns after how many rounds the roles of all tensors repeat, CYCLE at most: the tickets tell the rest."""
    return min(math.lcm(*{len(tensor.roles) for tensor in spec.tensors}), CYCLE)


def _over(key: str, unit: str, wanted: int, most: int) -> Violation:
    asks = f"the server asks for {wanted:,} {unit}"
    return Violation(key, f"{asks}; its owner allows {most:,}", f"{asks}; the policy's {key} is {most:,}")


def _longer(key: str, wanted: str, most: int, unit: str) -> Violation:
    """Steps held against passes, or the reverse; the factor between them would tell how many images there are."""
    text = f"{wanted} more than the {most:,} {unit} that"
    return Violation(key, f"{text} its owner allows", f"{text} the policy's {key} allows")


RULES: tuple[Rule, ...] = (_runs, _rounds, _model, _weights, _peft, _training, _data, _privacy, _transfer)
"""The checks, in their order."""
