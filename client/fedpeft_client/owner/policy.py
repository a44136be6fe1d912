"""The policy of a site: what its owner lets a server ask for. One frozen model of a TOML file.

A key that is absent allows; a key that there is not, or a wrong value, is an error with file and line. The file is read
once, when the client starts.
"""

from __future__ import annotations

import hashlib
import os
import re
from datetime import datetime, time, timedelta
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from fedpeft import text_files
from fedpeft.config import Mechanism
from fedpeft.config_errors import faults_of, in_file
from fedpeft.errors import SettingsInvalid
from fedpeft.process import durable
from fedpeft_client.state.state_dir import POLICY, POLICY_FILE

_HOURS = re.compile(r"([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-3]):([0-5]\d)")
_FINGERPRINT = re.compile(r"[0-9a-f]{16,64}")


def _hours(text: str) -> str:
    match = _HOURS.fullmatch(text)
    if not match or match.group(1, 2) == match.group(3, 4):
        raise ValueError(f"{text!r} is not HH:MM-HH:MM with two different times, for example 20:00-06:00")
    return text


def _fingerprint(text: str) -> str:
    if not _FINGERPRINT.fullmatch(text):
        raise ValueError(f"{text!r} is not a fingerprint, or its first 16 or more hexadecimal digits")
    return text


def _encoding(name: str) -> str:
    from fedpeft.codecs import codecs  # only now: few policies name any, and it needs NumPy

    if name not in codecs.names():
        raise ValueError(f"there is no encoding {name!r}; there are: {', '.join(codecs.names())}")
    return name


def _some(hours: tuple[str, ...]) -> tuple[str, ...]:
    if not hours:
        raise ValueError("names no hours; without any the client would never work")
    return hours


def _folder(text: str) -> str:
    if not Path(text).is_absolute() or ".." in Path(text).parts:
        raise ValueError(f"{text!r} is not an absolute path without ..")
    return text


