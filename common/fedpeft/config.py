"""The run file: one frozen, validated model of what a run is. `docs/run-file.md` is made from it.

The TOML file, the message `fedpeft.v1.RunConfig` and these models have the same names; a test holds them equal.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from fedpeft import text_files
from fedpeft.config_errors import faults_of, in_file, nested
from fedpeft.errors import ConfigInvalid, FedpeftError, ModelInvalid
from fedpeft.formatting import counted
from fedpeft.registry import registry_of


def _plain(text: str) -> str:
    """Refuses control characters: names are printed on terminals, where they would move the cursor or worse."""
    if wrong := [c for c in text if unicodedata.category(c) == "Cc"]:
        raise ValueError(f"holds the control character {wrong[0]!r}")
    return text


Name = Annotated[str, Field(min_length=1, max_length=64), AfterValidator(_plain)]
ClassName = Annotated[str, Field(min_length=1, max_length=256), AfterValidator(_plain)]

UNLABELLED = "examples"
"""The one class of a task that has none."""


def split_task(text: str) -> tuple[str, str]:
    """Returns the task before the colon, or nothing, and what stands behind it."""
    task, colon, rest = text.partition(":")
    return (task, rest) if colon else ("", text)


_MODEL_NAME = re.compile(r"([a-z][a-z0-9_\-]*:)?[A-Za-z0-9_.\-]+")
_HUB_NAME = re.compile(r"(?:hf[-_]hub:(?:timm/)?|timm/)([A-Za-z0-9_.\-]+)")
_WEIGHTS_SUFFIXES = (".bin", ".pt", ".pth", ".safetensors")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelConfig(_Section):
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
        least = 1 if split_task(info.data.get("name", ""))[0] else 2
        if not least <= len(classes) <= 100_000:
            raise ValueError(
                f"{counted(len(classes), 'class', 'classes')}; at least {least} (and at most 100,000) are needed"
            )
        classes = tuple(unicodedata.normalize("NFC", name) for name in classes)  # as sites compare them
        if twice := sorted(name for name, times in Counter(classes).items() if times > 1):
            raise ValueError(f"class {twice[0]!r} is named twice")
        return classes


class _Optioned(_Section):
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


def _registered(package: str, name: str) -> str:
    """Returns a name that a package's registry knows; raises `ValueError` for another."""
    try:
        registry_of(package).get(name)
    except FedpeftError as error:
        raise ValueError(error.message) from None
    return name


def _known(package: str) -> AfterValidator:
    """Returns what refuses a name that a package's registry does not know."""
    return AfterValidator(partial(_registered, package))


def _check_options(package: str, name: str, options: Mapping[str, Any]) -> None:
    """Checks the options of what is registered under a name; raises the faults of keys below `options`."""
    try:
        registry_of(package).get(name).Options.model_validate(options)
    except ValidationError as error:
        raise nested(error, options) from None


class PeftConfig(_Optioned):
    """`[peft]`: the method; its options stand beside it and are checked by the method itself."""

    method: Annotated[str, Field(min_length=1, max_length=64)]
    """Registered name of the method: full, head, bias, adapter, prompt, lora..."""


