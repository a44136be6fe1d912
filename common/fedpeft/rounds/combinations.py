"""Combinations of a run's parts that cannot work, refused when the run is created: the one table of them.

Every part is asked (`misfit`); beside that stand the rules that concern several parts, by what those say of themselves.
Nothing here knows a part by its name.
"""

from __future__ import annotations

from collections.abc import Iterator

from fedpeft.adapters.spec import AdapterSpec
from fedpeft.aggregation import Strategy, strategies, strategy
from fedpeft.algorithms import LocalAlgorithm, algorithm
from fedpeft.codecs import codecs
from fedpeft.config import DEFAULT_DROPS, PLAIN, RunConfig
from fedpeft.config_errors import Fault
from fedpeft.errors import ConfigInvalid
from fedpeft.formatting import counted
from fedpeft.privacy.accounting import locally_overspent, overspent
from fedpeft.privacy.round_privacy import round_privacy_of
from fedpeft.privacy.transforms import transforms_of
from fedpeft.rounds.state_machine import RoundPolicy, policy_of


def check_combination(config: RunConfig, spec: AdapterSpec) -> None:
    """Checks that the parts of a run work with each other, and with the tensors that it tunes.

    Raises:
        ConfigInvalid: If not; with a field-level fault for each combination that cannot work.
    """
    _refuse(misfits(config, spec))


def check_population(config: RunConfig, clients: int) -> None:
    """Checks that the parts of a run whose formulas have the number of all clients have the right one.

    Raises:
        ConfigInvalid: If not.
    """
    parts: dict[str, Strategy | LocalAlgorithm] = {
        "aggregation": _strategy(config),
        "training.algorithm": algorithm(config.training.algorithm),
    }
    _refuse(
        [
            (f"{section}.population", f"is {part.population}, and there are {counted(clients, 'client')} in all")
            for section, part in parts.items()
            if part.population not in (None, clients)
        ]
    )


def check_makes_versions(config: RunConfig) -> None:
    """Checks that a run's rounds make versions, as those of all runs do but the part of a parent's run at an edge.

    Raises:
        ConfigInvalid: If they make sums.
    """
    policy = config.rounds.policy_name
    if not policy_of(config.rounds).makes_versions:
        text = f"is {policy!r}: such a run is made by the agent of an edge, for one of its parent's server"
        raise ConfigInvalid(f"rounds.policy {text}", (("rounds.policy", text),))


def misfits(config: RunConfig, spec: AdapterSpec) -> list[Fault]:
    """Returns a fault for each combination of a run's parts that cannot work."""
    return [fault for rule in _RULES for fault in rule(config, spec)]


def _asked(config: RunConfig, spec: AdapterSpec) -> Iterator[Fault]:
    """Asks each part."""
    parts: list[tuple[str, str, Strategy | LocalAlgorithm | RoundPolicy]] = [
        ("aggregation.strategy", config.aggregation.strategy, _strategy(config)),
        ("training.algorithm", _algorithm_name(config), algorithm(config.training.algorithm)),
        ("rounds.policy", config.rounds.policy_name, policy_of(config.rounds)),
    ]
    for field, name, part in parts:
        if fault := part.misfit(config, spec):
            yield fault if fault[0] == field else (fault[0], f"{fault[1]}; {field} is {name!r}")


def _derived(config: RunConfig, spec: AdapterSpec) -> Iterator[Fault]:
    """Finds tensors of a method that no strategy would make."""
    if spec.derived and not _strategy(config).derives:
        name, method = config.aggregation.strategy, config.peft.method
        known = ", ".join(each for each in strategies.names() if strategies.get(each).derives)
        text = f"is {name!r}, which does not make the tensors that method {method!r} leaves to the server"
        yield "aggregation.strategy", f"{text}; these do: {known}"


def _ranked(config: RunConfig, spec: AdapterSpec) -> Iterator[Fault]:
    """Finds ranks of simulated clients that would have no effect."""
    if config.simulation is not None and config.simulation.ranks and not _strategy(config).takes_ranks:
        known = ", ".join(each for each in strategies.names() if strategies.get(each).takes_ranks)
        text = f"are of clients whose updates strategy {config.aggregation.strategy!r} does not take"
        yield "simulation.ranks", f"{text}; these do: {known}"


def _stale(config: RunConfig, spec: AdapterSpec) -> Iterator[Fault]:
    """Finds what does not take updates of one round that start from different versions."""
    if policy_of(config.rounds).one_version:
        return
    policy = f"is {config.rounds.policy_name!r}, whose updates start from different versions"
    if _strategy(config).needs_one_version:
        yield "rounds.policy", f"{policy}; strategy {config.aggregation.strategy!r} needs those of one"
    if algorithm(config.training.algorithm).needs_one_version:
        yield "rounds.policy", f"{policy}; algorithm {_algorithm_name(config)!r} needs those of one"
    if any(tensor.roles != tensor.roles[:1] for tensor in spec.tensors):
        yield "rounds.policy", f"{policy}; method {config.peft.method!r} sends other tensors in every round"


def _scaled(config: RunConfig, spec: AdapterSpec) -> Iterator[Fault]:
    """Finds transforms of what a client keeps whole."""
    for transform in transforms_of(config) if spec.sections else ():
        what = f"section {spec.sections[0].name!r} of algorithm {_algorithm_name(config)!r}"
        yield transform.field, f"does not go with {what}: clients keep the whole of what it would change"


