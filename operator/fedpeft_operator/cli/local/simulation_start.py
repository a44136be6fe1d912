"""The start of `fedpeft simulate`: classes that a run file leaves to the data, and lines before the first round."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpeft import formatting
from fedpeft.api import views

if TYPE_CHECKING:
    from fedpeft.config import RunConfig


def own_classes(
    file: Path, override: Mapping[str, Any], data: Path, image_column: str | None, label_column: str | None
) -> views.Json:
    """Returns the classes of the data, as an override, if the run file names none."""
    from fedpeft.config import run_table
    from fedpeft.config.overrides import merged

    table = merged(run_table(file), override)
    model, own = table.get("model"), table.get("simulation")
    if not isinstance(model, dict) or "classes" in model or ":" in str(model.get("name", "")):
        return {}
    from fedpeft.data.client_folders import classes_there

    own = own if isinstance(own, dict) else {}
    columns = image_column or own.get("image_column"), label_column or own.get("label_column")
    return {"model": {"classes": classes_there(data, *columns)}}


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
