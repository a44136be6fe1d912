"""Between the domain's frozen values and the protocol's messages; the only place where one becomes the other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, cast

from google.protobuf import json_format
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from fedpeft.adapters.payload import Entry, Manifest, entry_fault
from fedpeft.adapters.spec import ADAPTER, DTYPE, AdapterSpec, Section, TensorRole, TensorSpec, spec_fault
from fedpeft.config import DEFAULT_EPOCHS, RunConfig, TrainingConfig, parse_config
from fedpeft.errors import ConfigInvalid, ManifestInvalid, SpecInvalid
from fedpeft.v1 import run_pb2, tensor_pb2

MESSAGE_LIMIT_BYTES = 4 * 1024 * 1024
"""Largest message either side takes: gRPC's own default, four times a chunk."""
CLIENT_KEY = "fedpeft-client"
INSTANCE_KEY = "fedpeft-instance"
PROCESS_KEY = "fedpeft-process"
TURN_KEY = "fedpeft-turn"
"""Entry of the initial metadata that says that an upload may send its chunks; a refusal has none."""

_ROLES = {
    TensorRole.SENT: tensor_pb2.ROLE_SENT,
    TensorRole.LOCAL: tensor_pb2.ROLE_LOCAL,
    TensorRole.FROZEN: tensor_pb2.ROLE_FROZEN,
    TensorRole.DERIVED: tensor_pb2.ROLE_DERIVED,
}
_ROLES_BACK = {number: role for role, number in _ROLES.items()}


def config_to_proto(config: RunConfig) -> run_pb2.RunConfig:
    """Returns the message of a run configuration; `simulation` stays at home."""
    data = config.model_dump(mode="json", exclude_none=True, exclude={"simulation"})
    return json_format.ParseDict(data, run_pb2.RunConfig())


def config_from_proto(message: run_pb2.RunConfig) -> RunConfig:
    """Returns the validated configuration of a message.

    Raises:
        ConfigInvalid: If a field breaks a rule, or is one of a newer version: whoever does not know a setting would
            train, or fold, otherwise than the run says.
    """
    if unknown := list(_unknown_fields(message)):
        named = ", ".join(f"field {number} of {place or 'the run'}" for place, number in unknown)
        text = f"this version does not know {named}; update the software here"
        raise ConfigInvalid(text, tuple((place, f"field {number} is of a newer version") for place, number in unknown))
    data = json_format.MessageToDict(message, preserving_proto_field_name=True)
    for section in ("model", "peft", "aggregation"):
        if "options" in data.get(section, {}):
            data[section]["options"] = _whole(data[section]["options"])
    if "training" in data:
        data["training"] = training_data(message.training)
    if "seed" in data.get("rounds", {}):
        data["rounds"]["seed"] = int(data["rounds"]["seed"])  # JSON writes whole numbers of 64 bits as text
    return parse_config(data, accepted=True)


def _unknown_fields(message: Message, place: str = "") -> Iterator[tuple[str, int]]:
    """Yields place and number of each field that this version of the protocol does not have, in a message and below."""
    yield from ((place, field.field_number) for field in cast(Iterable[Any], UnknownFieldSet(message)))
    for field, value in message.ListFields():
        if field.message_type is not None and not field.message_type.GetOptions().map_entry:
            for each in value if field.is_repeated else (value,):
                yield from _unknown_fields(each, f"{place}.{field.name}".lstrip("."))


def training_data(message: run_pb2.TrainingConfig) -> dict[str, Any]:
    """Returns the settings of a message as they are validated and stored: names of the run file, plain values."""
    data = json_format.MessageToDict(message, preserving_proto_field_name=True)
    if "options" in data.get("algorithm", {}):
        data["algorithm"]["options"] = _whole(data["algorithm"]["options"])
    return data


