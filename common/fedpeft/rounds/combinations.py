"""Combinations of a run's parts that cannot work, refused when the run is created."""

from __future__ import annotations

from fedpeft.adapters.spec import AdapterSpec
from fedpeft.aggregation import GroupStrategy, strategy
from fedpeft.algorithms import algorithm
from fedpeft.config import SYNCHRONOUS, RunConfig
from fedpeft.errors import ConfigInvalid


def check_combination(config: RunConfig, spec: AdapterSpec) -> None:
    """Checks that the strategy of a run can fold its adapter, and that its local algorithm and its rounds suit both.

    Raises:
        ConfigInvalid: If not.
    """
    name = config.aggregation.strategy
    rule = strategy(name, config.aggregation.options)
    for number in range(1, spec.period + 1):
        if reason := rule.misfit({tensor.name: tensor.shape for tensor in spec.adapter.sent(number)}):
            _refuse("aggregation.strategy", f"is {name!r}: {reason}; method is {config.peft.method!r}")
    chosen = config.training.algorithm
    key, fault = algorithm(chosen).misfit(config)
    if chosen is not None and key:
        _refuse(key, f"{fault}; training.algorithm is {chosen.name!r}")
    if config.privacy is not None and config.privacy.clip_norm is not None and spec.sections:
        text = f"cannot be kept with section {spec.sections[0].name!r}: clients keep the whole of what it would scale"
        _refuse("privacy.clip_norm", text)
    if config.rounds.policy_name == SYNCHRONOUS:
        return
    policy = f"is {config.rounds.policy_name!r}"
    if isinstance(rule, GroupStrategy):
        _refuse("rounds.policy", f"{policy}: strategy {name!r} needs updates that start from the same version")
    if any(tensor.roles != tensor.roles[:1] for tensor in spec.tensors):
        _refuse("rounds.policy", f"{policy}: method {config.peft.method!r} sends other tensors in every round")


def check_served(config: RunConfig) -> None:
    """Checks that a server can hold a run, which a simulation might.

    Raises:
        ConfigInvalid: If its rounds are only simulated yet.
    """
    if config.rounds.policy_name != SYNCHRONOUS:
        _refuse("rounds.policy", f"is {config.rounds.policy_name!r}: these rounds can only be simulated yet")


def _refuse(key: str, fault: str) -> None:
    raise ConfigInvalid(f"{key} {fault}", ((key, fault),))
