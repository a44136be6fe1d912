"""The run file: one frozen, validated model of what a run is, a module a section. `docs/run-file.md` is made from it.

The TOML file, the message `fedpeft.v1.RunConfig` and these models have the same names; a test holds them equal.
"""

from __future__ import annotations

from fedpeft.config.aggregation import AggregationConfig
from fedpeft.config.codec import CodecConfig
from fedpeft.config.model import UNLABELLED, ModelConfig, split_task
from fedpeft.config.peft import PeftConfig
from fedpeft.config.privacy import DEFAULT_QUANTILE_RATE, MOST_NOISE, Mechanism, PrivacyConfig
from fedpeft.config.rounds import DEFAULT_POLICY, DEFAULT_STALENESS, LEAST_DEADLINE_S, RoundsConfig, default_quorum
from fedpeft.config.run import (
    FindClasses,
    RunConfig,
    faults_in,
    load_run_file,
    parse_config,
    run_table,
    with_classes,
)
from fedpeft.config.section import ClassName, Name
from fedpeft.config.simulation import SimulationConfig
from fedpeft.config.training import (
    DEFAULT_DROPS,
    DEFAULT_EPOCHS,
    DEFAULT_FINAL_FACTOR,
    PLAIN,
    AlgorithmConfig,
    TrainingConfig,
)

__all__ = [
    "DEFAULT_DROPS",
    "DEFAULT_EPOCHS",
    "DEFAULT_FINAL_FACTOR",
    "DEFAULT_POLICY",
    "DEFAULT_QUANTILE_RATE",
    "DEFAULT_STALENESS",
    "LEAST_DEADLINE_S",
    "MOST_NOISE",
    "PLAIN",
    "UNLABELLED",
    "AggregationConfig",
    "AlgorithmConfig",
    "ClassName",
    "CodecConfig",
    "FindClasses",
    "Mechanism",
    "ModelConfig",
    "Name",
    "PeftConfig",
    "PrivacyConfig",
    "RoundsConfig",
    "RunConfig",
    "SimulationConfig",
    "TrainingConfig",
    "default_quorum",
    "faults_in",
    "load_run_file",
    "parse_config",
    "run_table",
    "split_task",
    "with_classes",
]
