"""New runs: the description of one as it comes from outside, checked, and the file of its first version."""

from __future__ import annotations

import hashlib
import re
import secrets
import string
from pathlib import Path
from tempfile import TemporaryDirectory

from fedpeft import ids
from fedpeft.adapters import payload
from fedpeft.adapters.payload import Manifest
from fedpeft.adapters.spec import AdapterSpec
from fedpeft.config import RunConfig
from fedpeft.errors import ConfigInvalid, ManifestInvalid, SpecInvalid
from fedpeft.privacy.accounting import calibrated
from fedpeft.process.mapped_files import releaser
from fedpeft.rounds.combinations import check_combination, check_makes_versions
from fedpeft.rounds.commit import write_version
from fedpeft.rounds.policies import policy_of
from fedpeft.rpc.wire import config_from_proto, manifest_from_proto, spec_from_proto
from fedpeft.v1 import operator_service_pb2 as pb
from fedpeft_server.rpc.messages import RUN_BYTES, run_message
from fedpeft_server.runs.aggregation import run_header
from fedpeft_server.store.rows import RunRow, RunState, VersionRow
from fedpeft_server.store.store import NewVersion, Store

_FINGERPRINT = re.compile(r"[0-9a-f]{64}")
_ALPHABET = string.ascii_lowercase + string.digits


def drawn_id() -> str:
    """Returns the id of a new run."""
    return "run-" + "".join(secrets.choice(_ALPHABET) for _ in range(12))


def stored_version(store: Store, version: NewVersion, run: RunRow, manifest: Manifest) -> VersionRow:
    """Stores an uploaded payload, which is in the spool, as the file of an adapter version.

    Raises:
        BlobCorrupt: If the payload is not what was uploaded.
        DiskFull: If there is no room; StoreUnavailable if the blobs refuse otherwise.
    """
    with (
        store.updates.open(version.spool_key, manifest.sha256) as data,
        TemporaryDirectory(dir=store.scratch) as folder,
    ):
        path, tensors = Path(folder, "adapter"), payload.Decoded(manifest, data, releaser(data))
        written = write_version(run_header(run), tensors, path, version.version)
        store.blobs.put(version.blob_key, path)
    now = store.clock.time()
    return VersionRow(run.id, version.version, written.sha256, written.size_bytes, "", now, draw=version.draw)


def new_run(header: pb.CreateRunHeader, now: float) -> tuple[RunRow, Manifest]:
    """Checks the description of a run that is made now, before any byte of its adapter is taken.

    Returns:
        The run, and its first version.

    Raises:
        ConfigInvalid: If a field is wrong, or parts of the run do not go together.
        SpecInvalid: If the spec is wrong.
        ManifestInvalid: If the manifest does not describe a version.
    """
    if not 1 <= len(header.request_id) <= 64:
        raise ConfigInvalid("request_id must have 1 to 64 characters", (("request_id", "has the wrong length"),))
    if not _FINGERPRINT.fullmatch(header.backbone_fingerprint):
        text = "must be 64 lower-case hexadecimal digits"
        raise ConfigInvalid(f"backbone_fingerprint {text}", (("backbone_fingerprint", text),))
    config = config_from_proto(header.config)
    try:
        spec = spec_from_proto(header.spec)
        if spec.method != config.peft.method:
            text = f"is {spec.method[:80]!r}, the run file says {config.peft.method!r}"
            raise SpecInvalid(f"the spec's method {text}", (("method", text),))
        _check_roles(spec)
    except SpecInvalid as error:
        raise error.within("header.spec") from None
    config = calibrated(config)
    check_combination(config, spec)
    try:
        manifest = manifest_from_proto(header.manifest)
        payload.check_manifest(manifest, spec.shared, ("float32",))
    except ManifestInvalid as error:
        raise error.within("header.manifest") from None
    digest = hashlib.sha256(header.SerializeToString(deterministic=True)).hexdigest()
    run_id, version = _relayed(header, config) or (drawn_id(), 0)
    run = RunRow(
        id=run_id,
        config=config,
        spec=spec,
        backbone_fingerprint=header.backbone_fingerprint,
        state=RunState.RUNNING,
        reason="",
        version=version,
        created_at=now,
        model_parameters=header.model_parameters,
        request_id=header.request_id,
        request_digest=digest,
        revision=round(1000 * now) if header.HasField("relays") else 0,
        relay=header.relays.client,
    )
    size = run_message(run, "", {}).ByteSize()
    if size > RUN_BYTES:
        fault = f"has {size:,} bytes with the spec; at most {RUN_BYTES:,} are taken, so that every answer about it fits"
        raise ConfigInvalid(f"the run's configuration {fault}", (("config", fault),))
    return run, manifest


def _check_roles(spec: AdapterSpec) -> None:
    rounds = max(len(t.roles) for t in spec.tensors)
    for number in range(1, rounds + 1):
        if not spec.sent(number):
            text = f"are such that no tensor is sent in round {number}"
            raise SpecInvalid(f"the roles of the adapter spec {text}", (("tensors", text),))


def _relayed(header: pb.CreateRunHeader, config: RunConfig) -> tuple[str, int] | None:
    """Returns the id of the parent's run and its version that a run begins with; None if it relays none.

    Raises:
        ConfigInvalid: If the run's rounds and what it says of a parent do not go together.
    """
    if not header.HasField("relays"):
        check_makes_versions(config)
        return None
    if policy_of(config.rounds).makes_versions:
        policy = config.rounds.policy_name
        text = f"is {policy!r}, whose rounds make versions; a run that relays another has rounds that make sums"
        raise ConfigInvalid(f"rounds.policy {text}", (("rounds.policy", text),))
    run, version = header.relays.run, header.relays.version
    if not ids.RUN.fullmatch(run):
        text = "must be 1 to 64 letters, digits, underscores or hyphens"
        raise ConfigInvalid(f"relays.run {text}", (("relays.run", text),))
    if not ids.CLIENT.fullmatch(header.relays.client):
        text = "must be the id of a client of the parent's server"
        raise ConfigInvalid(f"relays.client {text}", (("relays.client", text),))
    if version >= config.rounds.count:
        text = f"is {version}; the run has {config.rounds.count} rounds, so none begins with it"
        raise ConfigInvalid(f"relays.version {text}", (("relays.version", text),))
    return run, version
