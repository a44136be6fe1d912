"""The start of `fedpeft simulate`: the run that file, flags and data give, and lines before the first round."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpeft import formatting
from fedpeft.api import views

if TYPE_CHECKING:
    from fedpeft.config import RunConfig


def config_of(
    file: Path, override: views.Json, data: Path | None, image_column: str | None, label_column: str | None
) -> RunConfig:
    """Returns the run, with the classes of the data if it names none.

    Args:
        file: The run file.
        override: Fields in place of its own.
        data: The data; None if a label map renames their classes, so that the run's are others.
        image_column: Column of the images, if it was named.
        label_column: Column of the labels, likewise.

    Raises:
        ConfigInvalid: If the run file, or the override, is wrong.
        DataInvalid: If the classes cannot be read.
    """
    from fedpeft.config import load_run_file, run_table
    from fedpeft.config.overrides import merged

    table = merged(run_table(file), override)
    model, own = table.get("model"), table.get("simulation")
    named = not isinstance(model, dict) or "classes" in model or ":" in str(model.get("name", ""))
    if data is None or named:
        return load_run_file(file, override)
    from fedpeft.data.client_folders import classes_there

    own = own if isinstance(own, dict) else {}
    columns = image_column or own.get("image_column"), label_column or own.get("label_column")
    return load_run_file(file, merged({"model": {"classes": classes_there(data, *columns)}}, override))


def plan(config: RunConfig) -> str:
    """Returns what is about to happen: method, model, classes, rounds."""
    rounds = formatting.counted(config.rounds.count, "round")
    classes = f", {formatting.counted(len(config.model.classes), 'class', 'classes')}"
    return (
        f"{config.peft.method} on {config.model.name}{classes if not config.model.task else ''}, {rounds} of "
        f"{formatting.counted(config.rounds.clients, 'client')}"
    )


def division(clients: Collection[str], partition: Mapping[str, Any] | None) -> str:
    """Returns how many clients there are, and how they came about."""
    counted = formatting.counted(len(clients), "client")
    return (
        counted if partition is None else f"{partition['rows']:,} rows divided among {counted} ({partition['variant']})"
    )


def weights(config: RunConfig, given: Path | None) -> str:
    """Returns where the weights of the model are from."""
    if config.model.weights == "none":
        return "random weights"
    return f"weights of {given}" if given else f"weights of {'timm' if config.model.weights == 'hub' else 'its file'}"
