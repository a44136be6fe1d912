"""The daemon's settings: one frozen model, flags over environment over a TOML file, whole at construction.

What is waited for, and how long, is named here, in `fedpeft.waits`, in `fedpeft_client.patience` and in the run file
(`deadline_s`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Self

from pydantic import Field, field_validator, model_validator
from pydantic_settings import SettingsConfigDict

from fedpeft.addresses import Address
from fedpeft.logs import Level, LogFormat
from fedpeft.settings import ProcessSettings

TURN_S = 10.0
"""How long a transfer is served before it gives way to others that wait."""

GIB = 1024**3


class Settings(ProcessSettings):
    """Holds rounds and folds updates for federated parameter-efficient fine-tuning.

    Example: fedpeft-server --data-dir /var/lib/fedpeft --listen 127.0.0.1:7070 --metrics 127.0.0.1:9464
    """

    model_config = SettingsConfigDict(env_prefix="FEDPEFT_SERVER_")

    program: ClassVar[str] = "fedpeft-server"

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
    log_format: LogFormat = Field("auto", description="auto: console on a terminal, else JSON.")
    log_level: Level = Field("info", description="Least severity logged.")

    @field_validator("listen", "metrics")
    @classmethod
    def _address(cls, value: str) -> str:
        if value:
            Address.parse(value, free=True)
        return value

    @model_validator(mode="after")
    def _loopback_or_insecure(self) -> Self:
        if not self.insecure and not Address.parse(self.listen, free=True).is_loopback:
            raise ValueError(
                f"--listen {self.listen} is not a loopback address and would serve plain text to the network; "
                "listen on 127.0.0.1, or say --insecure"
            )
        return self
