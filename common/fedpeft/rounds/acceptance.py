"""Acceptance of an update: the rules that it must keep, the same on a server and in a simulation. Pure.

Three steps, in this order, because a server has the header of an update before its payload:

    check_manifest, check_claims                  what is said of the update, before a byte of it is taken
    fedpeft.adapters.payload.checked_squared_norm every value of the payload, before it is durable
    check_norm                                    its norm, which the run's transforms bound
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from fedpeft.adapters import payload
from fedpeft.adapters.payload import Manifest
from fedpeft.adapters.spec import AdapterSpec
from fedpeft.aggregation import strategy
from fedpeft.aggregation.low_rank.ranks import as_claimed
from fedpeft.codecs.sum128 import SUM128
from fedpeft.config import RunConfig
from fedpeft.errors import ExamplesInvalid, ManifestInvalid
from fedpeft.privacy.transforms import transforms_of
from fedpeft.rounds import metric_values
from fedpeft.rounds.folding.contributions import is_sum
from fedpeft.rounds.tickets import Ticket


def check_manifest(ticket: Ticket, manifest: Manifest, config: RunConfig, spec: AdapterSpec) -> None:
    """Checks that a manifest describes an update for a ticket: the round it was issued in says which tensors are sent.

    Raises:
        ManifestInvalid: If its tensors or encodings are not those of the ticket's round, below `manifest`.
    """
    try:
        check_tensors(manifest, ticket.issued_in, config, spec)
    except ManifestInvalid as error:
        raise error.within("manifest") from None


def check_tensors(manifest: Manifest, number: int, config: RunConfig, spec: AdapterSpec) -> None:
    """Checks that a manifest describes an update of round `number`, of a rank that the run's strategy takes.

    Raises:
        ManifestInvalid: If its tensors or encodings are others.
    """
    rule = strategy(config.aggregation.strategy, config.aggregation.options)
    encodings = [config.codec.encoding] + ([SUM128.name] if config.aggregation.exact_sum else [])
    payload.check_manifest(manifest, as_claimed(rule, spec.sent(number), manifest), encodings)
    if len({entry.encoding == SUM128.name for entry in manifest.entries}) > 1:
        text = f"are partly {SUM128.name}: an update is a sum of several with all of its tensors, or with none"
        raise ManifestInvalid(f"the tensors {text}", (("tensors", text),))


def check_claims(examples: int, metrics: Mapping[str, float], declared: int | None = None) -> None:
    """Checks what else is said of an update.

    Args:
        examples: Examples that it was trained on.
        metrics: Figures of its training.
        declared: Most examples that the client may claim; None: any number.

    Raises:
        ExamplesInvalid: If it was trained on none, or on more than declared.
        MetricsInvalid: If a figure is wrong.
    """
    if examples < 1 or (declared is not None and examples > declared):
        bounded = f"1 to {declared} are allowed, by what the client declared"
        text = f"is {examples}; {'at least 1 is needed' if declared is None else bounded}"
        raise ExamplesInvalid(f"the update's number of examples {text}", (("examples", text),))
    metric_values.check(metrics, metric_values.MAX_TRAINING)


def norm_of(manifest: Manifest, squared_norm: float, examples: int) -> float:
    """Returns the Euclidean norm of an update; of a sum of several, that of their mean.

    Args:
        manifest: Description of the payload.
        squared_norm: The sum of the squares of its values, as `fedpeft.adapters.payload` gives it.
        examples: Examples of the update, or of all in the sum.
    """
    norm = math.sqrt(squared_norm)
    return norm / examples if is_sum(manifest) else norm


def check_norm(norm: float, config: RunConfig) -> None:
    """Checks the Euclidean norm of an update, as `norm_of` gives it.

    Raises:
        PayloadInvalid: If it cannot have passed the run's transforms.
    """
    for transform in transforms_of(config):
        transform.check(norm)
