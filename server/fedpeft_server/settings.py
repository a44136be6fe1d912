"""The daemon's settings: one frozen model, flags over environment over a TOML file, whole at construction.

What is waited for, and how long, is named here, in `fedpeft_client.patience` and in the run file (`deadline_s`).
"""

from __future__ import annotations

import argparse
import ipaddress
import tomllib
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    CliApp,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from fedpeft import __version__
from fedpeft.errors import SettingsInvalid

HOLD_S = 20.0
"""How long AwaitRound holds a client before it answers `idle`; also how long an upload waits for its turn."""
STALL_S = 60.0
"""How long a transfer may make no progress."""

GIB = 1024**3


class Settings(BaseSettings):
    """Holds rounds and folds updates for federated parameter-efficient fine-tuning.

    Example: fedpeft-server --data-dir /var/lib/fedpeft --listen 127.0.0.1:7070 --metrics 127.0.0.1:9464
    """

    model_config = SettingsConfigDict(
        env_prefix="FEDPEFT_SERVER_",
        frozen=True,
        extra="forbid",
        cli_prog_name="fedpeft-server",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
    )

    data_dir: Path = Field(description="Folder of the database, adapter versions and spooled updates; made if missing.")
    listen: str = Field("127.0.0.1:7070", description="HOST:PORT that gRPC is served on.")
    metrics: str = Field("127.0.0.1:9464", description="HOST:PORT that Prometheus metrics are served on; empty: none.")
    database: str = Field("", description="SQLAlchemy URL; empty: SQLite in the data folder.")
    blobs: str = Field(
        "", description="Where adapter versions are kept: folder, s3://, gs:// or az://; empty: data folder."
    )
    insecure: bool = Field(
        False, description="Serve plain text beyond the loopback interface. Say it only behind a wall."
    )
    max_update_bytes: Annotated[int, Field(ge=1024)] = Field(2 * GIB, description="Largest payload taken, in bytes.")
    max_transfers: Annotated[int, Field(ge=1, le=1024)] = Field(
        8, description="Uploads, and as many downloads, served at once; others wait for their turn."
    )
    max_clients: Annotated[int, Field(ge=1)] = Field(100_000, description="Clients that may be registered.")
    drain_s: Annotated[float, Field(ge=0, le=3600)] = Field(
        30.0, description="Seconds that transfers under way get to finish after SIGTERM."
    )
    keep_updates: bool = Field(
        False, description="Keep every counted update after its round, so that it can be replayed."
    )
    log_format: Literal["auto", "console", "json"] = Field(
        "auto", description="auto: console on a terminal, else JSON."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severity logged.")

    @field_validator("listen", "metrics")
    @classmethod
    def _address(cls, value: str) -> str:
        if value:
            split_address(value)
        return value

    @model_validator(mode="after")
    def _loopback_or_insecure(self) -> Self:
        if not self.insecure and not is_loopback(split_address(self.listen)[0]):
            raise ValueError(
                f"--listen {self.listen} is not a loopback address and would serve plain text to the network; "
                "listen on 127.0.0.1, or say --insecure"
            )
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Environment over the file that --config names; the flags come before both."""
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)


def load_settings(args: list[str]) -> Settings:
    """Builds the settings from flags, environment and the file that --config names.

    Raises:
        SettingsInvalid: With one line for each setting that is wrong.
        SystemExit: After --help or --version.
    """
    if "--version" in args:
        print(f"fedpeft-server {__version__}")
        raise SystemExit(0)
    file, rest = _config_file(args)

    class FileSettings(Settings):
        __doc__ = Settings.__doc__
        model_config = SettingsConfigDict(toml_file=file)

    try:
        return CliApp.run(FileSettings, cli_args=rest, cli_exit_on_error=False)
    except ValidationError as error:
        raise SettingsInvalid("\n".join(_sentence(fault, file) for fault in error.errors())) from None
    except SettingsError as error:
        text = str(error).removeprefix("error parsing CLI: ")
        raise SettingsInvalid(f"{text}; fedpeft-server --help lists the flags") from None
    except tomllib.TOMLDecodeError as error:
        raise SettingsInvalid(f"--config {file} is not a TOML file: {error}") from None


def _config_file(args: list[str]) -> tuple[Path | None, list[str]]:
    """Takes --config FILE out of the flags, because the file must be known before the rest can be read."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path, default=None)
    known, rest = parser.parse_known_args(args)
    if known.config is not None and not known.config.is_file():
        raise SettingsInvalid(f"--config: there is no file {known.config}")
    return known.config, rest


def _sentence(fault: ErrorDetails, file: Path | None) -> str:
    """Returns what is wrong with one setting, and where it was given."""
    if fault["type"] == "extra_forbidden":  # argparse refuses a flag that there is not, so it is in the file
        return f"--config {file}: {fault['loc'][0]} is not a setting of fedpeft-server"
    text = fault["msg"].removeprefix("Value error, ")
    return f"--{str(fault['loc'][0]).replace('_', '-')}: {text}" if fault["loc"] else text


def split_address(value: str) -> tuple[str, int]:
    """Splits HOST:PORT.

    Raises:
        ValueError: If it is not of that form.
    """
    host, colon, port = value.rpartition(":")
    if not colon or not host or not port.isdigit() or int(port) > 65_535:
        raise ValueError(f"{value!r} is not HOST:PORT with a port up to 65535, for example 127.0.0.1:7070")
    return host.strip("[]"), int(port)


def is_loopback(host: str) -> bool:
    """Says whether a host name or address is this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
