"""The worked examples in the protos' comments are what this code writes and reads, byte by byte."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from google.rpc import code_pb2, status_pb2

from fedpeft import errors, seeds
from fedpeft.adapters import payload, updates
from fedpeft.adapters.spec import AdapterSpec, Section, TensorRole, TensorSpec
from fedpeft.aggregation import UpdateFacts, strategy
from fedpeft.codecs import codecs
from fedpeft.codecs.eden import CENTROIDS
from fedpeft.config import CodecConfig
from fedpeft.errors import PayloadInvalid
from fedpeft.identity import audit
from fedpeft.identity.token import EnrollmentToken
from fedpeft.rounds.folding.contributions import Contribution
from fedpeft.rounds.folding.fold import fold
from fedpeft.rpc.status import to_status
from fedpeft.v1 import federation_service_pb2

from . import protocol_examples as examples


def test_every_encoding_has_examples() -> None:
    assert {encoding for encoding, *_ in examples.encodings()} == set(codecs.names())
    assert len(examples.encodings()) >= 12 and len(examples.refusals()) >= 11


@pytest.mark.parametrize(("encoding", "seed", "values", "digits"), examples.encodings())
def test_an_encoding(encoding: str, seed: int, values: list[float], digits: str) -> None:
    codec, data = codecs.get(encoding).seeded(seed), bytes.fromhex(digits)
    assert codec.encode(np.array(values, np.float32)).hex() == digits
    codec.check(memoryview(data), len(values))
    decoded = codec.decode(memoryview(data), len(values))
    assert codec.is_random or codec.encode(decoded) == data


def test_what_encodings_draw_from() -> None:
    said = examples.drawn()
    seed = said.pop("seed of tensor head.bias where the training seed is 4242")
    assert int(seed) == seeds.encoding(4242, "head.bias") % 2**32
    values = {"head.bias": np.array([1, -0.5, 0.25], np.float32)}
    _, data = payload.encode(values, [TensorSpec("head.bias", (3,))], "eden2", 4242)
    assert int.from_bytes(data[:4], "little") == int(seed)
    for bits, positive in CENTROIDS.items():
        assert tuple(examples.numbers(said[f"centroids of eden{bits}"])) == positive


@pytest.mark.parametrize(("encoding", "n", "digits", "why"), examples.refusals())
def test_a_refusal(encoding: str, n: int, digits: str, why: str) -> None:
    with pytest.raises(PayloadInvalid):
        codecs.get(encoding).check(memoryview(bytes.fromhex(digits)), n)


def test_a_payload() -> None:
    said = examples.payload()
    arrays = {
        "a.bias": np.array([1, -1], np.float32),
        "b.weight": np.array([[0, 0.5, 0], [0, 0, -2]], np.float32),
    }
    specs = [TensorSpec(name, values.shape) for name, values in arrays.items()]
    manifest, data = payload.encode(arrays, specs, said["encoding"])
    assert data.hex() == said["payload"].replace(" ", "")
    assert [entry.offset for entry in manifest.entries] == examples.numbers(said["offsets"])
    assert [entry.length for entry in manifest.entries] == examples.numbers(said["lengths"])
    assert manifest.sha256.hex() == said["sha256"] == hashlib.sha256(data).hexdigest()


def test_error_feedback() -> None:
    said = examples.feedback()
    up, values = said["encoding"].split("+")
    codec = CodecConfig.model_validate({"up": up, "values": values, "density": float(said["density"])})
    assert codec.encoding == said["encoding"]
    delta, residual = (
        {name: examples.floats(said[f"{what} of {name}"]) for name in "ab"} for what in ("change", "residual")
    )
    specs = [TensorSpec(name, delta[name].shape) for name in "ab"]
    update = updates.prepare(delta, residual, specs, codec)
    sent = payload.decode(update.manifest, memoryview(update.payload))
    parts = dict(zip("ab", payload.parts(update.manifest, memoryview(update.payload)), strict=True))
    for name, (_, part) in parts.items():
        assert bytes(part).hex() == said[f"payload of {name}"].replace(" ", "")
        assert sent[name].tolist() == examples.floats(said[f"sent of {name}"]).tolist()
        for what, left in (("counted", update.residual_if_counted), ("not counted", update.residual_if_not)):
            assert left[name].tobytes() == examples.floats(said[f"{what}, residual of {name}"]).tobytes()


def test_a_fingerprint() -> None:
    from fedpeft.models import backbones

    said = examples.fingerprint()
    assert hashlib.sha256(said["text"].encode()).hexdigest() == said["fingerprint"]
    tensors = {
        str(t["name"]): backbones.StoredTensor(
            str(t["dtype"]),
            tuple(t["shape"]),
            hashlib.sha256(bytes.fromhex(str(t["data"]))).hexdigest(),  # type: ignore[arg-type]
        )
        for t in examples.stored(said)
    }
    tensors["head.bias"] = backbones.StoredTensor("F32", (2,), "0" * 64)

    class Images:
        image_size = int(said["image size"])

    class Model:
        name = said["model"]

    backbone = backbones.Backbone(Model(), None, None, Images(), tensors)  # type: ignore[arg-type]
    tuned = AdapterSpec.of("head", [TensorSpec("head.bias", (2,))])
    assert backbones.fingerprint(backbone, tuned) == said["fingerprint"]


def test_an_enrolment_token() -> None:
    said = examples.token()
    token = EnrollmentToken.decode(said["line"])
    assert token.encode() == said["line"]
    assert (token.server, token.enrollment, token.secret.hex()) == (said["server"], said["enrolment"], said["secret"])
    authority = token.authority.public_bytes(Encoding.DER)
    assert said["authority"] == f"{len(authority)} bytes, SHA-256 {hashlib.sha256(authority).hexdigest()}"


def test_an_entry_of_the_audit_log() -> None:
    said = examples.audit()
    assert hashlib.sha256(said["text"].encode()).hexdigest() == said["sha256"]
    entry = audit.AuditEntry(**json.loads(said["text"]), sha256=said["sha256"])
    assert audit.verify([entry]) == entry


@pytest.mark.parametrize("block", examples.statuses())
def test_a_status(block: list[str]) -> None:
    first, added, details = block
    (code, reason), message = first.partition(": ")[0].split(), first.partition(": ")[2]
    cls = errors.of_reason(reason, errors.Internal)
    error = cls(message)
    if added.startswith("violation: "):
        field, _, text = added.removeprefix("violation: ").partition(": ")
        error = cls(message, ((field, text),))
    else:
        assert error.retry_s == float(added.removeprefix("retry delay: "))
    data = bytes.fromhex(details.removeprefix("details: "))
    assert status_pb2.Status.FromString(data) == to_status(error)
    assert code_pb2.Code.Name(status_pb2.Status.FromString(data).code) == code == cls.status


@pytest.mark.parametrize(("have", "version", "positions", "digits", "size"), examples.pulls())
def test_a_pull_of_what_changed(have: int, version: int, positions: list[int], digits: str, size: int) -> None:
    odd = (TensorRole.SENT, TensorRole.FROZEN)
    roles = {"a": odd, "b": odd[::-1], "c": odd, "d": (TensorRole.FROZEN,)}
    spec = AdapterSpec("m", tuple(TensorSpec(name, (2,), turns) for name, turns in roles.items()))
    manifest, _ = payload.encode({name: np.zeros(2, np.float32) for name in roles}, spec.shared, "float32")
    found = payload.missing(manifest, spec, version, have)
    assert list(found) == positions
    assert federation_service_pb2.PullHeader(tensors=found).SerializeToString().hex() == digits
    assert payload.Selection.of(manifest, found).size_bytes == size


def test_the_fold_of_a_section() -> None:
    example = examples.section()
    section = Section("control", float(example["divisor"]), "float32")
    specs = (TensorSpec("a", ()), TensorSpec("control/a", (), section=section))
    contributions = []
    for i, change in enumerate(examples.numbers(example["changes"])):
        arrays = {"a": np.float32(0), "control/a": np.array(change, np.float32)}
        manifest, data = payload.encode(arrays, specs, "float32")
        contributions.append(Contribution(f"c{i}", UpdateFacts(10 + i), manifest, memoryview(data)))
    base = {"a": np.zeros((), np.float32), "control/a": np.array(float(example["value before"]), np.float32)}
    folded = fold(contributions, specs, strategy("fedavg", {}), base, {})
    assert folded.adapter["control/a"] == float(example["value after"])