def _whole(value: Any) -> Any:
    """Returns what a Struct holds with whole numbers as such: it has numbers of one kind only."""
    if isinstance(value, dict):
        return {key: _whole(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_whole(each) for each in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def training_to_proto(config: TrainingConfig) -> run_pb2.TrainingConfig:
    """Returns the message of local-training settings, whole: one epoch where neither epochs nor steps is said."""
    message = json_format.ParseDict(config.model_dump(mode="json", exclude_none=True), run_pb2.TrainingConfig())
    if config.epochs is None and config.steps is None:
        message.epochs = DEFAULT_EPOCHS
    return message


def spec_to_proto(spec: AdapterSpec) -> tensor_pb2.AdapterSpec:
    """Returns the message of an adapter spec."""
    tensors = [
        tensor_pb2.TensorSpec(
            name=t.name,
            dtype=DTYPE,
            shape=t.shape,
            roles=[_ROLES[r] for r in t.roles],
            section="" if t.section == ADAPTER else t.section.name,
        )
        for t in spec.tensors
    ]
    sections = [
        tensor_pb2.Section(name=s.name, divisor=s.divisor or 0.0, encoding=s.encoding or "") for s in spec.sections
    ]
    return tensor_pb2.AdapterSpec(method=spec.method, tensors=tensors, sections=sections)


def spec_from_proto(message: tensor_pb2.AdapterSpec) -> AdapterSpec:
    """Returns the adapter spec of a message.

    Raises:
        SpecInvalid: If a dtype or role is not one of this protocol's, or the spec breaks a limit.
    """
    sections = {"": ADAPTER} | {s.name: Section(s.name, s.divisor, s.encoding) for s in message.sections}
    if sorted(s.name for s in message.sections) != sorted({t.section for t in message.tensors} - {""}):
        text = "are not those of its tensors, each once"
        raise SpecInvalid(f"the sections of the adapter spec {text}", (("sections", text),))
    for i, t in enumerate(message.tensors):
        if t.dtype != DTYPE:
            raise spec_fault(i, "dtype", t.name, f"has dtype {t.dtype[:16]!r}; only {DTYPE} is allowed")
        if any(r not in _ROLES_BACK for r in t.roles):
            raise spec_fault(i, "roles", t.name, "has a role that is not sent, local or frozen")
    tensors = tuple(
        TensorSpec(t.name, tuple(t.shape), tuple(_ROLES_BACK[r] for r in t.roles), sections[t.section])
        for t in message.tensors
    )
    return AdapterSpec(message.method, tensors)


def manifest_to_proto(manifest: Manifest) -> tensor_pb2.Manifest:
    """Returns the message of a manifest."""
    entries = [
        tensor_pb2.TensorEntry(
            name=e.name,
            dtype=DTYPE,
            shape=e.shape,
            encoding=e.encoding,
            offset=e.offset,
            length=e.length,
        )
        for e in manifest.entries
    ]
    return tensor_pb2.Manifest(tensors=entries, payload_bytes=manifest.payload_bytes, sha256=manifest.sha256)


def manifest_from_proto(message: tensor_pb2.Manifest) -> Manifest:
    """Returns the manifest of a message; whether it fits a spec is `payload.check_manifest`'s to say.

    Raises:
        ManifestInvalid: If a dtype is not this protocol's, or the digest has not 32 bytes.
    """
    for i, e in enumerate(message.tensors):
        if e.dtype != DTYPE:
            raise entry_fault(i, "dtype", e.name, f"has dtype {e.dtype[:16]!r}; only {DTYPE} is allowed")
    if len(message.sha256) != 32:
        text = f"has {len(message.sha256)} bytes; a SHA-256 digest has 32"
        raise ManifestInvalid(f"the manifest's sha256 {text}", (("sha256", text),))
    entries = tuple(Entry(e.name, tuple(e.shape), e.encoding, e.offset, e.length) for e in message.tensors)
    return Manifest(entries, message.payload_bytes, message.sha256)
