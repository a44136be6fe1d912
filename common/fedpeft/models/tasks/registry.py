"""Tasks by the word before the colon of `model.name`: those of this package, and those of packages installed here.

A run names a task, as in `text:tiny`, and a site's data likewise, as in `--data text:letters/`. Its class is found
under the entry point group `fedpeft.tasks` of the packages that are installed on this machine, and nowhere else: a run
brings a name and never code.
"""

from __future__ import annotations

from pathlib import Path

from fedpeft.config import split_task
from fedpeft.data.sources.hub import is_hub
from fedpeft.errors import ConfigInvalid, ModelInvalid
from fedpeft.models.tasks.task import Task
from fedpeft.registry import Registry

IMAGES = ""
"""The name of the task that needs none: images for timm's classifiers."""

tasks: Registry[type[Task]] = Registry("fedpeft.models.tasks", "fedpeft.tasks", "task", former="fedpeft.kinds")


def task_of(name: str) -> Task:
    """Returns the task of this name.

    Raises:
        ModelInvalid: If no package here brings it, or its class cannot be made.
    """
    try:
        found = tasks.get(name)
    except ConfigInvalid as error:
        raise ModelInvalid(f"model.name: {error.message}", (("model.name", error.message),)) from None
    try:
        made = found()
    except Exception as error:  # whatever somebody's class raises
        raise ModelInvalid(f"task {name!r}: {type(error).__name__}: {error}") from error
    if not isinstance(made, Task):
        raise ModelInvalid(f"task {name!r} is a {type(made).__name__}, not a fedpeft.models.tasks.Task")
    return made


def split_data(data: str) -> tuple[str, str]:
    """Returns the task and the path of `TASK:PATH`; a path that exists is taken as it is, colons and all.

    So is `hub:NAME/SPLIT`, whose data are images.
    """
    return (IMAGES, data) if is_hub(data) or Path(data).exists() else split_task(data)