def _scheduled(config: RunConfig, spec: AdapterSpec) -> Iterator[Fault]:
    """Finds a schedule of the learning rate that the rounds of the run are too few for."""
    training, count = config.training, config.rounds.count
    warmup = training.warmup_rounds or 0
    if warmup >= count:
        text = f"is {warmup}; a run of {counted(count, 'round')} never comes to training.learning_rate"
        yield "training.warmup_rounds", text
    elif training.schedule == "step" and (training.schedule_drops or DEFAULT_DROPS) >= count - warmup:
        drops = training.schedule_drops or DEFAULT_DROPS
        text = f"is {drops}; the {counted(count - warmup, 'round')} after warm-up have room for {count - warmup - 1}"
        yield "training.schedule_drops", text


def _noised(config: RunConfig, spec: AdapterSpec) -> Iterator[Fault]:
    """Finds what noise at the server does not hide, or what it would be too little or too much for."""
    central, privacy = round_privacy_of(config).central, config.privacy
    if central is None or privacy is None:
        return
    noise = 'privacy.mechanism "central" hides a client in one sum of bounded updates'
    if not _strategy(config).sees_one_mean:
        yield "aggregation.strategy", f"is {config.aggregation.strategy!r}, which makes more of the updates; {noise}"
    if config.aggregation.norm_factor:
        text = "judges an update by the norms of the others"
        yield "aggregation.norm_factor", f"is {config.aggregation.norm_factor:g} and {text}; {noise}: leave it out"
    if spec.sections and privacy.quantile is not None:
        what = f"section {spec.sections[0].name!r} of algorithm {_algorithm_name(config)!r}"
        yield "privacy.quantile", f"does not go with {what}: clients keep the whole of what it would change"
    yield from _of_a_client(config)
    if privacy.noise_multiplier is not None and central.noise_multiplier >= 2 * central.count_sigma:
        least = central.noise_multiplier / 2
        yield "privacy.quantile_noise", f"is {central.count_sigma:g}; it must be above {least:g}, half of the noise"
    if why := overspent(config, (), 1):
        yield "privacy.target_epsilon", f"allows no round: {why}"


def _exact(config: RunConfig, spec: AdapterSpec) -> Iterator[Fault]:
    """Finds what more is made of updates than one sum that is added up exactly, or what would not be exact."""
    if not config.aggregation.exact_sum:
        return
    field = "aggregation.exact_sum"
    if not _strategy(config).sees_one_mean:
        name = config.aggregation.strategy
        yield field, f"does not go with strategy {name!r}, which makes more of the updates than a mean"
    if not policy_of(config.rounds).one_version:
        yield field, f"does not go with rounds.policy {config.rounds.policy_name!r}: a sum starts from one version"
    if spec.sections:
        what = f"section {spec.sections[0].name!r} of algorithm {_algorithm_name(config)!r}"
        yield field, f"does not go with {what}, which is added up apart"
    if round_privacy_of(config).central is not None:
        yield field, 'does not go with privacy.mechanism "central", whose noise is for a sum of updates of one bound'


def _of_a_client(config: RunConfig) -> Iterator[Fault]:
    """Finds a delta that protects no client."""
    delta, clients = (config.privacy and config.privacy.delta) or 0.0, config.rounds.clients
    if delta * clients >= 1:
        text = f"is {delta:g}, which is no protection for one of {clients} clients"
        yield "privacy.delta", f"{text}: it must be far below 1 / {clients}"


def _noised_by_clients(config: RunConfig, spec: AdapterSpec) -> Iterator[Fault]:
    """Finds what an update that is nearly all noise does not go with."""
    privacy = config.privacy
    if privacy is None or privacy.mechanism != "local":
        return
    if codecs.get(config.codec.encoding).is_sparse:
        yield "codec.up", f"is {config.codec.up!r}: of an update with noise of its client's it would keep the noise"
    yield from _of_a_client(config)
    if why := locally_overspent(config, 0):
        yield "privacy.target_epsilon", f"allows no update: {why}"


def _noised_by_steps(config: RunConfig, spec: AdapterSpec) -> Iterator[Fault]:
    """Finds what training that hides single examples does not go with."""
    if config.privacy is None or config.privacy.mechanism != "example":
        return
    training = config.training
    if training.clip_gradient_norm is not None:
        text = f"is {training.clip_gradient_norm:g}; the gradient of each example is clipped by privacy.clip_norm"
        yield "training.clip_gradient_norm", f"{text}: leave it out"
    if training.precision == "float16":
        text = 'is "float16", whose steps are repeated where they overflow: each would be noised again'
        yield "training.precision", f'{text}; take "auto", "bfloat16" or "float32"'


_RULES = (_asked, _derived, _ranked, _stale, _scaled, _scheduled, _exact, _noised, _noised_by_clients, _noised_by_steps)


def _strategy(config: RunConfig) -> Strategy:
    return strategy(config.aggregation.strategy, config.aggregation.options)


def _algorithm_name(config: RunConfig) -> str:
    return config.training.algorithm.name if config.training.algorithm else PLAIN


def _refuse(faults: list[Fault]) -> None:
    if faults:
        raise ConfigInvalid("; ".join(f"{field} {text}" for field, text in faults), tuple(faults))
