"""The client in JavaScript computes the examples in the protos' comments, and much else, as Python does."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from fedpeft.codecs import codecs

from ..rpc import protocol_examples as examples
from .conftest import Node, Refused


async def test_the_encodings(node: Node) -> None:
    client = await node()
    for encoding, seed, values, digits in examples.encodings():
        assert await client("encode", values=[str(value) for value in values], encoding=encoding, seed=seed) == digits
        decoded = await client("decode", data=digits, n=len(values), encoding=encoding)
        want = codecs.get(encoding).decode(memoryview(bytes.fromhex(digits)), len(values))
        assert [float(value) for value in decoded] == want.tolist()
    for encoding, n, digits, _ in examples.refusals():
        with pytest.raises(Refused, match="LOCAL"):
            await client("decode", data=digits, n=n, encoding=encoding)


async def test_encodings_of_many_kinds_of_values(node: Node) -> None:
    client, generator = await node(), np.random.default_rng(11)
    for density in (0.0, 0.01, 0.12, 0.13, 0.5, 1.0):
        bits = generator.integers(0, 2**32, 600, np.uint32).view(np.float32)
        values = np.where(np.isfinite(bits) & (generator.random(600) < density), bits, np.float32(0))
        values[::3] *= generator.normal(0, 1e-4, 200).astype(np.float32) / np.maximum(np.abs(values[::3]), 1e-30)
        values = np.nan_to_num(values, posinf=1.0, neginf=-1.0)
        for encoding in codecs.names():
            want = codecs.get(encoding).seeded(9).encode(values)
            assert (
                await client("encode", values=[repr(float(v)) for v in values], encoding=encoding, seed=9) == want.hex()
            )
            decoded = await client("decode", data=want.hex(), n=values.size, encoding=encoding)
            assert [float(v) for v in decoded] == codecs.get(encoding).decode(memoryview(want), values.size).tolist()


async def test_error_feedback(node: Node) -> None:
    said = examples.feedback()
    up, values = said["encoding"].split("+")
    codec = {"up": up, "values": values, "density": float(said["density"]), "error_feedback": True}
    changes = {name: examples.floats(said[f"change of {name}"]).tolist() for name in "ab"}
    residual = {name: examples.floats(said[f"residual of {name}"]).tolist() for name in "ab"}
    specs = [{"name": name, "dtype": "F32", "shape": [len(changes[name])]} for name in "ab"]
    got = await (await node())("prepare", specs=specs, delta=changes, residual=residual, codec=codec)
    assert got["payload"] == "".join(said[f"payload of {name}"].replace(" ", "") for name in "ab")
    for what, left in (("counted", got["ifCounted"]), ("not counted", got["ifNot"])):
        for name in "ab":
            want = examples.floats(said[f"{what}, residual of {name}"])
            assert np.array(left[name], np.float32).tobytes() == want.tobytes()


async def test_the_fingerprint_and_the_token(node: Node) -> None:
    client, said = await node(), examples.fingerprint()
    model, size = said["model"], int(said["image size"])
    got = await client("fingerprint", model=model, size=size, tensors=examples.stored(said))
    assert got == said["fingerprint"]
    token = examples.token()
    got = await client("token", line=f"  {token['line']}\n")
    assert (got["server"], got["enrolment"], got["secret"]) == (token["server"], token["enrolment"], token["secret"])
    authority = bytes.fromhex(got["authority"])
    assert token["authority"] == f"{len(authority)} bytes, SHA-256 {hashlib.sha256(authority).hexdigest()}"
    with pytest.raises(Refused, match="damaged"):
        await client("token", line=token["line"].replace("fedpeft1.Z", "fedpeft1.Y"))
