"""Sections of the run file: what all of them share, and how a section names what is registered."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from fedpeft.config_errors import fault_at, nested
from fedpeft.errors import FedpeftError
from fedpeft.registry import registry_of


def _plain(text: str) -> str:
    """Refuses control characters: names are printed on terminals, where they would move the cursor or worse."""
    if wrong := _control(text):
        raise ValueError(f"holds the control character {wrong!r}")
    return text


def _control(text: str) -> str:
    """Returns the first control character of a text; "" if it has none."""
    return next((c for c in text if unicodedata.category(c) == "Cc"), "")


LONGEST_CLASS = 256
"""Characters of a class's name."""

Name = Annotated[str, Field(min_length=1, max_length=64), AfterValidator(_plain)]
ClassName = Annotated[str, Field(min_length=1, max_length=LONGEST_CLASS), AfterValidator(_plain)]


def class_fault(name: str) -> str:
    """Returns the reason why a text is no `ClassName`, as a clause; "" if it is one."""
    if not name:
        return "its name is empty"
    if len(name) > LONGEST_CLASS:
        return f"its name has {len(name):,} characters, more than {LONGEST_CLASS}"
    return f"its name holds the control character {wrong!r}" if (wrong := _control(name)) else ""


class Section(BaseModel):
    """A section: frozen, and without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


ACCEPTED = "accepted"
"""Context of validation of a configuration that was accepted before, by this version or an older one."""


def refuse_unused(section: Section, info: ValidationInfo, fields: Iterable[str], text: str) -> None:
    """Refuses a setting that has no effect beside others: whoever gave it expects one.

    The default's value passes, because a configuration that was written out whole has it; so does every value in a
    configuration that was accepted before, because a run that is under way must stay readable.

    Args:
        section: The section, its fields validated.
        info: Of the validation.
        fields: Those without effect.
        text: The fault of one that is given, and the remedy.

    Raises:
        PydanticCustomError: For the first of them that is given.
    """
    if info.context == ACCEPTED:
        return
    for field in fields:
        if getattr(section, field) != type(section).model_fields[field].default:
            raise fault_at(field, text)


class OptionedSection(Section):
    """A section whose further keys are the options of what it names."""

    options: dict[str, JsonValue] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, data: Any) -> Any:
        """Moves the keys beside the fields into `options`, as the TOML file writes them."""
        if not isinstance(data, Mapping):
            return data
        own = {k: v for k, v in data.items() if k in cls.model_fields}
        beside = {k: v for k, v in data.items() if k not in cls.model_fields}
        options = own.get("options", {})
        return {**own, "options": {**options, **beside}} if isinstance(options, Mapping) else dict(data)


def registered(package: str, name: str) -> str:
    """Returns a name that a package's registry knows.

    Raises:
        ValueError: If it does not know it.
    """
    try:
        registry_of(package).get(name)
    except FedpeftError as error:
        raise ValueError(error.message) from None
    return name


def known_in(package: str) -> AfterValidator:
    """Returns a validator that refuses a name that a package's registry does not know."""
    return AfterValidator(partial(registered, package))


def check_options(package: str, name: str, options: Mapping[str, Any]) -> None:
    """Checks the options of what is registered under a name.

    Raises:
        PydanticCustomError: With the faults of the keys below `options`.
    """
    try:
        registry_of(package).get(name).Options.model_validate(options)
    except ValidationError as error:
        raise nested(error, options) from None
