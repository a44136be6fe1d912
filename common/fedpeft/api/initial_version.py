"""Adapter version 0, with which a run begins; built by the creator of the run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fedpeft.adapters.payload import Tensors
from fedpeft.adapters.spec import AdapterSpec
from fedpeft.config import RunConfig
from fedpeft.rounds.combinations import check_combination, check_makes_versions


@dataclass(frozen=True, slots=True)
class FirstVersion:
    """Adapter version 0 of a run.

    Attributes:
        spec: Every tuned tensor, and those of other sections.
        fingerprint: SHA-256 of the frozen tensors, 64 hexadecimal digits.
        tensors: Float32 by name, all of `spec`.
        model_parameters: Parameters of the whole model.
    """

    spec: AdapterSpec
    fingerprint: str
    tensors: Tensors
    model_parameters: int


def checked_spec(config: RunConfig) -> AdapterSpec:
    """Returns the spec of a run that a server would hold, and refuses what `first_version` refuses; builds no weights.

    Raises:
        ModelInvalid: If there is no such model, or not in this size or depth.
        ConfigInvalid: As `first_version`.
    """
    from fedpeft.simulation.engines import engine_named
    from fedpeft.training.run_spec import spec_without_weights

    check_makes_versions(config)
    if config.simulation:
        engine_named(config.simulation.engine)
    spec = spec_without_weights(config)
    check_combination(config, spec)
    return spec


def first_version(config: RunConfig, weights: Path | None = None) -> FirstVersion:
    """Builds a run's model and returns its version 0; imports torch, and takes seconds where the run is right.

    Args:
        config: The run file.
        weights: A weights file, or a folder of them, that stands here for the one the run names.

    Raises:
        ModelInvalid: If the model or its weights cannot be had.
        ConfigInvalid: If the PEFT method or an option of it is wrong, parts of the run do not work with each other, or
            there is no such engine for its simulation.
    """
    checked_spec(config)
    from fedpeft.models.backbones import build, fingerprint
    from fedpeft.peft import tune
    from fedpeft.training.run_spec import run_spec, version_0

    backbone = build(config.model, config.rounds.seed, weights)
    tuned = tune(backbone, config.peft.method, config.peft.options, config.rounds.seed)
    spec = run_spec(config, tuned)
    return FirstVersion(spec, fingerprint(backbone, tuned.spec), version_0(spec, tuned), backbone.parameters)
