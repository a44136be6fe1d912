"""Settings: flags over environment (`FEDPEFT_CLIENT_*`) over a TOML file; whole and frozen once made."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, field_validator, model_validator
from pydantic_settings import SettingsConfigDict

from fedpeft import ids
from fedpeft.data.reading import MAX_PIXELS
from fedpeft.identity.folder import Identity
from fedpeft.process.addresses import Address, check_endpoint
from fedpeft.process.logs import LogFormat
from fedpeft.process.settings import ProcessSettings
from fedpeft_client.enrolment import site_identity
from fedpeft_client.relay import options as relaying
from fedpeft_client.relay.options import RelayOptions

_PATTERNS = {
    "name": (ids.CLIENT, ids.CLIENT_FORM),
    "run": (ids.RUN, "a run's id, for example run-0a1b2c3d4e5f"),
    "device": (re.compile(r"auto|cpu|cuda(:[0-9]+)?"), "auto, cpu, cuda or cuda:N"),
}


class Settings(ProcessSettings):
    """Takes part in federated fine-tuning with the data of this site; the data never leaves it.

    Every setting may be a flag, an environment variable (FEDPEFT_CLIENT_SERVER for --server) or a key of the --config
    file (server), in this order of precedence.

    Commands beside it, each with a --help of its own: enroll, leave, ledger, status.

    Each run is offered to this client, which looks whether data, model and method suit it, and accepts or declines with
    the reason. It judges every run anew when it is started.

    Exit codes: 0 done, or asked to stop by a signal; 1 failed; 2 wrong usage or settings; 3 the server cannot be
    reached (--once and --dry-run only, otherwise the client keeps trying); 4 the run of --run does not suit this site,
    or, with --once or --dry-run, none of the runs does; 5 the server does not let this client in: its certificate has
    ended or was revoked, or its role has no right to what it does.

    --version prints the version, --print-completion bash (or zsh, tcsh) a script that completes the flags.

    Example: fedpeft-client --server 127.0.0.1:7070 --name site-a --data photos --state-dir state --dry-run
    """

    model_config = SettingsConfigDict(env_prefix="FEDPEFT_CLIENT_", env_ignore_empty=True)

    program: ClassVar[str] = "fedpeft-client"
    shortcuts: ClassVar[dict[str, str]] = {"v": "verbose"}

    server: str
    """Address of the server, HOST:PORT; not needed where this client was enrolled."""
    name: str
    """Id of this client: 1 to 64 letters, digits, dots, underscores, hyphens; no two clients of a server share one; not
    needed where this client was enrolled."""
    data: Path | None = None
    """The images: parquet (a file, or a folder of files), or a folder of class folders; or TASK:PATH (extending.md).
    Needed unless --relay stands in its place."""
    state_dir: Path
    """Folder that is this client's memory: its ticket, update, residual and local tensors."""
    identity: Path | None = None
    """Folder with key and certificate, as `fedpeft-client enroll` writes it; if absent, identity in the state
    directory, if that is there, else plain text."""
    evaluate: bool = False
    """Score committed versions on the data instead of training on it."""
    once: bool = False
    """End once every run is finished or was declined by this client; with 4 if it declined all it was offered."""
    dry_run: bool = False
    """Open every image, check model, weights and server, say what would happen, and end; the server keeps nothing."""
    run: str | None = None
    """Id of the only run to work for; any if absent."""
    weights: Path | None = None
    """File with the backbone's weights, in place of what the run names; the fingerprint proves it right."""
    label_map: Path | None = None
    """File that maps labels of the data to classes of the run."""
    image_column: str | None = None
    """Column of parquet that holds the images; image or img if absent."""
    label_column: str | None = None
    """Column of parquet that holds the labels; label or labels if absent."""
    max_image_pixels: Annotated[int, Field(ge=1)] = MAX_PIXELS
    """Pixels of the largest image that is opened; a larger one may be meant to fill memory and counts as unreadable."""
    relay: str | None = None
    """HOST:PORT of the server of an edge, in place of --data: this client trains nothing, but has that server collect
    the updates of the edge's own clients, and sends the sum of them for its update (hierarchy.md)."""
    relay_identity: Path | None = None
    """With --relay: folder with the key and certificate of an operator of that server, as fedpeft enroll writes it;
    plain text if absent."""
    relay_clients: Annotated[int, Field(ge=1, le=100_000)] | None = None
    """With --relay, and needed there: clients whose updates a round of the edge wants."""
    relay_quorum: Annotated[int, Field(ge=1, le=100_000)] | None = None
    """With --relay: fewest updates that a sum is made of at its deadline; if absent three quarters of --relay-clients,
    1 of 2, 2 of 3."""
    relay_deadline_s: Annotated[float, Field(ge=0.1, le=30 * 86_400)] | None = None
    """With --relay: seconds from the opening of a round of the edge to its deadline, at most the run's deadline_s;
    three quarters of that if absent."""
    relay_examples: Annotated[int, Field(ge=1, le=10**9)] | None = None
    """With --relay: most examples that the edge's clients have together, which is told to the server; it takes no more
    in an update, and 100,000 if absent."""
    policy: Path | None = None
    """TOML file with what a server may ask for (docs/site-owner.md); if absent, policy.toml in the state directory, if
    that is there, else nothing is limited."""
    metrics: str = ""
    """HOST:PORT that this client's own Prometheus metrics are served on; empty: none."""
    traces: str = ""
    """http://HOST:PORT or https://HOST:PORT of an OTLP receiver (gRPC) for traces; empty: none."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:N."""
    threads: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Threads that torch computes with; torch's own choice if absent. Recorded with every update."""
    rank: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Largest rank of LoRA factors that this device trains and sends, in runs whose strategy takes unequal ranks, as
    flora does; the run's if absent."""
    checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, more time, the same bits."""
    log_format: LogFormat = "auto"
    """console for people, json for machines; auto is console on a terminal, else json."""
    insecure: bool = False
    """Allow plain text to a server (--server or --relay), or metrics for readers, that are not on this machine."""
    verbose: bool = False
    """More log lines, and the traceback of an error that ends the client."""

    @field_validator("name", "run", "device")
    @classmethod
    def _patterned(cls, value: str | None, info: Any) -> str | None:
        pattern, wanted = _PATTERNS[info.field_name]
        if value is not None and not pattern.fullmatch(value):
            raise ValueError(f"{value!r} is not {wanted}")
        return value

    @field_validator("server", "relay")
    @classmethod
    def _address(cls, value: str | None) -> str | None:
        if value is not None:
            Address.parse(value)
        return value

    @field_validator("traces")
    @classmethod
    def _endpoint(cls, value: str) -> str:
        return check_endpoint(value) if value else value

    @field_validator("metrics")
    @classmethod
    def _metrics_address(cls, value: str) -> str:
        if value:
            Address.parse(value)
        return value

    @model_validator(mode="after")
    def _metrics_private(self) -> Self:
        if self.metrics and not Address.parse(self.metrics).is_loopback and not self.insecure:
            raise ValueError(
                f"metrics {self.metrics} is not a loopback address, and anyone who can reach it can read them; "
                "use 127.0.0.1, or say --insecure if the network is trusted"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _enrolled(cls, given: Any) -> Any:
        """Takes server and name from the identity where there is one.

        Raises:
            IdentityInvalid: If there is none and neither is named, or it cannot be used.
        """
        if given.get("identity") == "":  # without a name it would be the current folder
            given = {key: value for key, value in given.items() if key != "identity"}
        where = site_identity.find(given.get("identity"), given.get("state_dir"))
        if where is None:
            state_dir = given.get("state_dir")
            if isinstance(state_dir, str | Path) and not given.keys() & {"server", "name"}:
                raise site_identity.no_identity(Path(state_dir))
            return given
        identity = Identity.load(where)
        return {"server": identity.server, "name": identity.subject.name, **given, "identity": where}

    @model_validator(mode="after")
    def _data_or_relay(self) -> Self:
        fields = type(self).model_fields
        said = {name: getattr(self, name) for name in (*relaying.OF_OTHERS, *relaying.OF_RELAY)}
        given = {name: value for name, value in said.items() if value != fields[name].default}
        relaying.check_together(self.data, self.relay, given)
        if self.relay is not None:
            relaying.check_address(self.relay, self.server)
            relaying.check_identity(self.relay, self.relay_identity, insecure=self.insecure)
        return self

    @property
    def relaying(self) -> RelayOptions | None:
        """The work of a relay; None for a client that trains or scores."""
        if self.relay is None or self.relay_clients is None:
            return None
        return RelayOptions(
            self.relay,
            self.name,
            self.relay_clients,
            self.relay_quorum,
            self.relay_deadline_s,
            self.relay_examples,
            self.relay_identity,
        )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.identity is not None:
            elsewhere = [self.metrics] + ([self.relay] if self.relay and self.relay_identity is None else [])
            for_others = any(each and not Address.parse(each).is_loopback for each in elsewhere)
            site_identity.check(
                Identity.load(self.identity),
                server=self.server,
                name=self.name,
                evaluate=self.evaluate,
                insecure=self.insecure and not for_others,
            )
        elif not Address.parse(self.server).is_loopback and not self.insecure:
            raise ValueError(
                f"server {self.server} is not on this machine and the connection is plain text; enroll this client "
                "(fedpeft-client enroll), use a loopback address, or say --insecure if the network between is trusted"
            )
        return self
