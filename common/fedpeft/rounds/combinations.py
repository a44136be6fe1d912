"""Combinations of a run's parts that cannot work, refused when the run is created."""

from __future__ import annotations

from fedpeft.adapters.spec import AdapterSpec
from fedpeft.aggregation import strategy
from fedpeft.config import RunConfig
from fedpeft.errors import ConfigInvalid


def check_combination(config: RunConfig, spec: AdapterSpec) -> None:
    """Checks that the strategy of a run can fold its adapter.

    Raises:
        ConfigInvalid: If it cannot.
    """
    name = config.aggregation.strategy
    rule = strategy(name, config.aggregation.options)
    if reason := rule.misfit({tensor.name: tensor.shape for tensor in spec.shared}):
        fault = f"is {name!r}: {reason}; method is {config.peft.method!r}"
        raise ConfigInvalid(f"aggregation.strategy {fault}", (("aggregation.strategy", fault),))
