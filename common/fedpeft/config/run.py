"""The whole run file, and the ways to read and check it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import Field, ValidationError

from fedpeft import text_files
from fedpeft.config.aggregation import AggregationConfig
from fedpeft.config.codec import CodecConfig
from fedpeft.config.model import ModelConfig, split_task
from fedpeft.config.overrides import merged
from fedpeft.config.peft import PeftConfig
from fedpeft.config.privacy import PrivacyConfig
from fedpeft.config.rounds import RoundsConfig
from fedpeft.config.section import ACCEPTED, Name, Section
from fedpeft.config.simulation import SimulationConfig
from fedpeft.config.training import TrainingConfig
from fedpeft.config_errors import faults_of, in_file
from fedpeft.errors import ConfigInvalid, ModelInvalid

FindClasses = Callable[[str | None, str | None], Sequence[str]]
"""Finds the classes of data whose images and labels are in these columns; None each: in the usual ones."""


class RunConfig(Section):
    """A run file."""

    name: Name = "run"
    """A label for people; need not be unique."""
    model: ModelConfig
    peft: PeftConfig
    rounds: RoundsConfig = Field(default_factory=RoundsConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    aggregation: AggregationConfig = Field(default_factory=AggregationConfig)
    codec: CodecConfig = Field(default_factory=CodecConfig)
    privacy: PrivacyConfig | None = None
    simulation: SimulationConfig | None = None


def parse_config(data: Mapping[str, Any], *, accepted: bool = False) -> RunConfig:
    """Validates a run configuration that came from anywhere but a file.

    Args:
        data: Its tables.
        accepted: True if it was accepted before, see `fedpeft.config.section.refuse_unused`.

    Raises:
        ConfigInvalid: With one field-level fault for each field that is wrong.
    """
    try:
        return RunConfig.model_validate(data, context=ACCEPTED if accepted else None)
    except ValidationError as error:
        faults = faults_of(error, data)
        raise ConfigInvalid("; ".join(f"{path}: {text}" for path, text in faults), faults) from None


def load_run_file(
    path: Path, override: Mapping[str, Any] = MappingProxyType({}), classes: FindClasses | None = None
) -> RunConfig:
    """Reads and validates a TOML run file.

    Args:
        path: The file.
        override: Fields that are set in place of the file's, see `fedpeft.config.overrides`.
        classes: Asked for the classes of a run that names none, see `with_classes`.

    Raises:
        ConfigInvalid: If the file cannot be read, is not TOML, or breaks a rule; with file, line and field.
    """
    with faults_in(path, override):
        table = merged(run_table(path), override)
        return parse_config(table if classes is None else with_classes(table, classes))


def with_classes(table: Mapping[str, Any], classes: FindClasses) -> dict[str, Any]:
    """Returns a run's tables; those of an image classifier that names no classes with the classes of its data.

    Args:
        table: The tables.
        classes: Called with the image and the label column that `[simulation]` names, None each if it does not.
    """
    model, own = table.get("model"), table.get("simulation")
    if not isinstance(model, Mapping) or "classes" in model or split_task(str(model.get("name", "")))[0]:
        return dict(table)
    said = (own.get(key) if isinstance(own, Mapping) else None for key in ("image_column", "label_column"))
    image, label = (column if isinstance(column, str) else None for column in said)
    return merged(table, {"model": {"classes": list(classes(image, label))}})


def run_table(path: Path) -> dict[str, Any]:
    """Returns the tables of a run file as they stand there.

    Raises:
        ConfigInvalid: If the file cannot be read or is not TOML.
    """
    try:
        return text_files.toml(_read(path))
    except ValueError as error:
        raise ConfigInvalid(f"{path} is not a TOML file: {error}") from None


@contextmanager
def faults_in(path: Path, override: Mapping[str, Any] = MappingProxyType({})) -> Iterator[None]:
    """Gives the faults of a run file that are found inside their lines: some show only once the model is built.

    Args:
        path: The file.
        override: Fields that are set in place of the file's.

    Raises:
        ConfigInvalid: For every error that names fields, with file, line and field, or that the field was overridden;
            other errors pass as they are.
    """
    try:
        yield
    except (ConfigInvalid, ModelInvalid) as error:
        if not error.fields:
            raise
        raise ConfigInvalid(in_file(path, _read(path), error.fields, override), error.fields) from None


def _read(path: Path) -> str:
    try:
        return text_files.read(path)
    except OSError as error:
        raise ConfigInvalid(f"cannot read run file {path}: {error.strerror}") from None
    except text_files.NotText as error:
        raise ConfigInvalid(f"{path} is not a TOML file: {error}") from None
