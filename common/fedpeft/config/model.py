"""Section `[model]` of the run file."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, JsonValue, ValidationInfo, field_validator, model_validator

from fedpeft.config.section import ClassName, Section
from fedpeft.formatting import counted

UNLABELLED = "examples"
"""The one class of a task that has none."""

LEAST_CLASSES, MOST_CLASSES = 2, 100_000
"""Number of a run's classes; a task may have one."""

_MODEL_NAME = re.compile(r"([a-z][a-z0-9_\-]*:)?[A-Za-z0-9_.\-]+")
_HUB_NAME = re.compile(r"(?:hf[-_]hub:(?:timm/)?|timm/)([A-Za-z0-9_.\-]+)")
_WEIGHTS_SUFFIXES = (".bin", ".pt", ".pth", ".safetensors")


def split_task(text: str) -> tuple[str, str]:
    """Returns the task before the colon, or nothing, and what stands behind it."""
    task, colon, rest = text.partition(":")
    return (task, rest) if colon else ("", text)


class ModelConfig(Section):
    """`[model]`: the pre-trained model."""

    name: Annotated[str, Field(min_length=1, max_length=128)]
    """timm's name, for example vit_base_patch16_224; or TASK:NAME of a task that is installed beside fedpeft."""
    weights: Annotated[str, Field(min_length=1, max_length=1024)] = "hub"
    """hub, none (random, seeded), or a file that each client resolves and proves by fingerprint."""
    image_size: Annotated[int, Field(ge=8, le=2048)] | None = None
    """Side of the square input in pixels; the model's own if absent."""
    classes: Annotated[tuple[ClassName, ...], Field(strict=False)]  # TOML and JSON have lists only
    """Class names, in the order of the logits; a site maps its own labels to these. A task may have none."""
    depth: Annotated[int, Field(ge=1, le=256)] | None = None
    """Number of transformer blocks, cut from the front; the model's own if absent."""
    pooling: Literal["token", "avg", "avgmax", "max"] | None = None
    """timm's global pooling; the model's own if absent."""
    options: dict[str, JsonValue] | None = None
    """Of a task that is installed beside fedpeft, which alone knows and checks them: the table `[model.options]`."""

    @property
    def task(self) -> str:
        """The name of the task: the part of `name` before the colon; empty for an image classifier of timm."""
        return split_task(self.name)[0]

    @property
    def variant(self) -> str:
        """The part of `name` behind the colon: `tiny` of `text:tiny`."""
        return split_task(self.name)[1]

    @field_validator("name")
    @classmethod
    def _is_a_name(cls, name: str) -> str:
        if hub := _HUB_NAME.fullmatch(name):
            raise ValueError(f"is the hub's name; timm's is {hub[1]!r}, and weights = \"hub\" fetches it")
        if "://" in name or name.startswith(("/", ".", "~")) or name.endswith(_WEIGHTS_SUFFIXES):
            raise ValueError("is a place, not a model; say the model's name in timm here, and its file in weights")
        if _MODEL_NAME.fullmatch(name):
            return name
        raise ValueError("is not a name in timm, such as vit_base_patch16_224, nor TASK:NAME of an installed task")

    @model_validator(mode="before")
    @classmethod
    def _without_classes(cls, data: Any) -> Any:
        """Gives a task that names no classes the one that all of its examples are of."""
        if isinstance(data, Mapping) and "classes" not in data and split_task(str(data.get("name", "")))[0]:
            return {**data, "classes": [UNLABELLED]}
        return data

    @model_validator(mode="after")
    def _options_of_a_task(self) -> Self:
        if self.options is not None and not self.task:
            raise ValueError(f"options are of TASK:NAME; {self.name!r} is timm's and has none")
        return self

    @field_validator("classes")
    @classmethod
    def _distinct(cls, classes: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        least = 1 if split_task(info.data.get("name", ""))[0] else LEAST_CLASSES
        if not least <= len(classes) <= MOST_CLASSES:
            raise ValueError(
                f"{counted(len(classes), 'class', 'classes')}; at least {least} (and at most {MOST_CLASSES:,}) are "
                "needed"
            )
        classes = tuple(unicodedata.normalize("NFC", name) for name in classes)  # as sites compare them
        if twice := sorted(name for name, times in Counter(classes).items() if times > 1):
            raise ValueError(f"class {twice[0]!r} is named twice")
        return classes