_HourTexts = Annotated[tuple[Annotated[str, AfterValidator(_hours)], ...], Field(strict=False)]
_Texts = Annotated[tuple[str, ...], Field(strict=False)]  # TOML and JSON have lists only
_Count = Annotated[int, Field(ge=1, lt=2**63)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class RunRules(_Section):
    """`[runs]`: which runs."""

    ids: _Texts | None = None
    """Runs by id; with `names` too, a run must be in one of the two."""
    names: _Texts | None = None
    """Runs by name, with `*` and `?`. The operator chooses a run's name: it says what is meant, and proves nothing."""
    max_rounds: _Count | None = None
    """Most rounds of a run, and most updates of one that ever leave this device."""


class ModelRules(_Section):
    """`[model]`: which backbones, and where their weights may come from."""

    names: _Texts | None = None
    """timm's names, with `*` and `?`."""
    fingerprints: Annotated[tuple[Annotated[str, AfterValidator(_fingerprint)], ...], Field(strict=False)] | None = None
    """Backbones by fingerprint, or the first 16 or more digits of it; this one proves what is trained."""
    weights_folders: Annotated[tuple[Annotated[str, AfterValidator(_folder)], ...], Field(strict=False)] | None = None
    """Folders in which a file that a run names may lie; what `--weights` names is the owner's own word."""
    hub: bool = True
    """Allows weights to be fetched from the hub."""
    max_image_size: _Count | None = None
    """Largest side of the input in pixels."""


class PeftRules(_Section):
    """`[peft]`: what may be tuned."""

    methods: _Texts | None = None
    """PEFT methods by name."""
    max_parameters: _Count | None = None
    """Most parameters tuned."""


class TrainingRules(_Section):
    """`[training]`: how long and how much at once, whatever a run or a ticket asks for."""

    max_epochs: _Count | None = None
    """Most passes over the data in a round; steps are counted as the passes that they are."""
    max_steps: _Count | None = None
    """Most optimizer steps in a round; epochs are counted as such; 1,000,000 without this and max_epochs."""
    max_batch_size: _Count | None = None
    """Most images in a step."""


class DataRules(_Section):
    """`[data]`: what is asked of this site's own data."""

    min_examples: _Count | None = None
    """Least images of the run's classes: an update from three images says much about each."""


class PrivacyRules(_Section):
    """`[privacy]`: which noise a run must have that this site trains for; docs/privacy.md says what each protects."""

    mechanisms: Annotated[tuple[Mechanism, ...], Field(strict=False, min_length=1)] | None = None
    """The run's mechanism must be one of them: `local`, `example` (this client adds the noise), `central` (the server's
    promise, which nobody here can check). A run without noise is declined."""
    max_epsilon: Annotated[float, Field(gt=0, le=1000, strict=False)] | None = None
    """Most that the run's `target_epsilon` may be; a run without one is declined."""
    max_delta: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Most that its `delta` may be, without which an epsilon says little; a run without one is declined."""


class TransferRules(_Section):
    """`[transfer]`: how much may leave."""

    encodings: Annotated[tuple[Annotated[str, AfterValidator(_encoding)], ...], Field(strict=False)] | None = None
    """Encodings of updates: float32, float16, bfloat16, sparse+float32..."""
    max_payload_bytes: _Count | None = None
    """Most bytes of tensors in an update."""
    max_bytes_a_day: _Count | None = None
    """Most bytes that leave in any 24 hours, by the ledger: those of every message, not of tensors alone. At it, the
    client waits; an upload that goes on needs what is left of it. While it waits it tells the server every 10 s that it
    is there, some 230 kB a day, which count: leave as much above an update."""


class TimeRules(_Section):
    """`[times]`: when this machine may work. Outside, the client waits; a training under way ends."""

    hours: Annotated[_HourTexts, AfterValidator(_some)] | None = None
    """Hours of the day, `HH:MM-HH:MM` in this machine's time, over midnight if the second is earlier."""
    min_battery_percent: Annotated[int, Field(ge=1, le=100)] | None = None
    """Lowest charge on battery power; says nothing while the machine is plugged in, or has no battery."""
    max_temperature_c: Annotated[float, Field(gt=0, le=200, strict=False)] | None = None
    """Highest temperature of any sensor that the system shows, in degrees Celsius."""


class Policy(_Section):
    """All rules of a site; the default allows everything."""

    runs: RunRules = RunRules()
    model: ModelRules = ModelRules()
    peft: PeftRules = PeftRules()
    training: TrainingRules = TrainingRules()
    data: DataRules = DataRules()
    privacy: PrivacyRules = PrivacyRules()
    transfer: TransferRules = TransferRules()
    times: TimeRules = TimeRules()

    @property
    def rules(self) -> dict[str, object]:
        """The keys that limit anything, as the file writes them."""
        given = self.model_dump(mode="json", exclude_defaults=True)
        return {f"{section}.{key}": value for section, keys in given.items() for key, value in keys.items()}

    @property
    def digest(self) -> str:
        """Tells one policy from another; empty for the one that allows everything."""
        return hashlib.sha256(self.model_dump_json(exclude_defaults=True).encode()).hexdigest() if self.rules else ""

    @classmethod
    def read(cls, path: Path) -> Self:
        """Reads a policy file.

        Raises:
            SettingsInvalid: If it cannot be read, is not TOML, or breaks a rule; with file, line and field.
        """
        try:
            text = text_files.read(path)
        except OSError as error:
            raise SettingsInvalid(
                f"--policy: cannot read {path}: {error.strerror}; nothing is done without it"
            ) from None
        except text_files.NotText as error:
            raise SettingsInvalid(f"--policy {path} is not a TOML file: {error}") from None
        try:
            data = text_files.toml(text)
        except ValueError as error:
            raise SettingsInvalid(f"--policy {path} is not a TOML file: {error}") from None
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise SettingsInvalid(in_file(path, text, faults_of(error, data, whole="policy file"))) from None


NO_LIMITS = Policy()
"""The policy of a site whose owner wrote none."""


def find(named: Path | None, state_dir: Path) -> tuple[Policy, Path | None]:
    """Returns the policy that applies, and its file: the one named, else that of the state directory, else none.

    A file that is named, or that lies in the state directory, is never passed over, whatever is wrong with it.

    Raises:
        SettingsInvalid: As `Policy.read`.
    """
    path = named
    if path is None and os.path.lexists(state_dir / POLICY):
        path = state_dir / POLICY
    return (NO_LIMITS, None) if path is None else (Policy.read(path), path)


def note_named(file: Path | None, state_dir: Path) -> None:
    """Notes a policy file outside the state directory, so that `fedpeft-client status` shows it without being told.

    Raises:
        StateInvalid: If the state directory cannot be written.
    """
    path = state_dir / POLICY_FILE
    with durable.refusals(f"writing {path}"):
        if file is None or file == state_dir / POLICY:
            path.unlink(missing_ok=True)
        else:
            durable.write(path, os.fsencode(file.absolute()))


def noted(state_dir: Path) -> Path | None:
    """Returns the policy file outside the state directory that the client began with last; None if there was none."""
    try:
        return Path(os.fsdecode((state_dir / POLICY_FILE).read_bytes()))
    except OSError:
        return None


def matches(patterns: tuple[str, ...], name: str) -> bool:
    """Returns whether a name is one of some patterns."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def opens_at(hours: tuple[str, ...], now: datetime) -> datetime:
    """Returns when one of some hours begins next, or `now` if one of them is."""
    begins = []
    for begin, end in map(_times, hours):
        clock = now.time().replace(tzinfo=None)
        if (begin <= clock < end) if begin < end else (clock >= begin or clock < end):
            return now
        day = now if clock < begin else now + timedelta(days=1)
        begins.append(day.replace(hour=begin.hour, minute=begin.minute, second=0, microsecond=0))
    return min(begins)


def _times(hours: str) -> tuple[time, time]:
    begin, end = hours.split("-")
    return time.fromisoformat(begin), time.fromisoformat(end)
