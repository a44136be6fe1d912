"""Common part of the server's and the client's settings: their sources, and the messages about wrong ones."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from fedpeft import __version__, text_files
from fedpeft.errors import SettingsInvalid
from fedpeft.process import completion

_SAY_THE_VALUE = ("path_type", "value_error")
"""Kinds of faults whose sentence names the value where that helps."""


class ProcessSettings(BaseSettings):
    """The settings of one process: flags over environment over a TOML file; whole and frozen once made.

    A subclass names its program and the prefix of its environment variables, and has a field a setting.
    """

    model_config = SettingsConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    program: ClassVar[str]
    """Name of the command."""
    shortcuts: ClassVar[dict[str, str]] = {}
    """Flags of one letter by the setting they stand for."""

    config: Path | None = None
    """TOML file with any of these settings."""

    @classmethod
    def read(cls, arguments: list[str]) -> Self:
        """Reads flags, environment and settings file; the first that names a setting decides.

        Args:
            arguments: The command line without the program's name.

        Raises:
            SettingsInvalid: With every setting that is missing or wrong.
            SystemExit: With code 0 after `--help`, `--version` or `--print-completion`.
        """
        if "--version" in arguments:
            print(f"{cls.program} {__version__}")
            raise SystemExit(0)
        if shell := completion.asked_for(arguments):
            print(completion.script(cls._flags(None).root_parser, shell))
            raise SystemExit(0)
        try:
            flags = cls._flags(arguments)
            path = flags().get("config") or os.environ.get(f"{cls._prefix()}CONFIG")
            return cls(_cli_settings_source=flags, **(cls.load(Path(path)) if path else {}))
        except ValidationError as error:
            raise SettingsInvalid("; ".join(cls._sentence(f) for f in error.errors(include_url=False))) from None
        except SettingsError as error:
            text = str(error).removeprefix("error parsing CLI: ")
            raise SettingsInvalid(f"{text}; {cls.program} --help lists the flags") from None

    @classmethod
    def _flags(cls, arguments: list[str] | None) -> CliSettingsSource[Any]:
        """Returns the source that reads flags, and has read those of a command line if one is given."""
        return CliSettingsSource(
            cls,
            cli_prog_name=cls.program,
            cli_parse_args=arguments,
            cli_kebab_case=True,
            cli_implicit_flags="toggle",
            cli_hide_none_type=True,
            cli_avoid_json=True,
            cli_exit_on_error=False,
            cli_shortcuts={setting: letter for letter, setting in cls.shortcuts.items()},
        )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Puts the environment over what the settings file gave; flags come before both."""
        return env_settings, init_settings

    @classmethod
    def _prefix(cls) -> str:
        return cls.model_config.get("env_prefix", "")

    @classmethod
    def load(cls, path: Path) -> dict[str, Any]:
        """Returns the keys of a TOML settings file.

        Raises:
            SettingsInvalid: If it cannot be read, is no TOML, or has a key that is no setting.
        """
        try:
            data = text_files.toml(text_files.read(path))
        except OSError as error:
            raise SettingsInvalid(f"--config: cannot read {path}: {error.strerror}") from None
        except ValueError as error:
            raise SettingsInvalid(f"--config {path} is not a TOML file: {error}") from None
        if unknown := sorted(set(data) - set(cls.model_fields)):
            raise SettingsInvalid(f"--config {path}: {unknown[0]} is not a setting of {cls.program}")
        return data

    @classmethod
    def _sentence(cls, fault: ErrorDetails) -> str:
        """Returns what is wrong with one setting, and where it may be given."""
        key = ".".join(str(part) for part in fault["loc"])
        flag = "--" + key.replace("_", "-")
        if fault["type"] == "missing":
            return f"{flag} is missing (or {cls._prefix()}{key.upper()}, or {key} in the settings file)"
        text = "should be a path" if fault["type"] == "path_type" else fault["msg"].removeprefix("Value error, ")
        if fault["type"] not in _SAY_THE_VALUE:
            text += f" (got {str(fault['input'])[:80]!r})"
        return f"{flag}: {text}" if key else text
