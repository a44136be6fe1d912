"""The tensors of a run: those that its method tunes, and the sections beside them that its parts declare."""

from __future__ import annotations

from typing import Any

from fedpeft.adapters.payload import Tensors
from fedpeft.adapters.sections import initial, with_sections
from fedpeft.adapters.spec import AdapterSpec, Section
from fedpeft.algorithms import algorithm
from fedpeft.config import RunConfig
from fedpeft.models.backbones import Backbone, skeleton
from fedpeft.models.tasks import task_of
from fedpeft.peft import Method, TunedModel, make, spec_of, tune
from fedpeft.training.features.division import halves_of


def sections_of(config: RunConfig, method: Method[Any]) -> tuple[Section, ...]:
    """Returns the sections beside the adapter that the parts of a run declare.

    Whoever creates a run and whoever trains for it ask this; the server takes them from the spec.
    """
    return (*method.sections(config), *algorithm(config.training.algorithm).sections())


def run_spec(config: RunConfig, model: TunedModel) -> AdapterSpec:
    """Returns the spec of a run: that of its model, with the sections beside the adapter.

    Raises:
        SpecInvalid: If a section breaks a rule.
    """
    return with_sections(model.spec, sections_of(config, model.method))


def spec_without_weights(config: RunConfig) -> AdapterSpec:
    """Returns the spec of a run, the same as `run_spec`, from a model without values (torch's meta device).

    Raises:
        ModelInvalid: If there is no such model, or not in this size or depth.
        ConfigInvalid: If there is no such method, an option is wrong or fits nothing in this model, or the run would
            keep features and none stay as they are.
        SpecInvalid: If a section breaks a rule.
    """
    method, options = config.peft.method, config.peft.options
    if config.training.keep_features:
        empty = Backbone(config.model, *skeleton(config.model), None, {})
        halves_of(config, task_of(config.model.task), tune(empty, method, options, 0))
    return with_sections(spec_of(config.model, method, options), sections_of(config, make(method, options)))


def version_0(spec: AdapterSpec, model: TunedModel) -> Tensors:
    """Returns the tensors with which a run begins, float32 by name: the model's, and zeros in the other sections."""
    return {**model.state(), **initial(spec)}
