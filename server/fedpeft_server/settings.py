"""The daemon's settings: one frozen model, flags over environment over a TOML file, whole at construction."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, field_validator, model_validator
from pydantic_settings import SettingsConfigDict

from fedpeft.process.addresses import (
    LAST_PORT,
    Address,
    check_database_url,
    check_endpoint,
    check_folder,
    check_place,
)
from fedpeft.process.logs import Level, LogFormat
from fedpeft.process.settings import ProcessSettings
from fedpeft_server.access.files import Files
from fedpeft_server.store import database_url

GIB = 1024**3
_FOLDERS = ("data_dir", "identity")


class Settings(ProcessSettings):
    """Holds rounds and folds updates for federated parameter-efficient fine-tuning.

    Every setting may be a flag, an environment variable (FEDPEFT_SERVER_DATA_DIR for --data-dir) or a key of the
    --config file (data_dir), in this order of precedence. It serves until SIGTERM or Ctrl-C, and goes on where it was.

    Commands beside it, each with a --help of its own: init, certificate, authority, check, backup, restore.

    Exit codes: 0 told to stop by a signal; 1 failed; 2 wrong settings, an unusable folder, or a port in use.

    --version prints the version, --print-completion bash (or zsh, tcsh) a script that completes the flags.

    Example: fedpeft-server --data-dir /var/lib/fedpeft --listen 127.0.0.1:7070 --metrics 127.0.0.1:9464
    """

    model_config = SettingsConfigDict(env_prefix="FEDPEFT_SERVER_")

    program: ClassVar[str] = "fedpeft-server"

    data_dir: Path = Field(description="Folder of the database, adapter versions and spooled updates; made if missing.")
    listen: str = Field("127.0.0.1:7070", description="HOST:PORT that gRPC is served on.")
    metrics: str = Field("127.0.0.1:9464", description="HOST:PORT that Prometheus metrics are served on; empty: none.")
    traces: str = Field(
        "", description="http://HOST:PORT or https://HOST:PORT of an OTLP receiver (gRPC) for traces; empty: none."
    )
    database: str = Field(
        "", description="SQLAlchemy URL; empty: SQLite in the data folder. Several daemons may share a PostgreSQL."
    )
    blobs: str = Field(
        "", description="Where adapter versions are kept: folder, s3://, gs:// or az://; empty: data folder."
    )
    updates: str = Field(
        "",
        description="Where received updates are kept too until their round is over, so that they outlive this machine: "
        "folder, s3://, gs:// or az://; empty: data folder alone.",
    )
    identity: Path | None = Field(
        None,
        description="Folder of the server's certificates, as fedpeft-server init makes it; absent: identity in the "
        "data folder. Without certificates plain text is served, on a loopback address only.",
    )
    enroll: str = Field(
        "", description="HOST:PORT that devices enroll at; empty: the port after that of --listen, on the same host."
    )
    advertise: str = Field(
        "", description="HOST:PORT under which clients reach --listen; empty: its port on the certificate's first host."
    )
    advertise_enroll: str = Field(
        "", description="HOST:PORT under which devices reach --enroll; empty: as --advertise."
    )
    certificate_life_s: Annotated[int, Field(ge=4, le=31_536_000)] = Field(
        7 * 86_400,
        description="Seconds that the certificates of clients and evaluators are valid; they renew half-way.",
    )
    insecure: bool = Field(
        False,
        description="Serve plain text beyond the loopback interface, or where certificates were in use. Use it only "
        "on a network you trust.",
    )
    max_update_bytes: Annotated[int, Field(ge=1024, le=1024 * GIB)] = Field(
        2 * GIB, description="Largest payload taken, in bytes."
    )
    min_free_bytes: Annotated[int, Field(ge=0)] | None = Field(
        None,
        description="Free space that uploads, new runs and versions encoded for clients leave, in bytes, on the disks "
        "of the data folder and of folders that --blobs and --updates name; they are answered with DISK_FULL, and "
        "tried again. Absent: a twentieth of the disk, 1 GiB at most.",
    )
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
    keep_versions: Annotated[int, Field(ge=2)] | None = Field(
        None,
        description="Newest adapter versions of each run that are kept, beside version 0, the best scored of the "
        "others, and those that tickets start from; files of others are removed, their records stay. Absent: all are "
        "kept.",
    )
    keep_versions_every: Annotated[int, Field(ge=0)] = Field(
        0, description="With --keep-versions: each version whose number this divides is kept too; 0: none."
    )
    log_format: LogFormat = Field("auto", description="auto: console on a terminal, else JSON.")
    log_level: Level = Field("info", description="Least severity logged; debug has a line for every call.")

    @property
    def certificates(self) -> Path:
        """The folder of the server's certificates, whether there are any or not."""
        return self.identity or self.data_dir / "identity"

    @property
    def database_url(self) -> str:
        """The URL of the database."""
        return database_url(self.database, self.data_dir)

    @property
    def enroll_address(self) -> str:
        """HOST:PORT that devices enroll at."""
        listen = Address.parse(self.listen, free=True)
        return self.enroll or str(Address(listen.host, listen.port + 1 if listen.port else 0))

    @field_validator("listen", "metrics", "enroll")
    @classmethod
    def _address(cls, value: str) -> str:
        if value:
            Address.parse(value, free=True)
        return value

    @field_validator("traces")
    @classmethod
    def _endpoint(cls, value: str) -> str:
        return check_endpoint(value) if value else value

    @field_validator("database")
    @classmethod
    def _database_url(cls, value: str) -> str:
        return check_database_url(value) if value else value

    @field_validator("blobs", "updates")
    @classmethod
    def _place(cls, value: str) -> str:
        return check_place(value)

    @field_validator(*_FOLDERS, mode="before")
    @classmethod
    def _folder(cls, value: Any) -> Any:
        return check_folder(value) if isinstance(value, str) else value

    @field_validator("advertise", "advertise_enroll")
    @classmethod
    def _advertised(cls, value: str) -> str:
        return str(Address.parse(value)) if value else value

    @model_validator(mode="before")
    @classmethod
    def _named(cls, given: Any) -> Any:
        """Leaves out folders without a name, which would be the current one."""
        return {key: value for key, value in given.items() if not (key in _FOLDERS and value == "")}

    @model_validator(mode="after")
    def _retained(self) -> Self:
        if self.keep_versions_every and not self.keep_versions:
            raise ValueError(
                f"--keep-versions-every {self.keep_versions_every} says nothing without --keep-versions: all versions "
                "are kept; give both"
            )
        return self

    @model_validator(mode="after")
    def _certificates_or_plain(self) -> Self:
        secured = Files(self.certificates).exist()
        if left := Files(self.certificates).leftovers():
            raise ValueError(
                f"{self.certificates} has no server.pem beside {' and '.join(left)}; restore the folder from the "
                "backup, make what is missing with `fedpeft-server init`, or move it away for a server of plain text"
            )
        if self.identity and not secured:
            raise ValueError(
                f"--identity {self.identity} has no server.pem; `fedpeft-server init` makes such a folder, and "
                "docs/security.md says what is in one of your own"
            )
        if secured and self.insecure:
            raise ValueError(
                f"--insecure would serve plain text, and there are certificates in {self.certificates}; leave out the "
                "one or move the others away"
            )
        if not (secured or self.insecure or Address.parse(self.listen, free=True).is_loopback):
            raise ValueError(
                f"--listen {self.listen} is not a loopback address and would serve plain text to the network; "
                "`fedpeft-server init` makes certificates, or listen on 127.0.0.1, or say --insecure"
            )
        listen = Address.parse(self.listen, free=True)
        if Files(self.certificates).enrols() and not self.enroll and listen.port == LAST_PORT:
            raise ValueError(
                f"--listen {listen} leaves no port after it, where devices would enroll; name one with --enroll"
            )
        return self

    @model_validator(mode="after")
    def _ports_apart(self) -> Self:
        given = {"--listen": self.listen, "--metrics": self.metrics, "--enroll": self.enroll}
        if Files(self.certificates).enrols():
            given["--enroll"] = self.enroll_address
        places = [(flag, Address.parse(text, free=True)) for flag, text in given.items() if text]
        for (one, here), (other, there) in combinations(places, 2):
            if here.port == there.port != 0 and (here.host == there.host or here.is_every or there.is_every):
                raise ValueError(f"{one} {here} and {other} {there} are one port; give each its own")
        return self
