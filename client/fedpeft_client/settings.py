"""Settings: flags over environment (`FEDPEFT_CLIENT_*`) over a TOML file; whole and frozen once made."""

from __future__ import annotations

import ipaddress
import os
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from fedpeft.errors import SettingsInvalid

PREFIX = "FEDPEFT_CLIENT_"
_PATTERNS = {
    "name": (r"[A-Za-z0-9._-]{1,64}", "1 to 64 letters, digits, dots, underscores or hyphens"),
    "run": (r"[A-Za-z0-9_-]{1,64}", "a run's id, for example run-0a1b2c3d4e5f"),
    "device": (r"auto|cpu|cuda(:\d+)?", "auto, cpu, cuda or cuda:N"),
}


class Settings(BaseSettings):
    """Takes part in federated fine-tuning with the data of this site; the data never leaves it.

    Every setting may be a flag, an environment variable (FEDPEFT_CLIENT_SERVER for --server) or a key of the --config
    file (server), in this order of precedence.

    Exit codes: 0 done, or asked to stop by a signal; 1 failed; 2 wrong usage or settings; 3 the server cannot be
    reached (--once and --dry-run only, otherwise the client keeps trying); 4 data, model or method do not fit the run.
    """

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        env_prefix=PREFIX,
        env_ignore_empty=True,
        use_attribute_docstrings=True,
    )

    server: str
    """Address of the server, HOST:PORT."""
    name: str
    """Id of this client: 1 to 64 letters, digits, dots, underscores, hyphens; no two clients of a server share one."""
    data: Path
    """The images: a parquet file, a folder of parquet files, or a folder of class folders."""
    state_dir: Path
    """Folder that is this client's memory: its ticket, update, residual and local tensors."""
    evaluate: bool = False
    """Score committed versions on the data instead of training on it."""
    once: bool = False
    """End once no run that this client could work for is left unfinished."""
    dry_run: bool = False
    """Check data, model, weights and server, say what would happen, and end."""
    run: str | None = None
    """Id of the only run to work for; any if absent."""
    weights: Path | None = None
    """File with the backbone's weights, in place of what the run names; the fingerprint proves it right."""
    label_map: Path | None = None
    """File that maps labels of the data to classes of the run."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:N."""
    threads: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Threads that torch computes with; torch's own choice if absent. Recorded with every update."""
    log_format: Literal["auto", "console", "json"] = "auto"
    """console for people, json for machines; auto is console, coloured on a terminal."""
    insecure: bool = False
    """Allow plain text to a server that is not on this machine."""
    verbose: bool = False
    """More log lines, and the traceback of an error that ends the client."""
    config: Path | None = None
    """TOML file with any of these settings."""

    @field_validator("name", "run", "device")
    @classmethod
    def _patterned(cls, value: str | None, info: Any) -> str | None:
        pattern, wanted = _PATTERNS[info.field_name]
        if value is not None and not re.fullmatch(pattern, value):
            raise ValueError(f"{value!r} is not {wanted}")
        return value

    @model_validator(mode="after")
    def _private(self) -> Self:
        if not _is_loopback(_host(self.server)) and not self.insecure:
            raise ValueError(
                f"server {self.server} is not on this machine and the connection is plain text; "
                "use a loopback address, or say --insecure if the network between is trusted"
            )
        return self

    @classmethod
    def read(cls, arguments: list[str]) -> Self:
        """Reads flags, environment and settings file; the first that names a setting decides.

        Args:
            arguments: The command line without the program's name.

        Raises:
            SettingsInvalid: With every setting that is missing or wrong.
            SystemExit: With code 0 after `--help`.
        """
        try:
            flags: CliSettingsSource[Any] = CliSettingsSource(
                cls,
                cli_prog_name="fedpeft-client",
                cli_parse_args=arguments,
                cli_kebab_case=True,
                cli_implicit_flags="toggle",
                cli_hide_none_type=True,
                cli_avoid_json=True,
                cli_exit_on_error=False,
                cli_shortcuts={"verbose": "v"},
            )
            path = flags().get("config") or os.environ.get(f"{PREFIX}CONFIG")
            return cls(_cli_settings_source=flags, **(_load(Path(path)) if path else {}))
        except ValidationError as error:
            faults = error.errors(include_url=False)
            raise SettingsInvalid("; ".join(_sentence(dict(f)) for f in faults)) from None
        except SettingsError as error:
            text = str(error).removeprefix("error parsing CLI: ")
            raise SettingsInvalid(f"{text}; fedpeft-client --help lists the flags") from None

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


def _load(path: Path) -> dict[str, Any]:
    """Returns the keys of a TOML settings file."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsInvalid(f"cannot read settings file {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsInvalid(f"{path} is not a TOML file: {error}") from None
    unknown = sorted(set(data) - set(Settings.model_fields))
    if unknown:
        raise SettingsInvalid(f"{path}: {unknown[0]} is not a setting of fedpeft-client")
    return data


def _host(server: str) -> str:
    """Returns the host of HOST:PORT; an IPv6 host stands in brackets."""
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.%]+)\]|([^:/\s\[\]]+)):(\d{1,5})", server)
    if not match or not 0 < int(match[3]) < 65_536:
        raise ValueError(f"server {server!r} is not HOST:PORT, for example 127.0.0.1:7070")
    return match[1] or match[2]


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _sentence(fault: dict[str, Any]) -> str:
    """Returns what is wrong with one setting, and where it may be given."""
    key = ".".join(str(part) for part in fault["loc"])
    flag = "--" + key.replace("_", "-")
    if fault["type"] == "missing":
        return f"{flag} is missing (or {PREFIX}{key.upper()}, or {key} in the settings file)"
    text = str(fault["msg"]).removeprefix("Value error, ")
    return f"{flag}: {text}" if key else text
