"""Storage forms of domain values: the configuration as JSON, spec and manifest as the protocol's messages.

What is decoded never changes once written, so decoding is cached by the stored bytes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import lru_cache

from pydantic import TypeAdapter

from fedpeft.adapters.payload import Manifest
from fedpeft.adapters.spec import AdapterSpec
from fedpeft.config import RunConfig
from fedpeft.config.section import ACCEPTED
from fedpeft.privacy.events import Event
from fedpeft.rpc import wire
from fedpeft.v1 import tensor_pb2

_EVENTS: TypeAdapter[list[Event]] = TypeAdapter(list[Event])


def dump_config(config: RunConfig) -> str:
    """Returns a configuration as JSON."""
    return config.model_dump_json()


@lru_cache(maxsize=64)
def load_config(stored: str) -> RunConfig:
    """Returns the configuration of a stored JSON text."""
    return RunConfig.model_validate_json(stored, context=ACCEPTED)


def dump_spec(spec: AdapterSpec) -> bytes:
    """Returns a spec as a serialised message."""
    return wire.spec_to_proto(spec).SerializeToString(deterministic=True)


@lru_cache(maxsize=64)
def load_spec(stored: bytes) -> AdapterSpec:
    """Returns the spec of a serialised message."""
    return wire.spec_from_proto(tensor_pb2.AdapterSpec.FromString(stored))


def dump_events(events: Sequence[Event]) -> str:
    """Returns the events of a round as JSON; empty if there are none."""
    return json.dumps([asdict(event) for event in events]) if events else ""


def load_events(text: str) -> list[Event]:
    """Returns the events of a JSON text."""
    return _EVENTS.validate_json(text)


def dump_layout(manifest: Manifest) -> bytes:
    """Returns a manifest without its digest as a serialised message."""
    return _dump_layout(replace(manifest, sha256=b""))


@lru_cache(maxsize=16)
def _dump_layout(layout: Manifest) -> bytes:
    return wire.manifest_to_proto(layout).SerializeToString(deterministic=True)


def load_manifest(layout: bytes, sha256: str) -> Manifest:
    """Returns the manifest of a stored layout and its digest, hexadecimal."""
    shared = _load_layout(layout)
    return Manifest(shared.entries, shared.payload_bytes, bytes.fromhex(sha256))


@lru_cache(maxsize=256)
def _load_layout(layout: bytes) -> Manifest:
    message = tensor_pb2.Manifest.FromString(layout)
    message.sha256 = bytes(32)
    return wire.manifest_from_proto(message)
