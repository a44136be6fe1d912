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
    file: Path,
    override: views.Json,
    data: Path,
    label_map: Path | None,
    image_column: str | None,
    label_column: str | None,
) -> RunConfig:
    """Returns the run, with the classes of the data if it names none.

    Args:
        file: The run file.
        override: Fields in place of its own.
        data: The data.
        label_map: The file that renames their classes, if there is one.
        image_column: Column of the images, if it was named.
        label_column: Column of the labels, likewise.

    Raises:
        ConfigInvalid: If the run file, or the override, is wrong.
        DataInvalid: If the classes, or the label map, cannot be read, or no run can have such classes.
    """
    from fedpeft.config import load_run_file

    def classes(image: str | None, label: str | None) -> list[str]:
        from fedpeft.data.client_folders import classes_there
        from fedpeft.data.labels import read_label_map

        renamed = None if label_map is None else read_label_map(label_map)
        return classes_there(data, image_column or image, label_column or label, renamed)

    return load_run_file(file, override, classes)


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