def default_quorum(clients: int) -> int:
    """Returns the quorum of a run that names none: three quarters, rounded up, and one fewer than two or three."""
    return max(1, min(clients - 1, -(-3 * clients // 4)))


DEFAULT_POLICY = "synchronous"
"""The policy of rounds where none is given."""

DEFAULT_STALENESS = 10
"""`max_staleness` where it is not given."""


class RoundsConfig(_Section):
    """`[rounds]`: how many rounds, of how many clients, and when a round closes."""

    count: Annotated[int, Field(ge=1, le=1_000_000)] = 10
    """Number of rounds."""
    clients: Annotated[int, Field(ge=1, le=100_000)] = 8
    """Clients whose updates a round wants."""
    quorum: Annotated[int, Field(ge=1, le=100_000)] | None = None
    """Fewest updates a round commits with at its deadline; if absent three quarters of `clients`, 1 of 2, 2 of 3."""
    min_available: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """Clients that must wait before any are sampled; if absent as many as are sampled, after a minute the quorum."""
    deadline_s: Annotated[float, Field(ge=0.1, le=30 * 86_400)] = 600.0
    """Seconds from a round's opening to its deadline."""
    over_selection: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Share of clients sampled beyond `clients`; the round closes once `clients` updates are there."""
    max_extensions: Annotated[int, Field(ge=0, le=1000)] = 3
    """Deadlines a round may miss without a quorum before the run is paused."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of the run: sampling, initialisation and local training derive from it."""
    policy: Annotated[str, _known("fedpeft.rounds.policies")] | None = None
    """synchronous (if absent): a round's updates all start from the version before it. buffered (only simulated yet):
    `concurrency` clients always train, and `clients` updates, of whatever age, make a version."""
    concurrency: Annotated[int, Field(ge=1, le=100_000)] | None = None
    """Clients that train at once in buffered rounds; if absent as many as `clients` and `over_selection` say."""
    max_staleness: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    """Versions that may be made while a client trains before its update is late, in buffered rounds; if absent 10."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        given = (key for key in ("concurrency", "max_staleness") if getattr(self, key) is not None)
        for key in given:  # as a rule there is none, and no policy need be imported
            if key not in registry_of("fedpeft.rounds.policies").get(self.policy_name).settings:
                raise ValueError(f'{key} is not a setting of rounds with policy = "{self.policy_name}"')
        if self.quorum is not None and self.quorum > self.clients:
            raise ValueError(f"quorum {self.quorum} is more than clients {self.clients}")
        if self.min_available is not None and self.min_available < self.needed:
            wanted = counted(self.needed, "update")
            raise ValueError(f"min_available {self.min_available} is less than the {wanted} that a round needs")
        return self

    @property
    def sampled(self) -> int:
        """Clients given a ticket when a round opens; in buffered rounds those that train at once."""
        return self.concurrency or math.ceil(self.clients * (1 + self.over_selection))

    @property
    def policy_name(self) -> str:
        """The registered policy of the rounds."""
        return self.policy or DEFAULT_POLICY

    @property
    def most_stale(self) -> int:
        """Most versions that an update may be behind."""
        return DEFAULT_STALENESS if self.max_staleness is None else self.max_staleness

    @property
    def needed(self) -> int:
        """Updates a round commits with at its deadline."""
        return self.quorum or default_quorum(self.clients)

    @property
    def available(self) -> int:
        """Clients with which a round opens as soon as they wait."""
        return self.min_available or self.sampled

    @property
    def least_available(self) -> int:
        """Clients with which a round opens if no more come for a while."""
        return self.min_available or self.needed


DEFAULT_EPOCHS = 1
"""Passes over the local data where neither epochs nor steps is given."""


PLAIN = "plain"
"""The local algorithm where none is given."""


class AlgorithmConfig(_Optioned):
    """`[training.algorithm]`: the rule that local training follows; its options stand beside `name`."""

    name: Annotated[str, _known("fedpeft.algorithms")] = PLAIN
    """plain, fedprox, scaffold..."""

    @model_validator(mode="after")
    def _options_fit(self) -> Self:
        _check_options("fedpeft.algorithms", self.name, self.options)
        return self


class TrainingConfig(_Section):
    """`[training]`: what a client does with its data in a round."""

    epochs: Annotated[int, Field(ge=1, le=100_000)] | None = None
    """Passes over the local data; 1 if neither epochs nor steps is given."""
    steps: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    """Optimizer steps instead of epochs."""
    batch_size: Annotated[int, Field(ge=1, le=65_536)] = 64
    """Images in an optimizer step."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """sgd is Nesterov SGD, as in the paper."""
    learning_rate: Annotated[float, Field(gt=0, le=100)] = 0.01
    """Constant within a round."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """SGD's momentum."""
    weight_decay: Annotated[float, Field(ge=0, le=10)] = 1e-4
    """L2 for SGD, decoupled for AdamW."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto is bfloat16 where a GPU has it, else float32."""
    augmentation: Literal["none", "flip", "crop"] = "flip"
    """flip: horizontal; crop: random crop with padding 4 (at 32 px, scaled) and flip, the paper's CIFAR-100 setting."""
    algorithm: AlgorithmConfig | None = None
    """The table `[training.algorithm]`: a rule beside the loss, such as FedProx; plain if absent."""

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("give epochs or steps, not both")
        return self


class AggregationConfig(_Optioned):
    """`[aggregation]`: how updates are folded; options of the strategy stand beside it."""

    strategy: Annotated[str, _known("fedpeft.aggregation")] = "fedavg"
    """fedavg, fedavgm, fedadam, fedyogi, fedadagrad, fednova, fedbuff, median, lora_fair..."""
    norm_factor: Annotated[float, Field(ge=0, le=1e9)] | None = None
    """An update is folded up to so many times the median norm of its round and those before; 30 if absent, 0: any."""

    @field_validator("norm_factor")
    @classmethod
    def _above_the_median(cls, factor: float | None) -> float | None:
        if factor is not None and 0 < factor < 1:
            raise ValueError("must be at least 1, or 0 for no limit")
        return factor

    @model_validator(mode="after")
    def _options_fit(self) -> Self:
        _check_options("fedpeft.aggregation", self.strategy, self.options)
        return self


class CodecConfig(_Section):
    """`[codec]`: how tensors travel."""

    up: str = "float32"
    """float32, float16, bfloat16, or sparse; or a codec that is installed beside fedpeft."""
    down: str = "float32"
    """Encoding of adapter versions on their way to clients: as `up`, but for those that are sparse."""
    density: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Share of values kept by sparse: the largest by magnitude over the whole update."""
    values: str = "float32"
    """Encoding of the values that sparse keeps: float32, float16 or bfloat16."""
    error_feedback: bool = True
    """Adds what was not sent, or not counted, to the client's next update."""

    @field_validator("up")
    @classmethod
    def _of_updates(cls, name: str) -> str:
        # The registry knows sparse with the encoding of its values; a run file names that beside it.
        known = sorted({each.partition("+")[0] for each in registry_of("fedpeft.codecs").names()})
        if name not in known:
            raise ValueError(f"there is no encoding {name!r}; there are: {', '.join(known)}")
        return name

    @field_validator("down")
    @classmethod
    def _whole(cls, name: str) -> str:
        registry = registry_of("fedpeft.codecs")
        if any(each.startswith(f"{name}+") for each in registry.names()) or (
            registry.get(_registered("fedpeft.codecs", name)).is_sparse
        ):
            raise ValueError(f"{name!r} is sparse, and a version has all of its values")
        return name

    @field_validator("values")
    @classmethod
    def _of_sparse(cls, name: str) -> str:
        known = sorted({each.partition("+")[2] for each in registry_of("fedpeft.codecs").names()} - {""})
        if name not in known:
            raise ValueError(f"there is no encoding {name!r} of kept values; there are: {', '.join(known)}")
        return name

    @model_validator(mode="after")
    def _composes(self) -> Self:
        _registered("fedpeft.codecs", self.encoding)
        return self

    @property
    def encoding(self) -> str:
        """The registered codec of updates: `up`, or with `values` behind it where such a one is (`sparse+float32`)."""
        composed = f"{self.up}+{self.values}"
        return composed if composed in registry_of("fedpeft.codecs") else self.up


class PrivacyConfig(_Section):
    """`[privacy]`: bounds on what one client can contribute; none if absent."""

    clip_norm: Annotated[float, Field(gt=0, le=1e9)] | None = None
    """Largest Euclidean norm of an update over all its tensors: the client scales it down, the server refuses more."""


class SimulationConfig(_Section):
    """`[simulation]`: ignored by a daemon."""

    clients: Annotated[int, Field(ge=1, le=1_000_000)] = 8
    """Simulated clients among which the data is partitioned."""
    partition: Literal["iid", "dirichlet", "quantity", "natural"] = "iid"
    """Scheme of the division; with `column` given, natural."""
    alpha: Annotated[float, Field(gt=0)] = 0.1
    """Concentration for dirichlet and quantity: smaller is more skewed."""
    column: str | None = None
    """The column whose values are the clients, for natural."""
    image_column: str | None = None
    """Column of parquet that holds the images; image or img if absent."""
    label_column: str | None = None
    """Column of parquet that holds the labels; label or labels if absent."""
    max_image_pixels: Annotated[int, Field(ge=1)] | None = None
    """Pixels of the largest image that is opened; Pillow's limit, 178,956,970, if absent."""
    engine: Annotated[str, Field(min_length=1, max_length=64)] = "inprocess"
    """Registered name of the engine of the simulated clients: inprocess (one after the other), processes (several)."""
    workers: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Worker processes of the engine processes; as many as there are cores for torch's threads if absent."""

    @model_validator(mode="after")
    def _one_scheme(self) -> Self:
        if self.partition == "natural" and self.column is None:
            raise ValueError("partition natural needs column")
        if self.column is not None and "partition" in self.model_fields_set and self.partition != "natural":
            raise ValueError(f"column {self.column!r} is for partition natural, not {self.partition}")
        return self

    @property
    def scheme(self) -> Literal["iid", "dirichlet", "quantity", "natural"]:
        """The partition that is meant."""
        return self.partition if self.column is None else "natural"


class RunConfig(_Section):
    """A run file."""

    name: Name = "run"
    """A label for people; need not be unique."""
    model: ModelConfig
    peft: PeftConfig
    rounds: RoundsConfig = Field(default_factory=RoundsConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    aggregation: AggregationConfig = Field(default_factory=AggregationConfig)
    codec: CodecConfig = Field(default_factory=CodecConfig)
    privacy: PrivacyConfig | None = None
    simulation: SimulationConfig | None = None


def parse_config(data: Mapping[str, Any]) -> RunConfig:
    """Validates a run configuration that came from anywhere but a file.

    Raises:
        ConfigInvalid: With one field-level fault for each field that is wrong.
    """
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        faults = faults_of(error, data)
        raise ConfigInvalid("; ".join(f"{path}: {text}" for path, text in faults), faults) from None


def load_run_file(path: Path) -> RunConfig:
    """Reads and validates a TOML run file.

    Raises:
        ConfigInvalid: If the file cannot be read, is not TOML, or breaks a rule; with file, line and field.
    """
    text = _read(path)
    try:
        data = text_files.toml(text)
    except ValueError as error:
        raise ConfigInvalid(f"{path} is not a TOML file: {error}") from None
    with faults_in(path):
        return parse_config(data)


@contextmanager
def faults_in(path: Path) -> Iterator[None]:
    """Gives the faults of a run file that are found inside their lines: some show only once the model is built.

    Raises:
        ConfigInvalid: For every error that names fields, with file, line and field; others pass as they are.
    """
    try:
        yield
    except (ConfigInvalid, ModelInvalid) as error:
        if not error.fields:
            raise
        raise ConfigInvalid(in_file(path, _read(path), error.fields), error.fields) from None


def _read(path: Path) -> str:
    try:
        return text_files.read(path)
    except OSError as error:
        raise ConfigInvalid(f"cannot read run file {path}: {error.strerror}") from None
    except text_files.NotText as error:
        raise ConfigInvalid(f"{path} is not a TOML file: {error}") from None
