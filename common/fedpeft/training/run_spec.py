"""The tensors of a run: those that its method tunes, and the sections beside them that its parts declare."""

from __future__ import annotations

from fedpeft.adapters.payload import Tensors
from fedpeft.adapters.sections import initial, with_sections
from fedpeft.adapters.spec import AdapterSpec, Section
from fedpeft.algorithms import algorithm
from fedpeft.config import RunConfig
from fedpeft.peft import TunedModel


def sections_of(config: RunConfig, model: TunedModel) -> tuple[Section, ...]:
    """Returns the sections beside the adapter that the parts of a run declare.

    Whoever creates a run and whoever trains for it ask this; the server takes them from the spec.
    """
    return (*model.method.sections(config), *algorithm(config.training.algorithm).sections())


def run_spec(config: RunConfig, model: TunedModel) -> AdapterSpec:
    """Returns the spec of a run: that of its model, with the sections beside the adapter.

    Raises:
        SpecInvalid: If a section breaks a rule.
    """
    return with_sections(model.spec, sections_of(config, model))


def version_0(spec: AdapterSpec, model: TunedModel) -> Tensors:
    """Returns the tensors with which a run begins, float32 by name: the model's, and zeros in the other sections."""
    return {**model.state(), **initial(spec)}
