"""Sections: declared on a spec, encoded on their own, split from a version and joined to an update."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedpeft.adapters import payload
from fedpeft.adapters.sections import initial, join, split, with_sections
from fedpeft.adapters.spec import ADAPTER, AdapterSpec, Section, TensorRole, TensorSpec
from fedpeft.adapters.updates import prepare
from fedpeft.config import CodecConfig
from fedpeft.errors import ManifestInvalid, SpecInvalid
from fedpeft.rpc import wire

CONTROL = Section("control", 4.0, "float32")
TURNS = (TensorRole.SENT, TensorRole.FROZEN)
TUNED = AdapterSpec(
    "m",
    (
        TensorSpec("a", (20,), TURNS),
        TensorSpec("b", (2, 3)),
        TensorSpec("fixed", (5,), (TensorRole.FROZEN,)),
        TensorSpec("own", (7,), (TensorRole.LOCAL,)),
    ),
)
SPEC = with_sections(TUNED, [CONTROL])


def values(seed: int, number: int = 1) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    return {t.name: draw.standard_normal(t.shape).astype(np.float32) for t in SPEC.sent(number)}


def test_a_section_has_a_tensor_for_each_that_is_sent() -> None:
    assert [t.name for t in SPEC.tensors] == ["a", "b", "control/a", "control/b", "fixed", "own"]
    assert [t.name for t in SPEC.sent(2)] == ["b", "control/b"]
    assert SPEC.sections == (CONTROL,) and SPEC.adapter == TUNED and TUNED.adapter is TUNED
    assert SPEC.parameters == TUNED.parameters == 33 and SPEC.largest_update == 2 * TUNED.largest_update
    assert SPEC.sha256 != TUNED.sha256 != with_sections(TUNED, [replace(CONTROL, divisor=5.0)]).sha256
    assert with_sections(TUNED, []) is TUNED
    assert {n: v.tolist() for n, v in initial(SPEC).items()} == {"control/a": [0.0] * 20, "control/b": [[0.0] * 3] * 2}


def test_split_is_undone_by_join() -> None:
    whole = values(0)
    adapter, others = split(SPEC, whole)
    assert list(adapter) == ["a", "b"] and {name: list(group) for name, group in others.items()} == {
        "control": ["a", "b"]
    }
    assert join(adapter, others).keys() == whole.keys()
    assert all(joined is whole[name] for name, joined in join(adapter, others).items())
    assert split(TUNED, {"a": whole["a"]}) == ({"a": whole["a"]}, {})


@pytest.mark.parametrize("up", ["float16", "sparse"])
def test_a_section_goes_whole_in_its_own_encoding(up: str) -> None:
    delta, codec = values(1), CodecConfig(up=up, density=0.1)
    residual = {"a": np.ones(20, np.float32)}
    update = prepare(delta, residual, SPEC.sent(1), codec)
    alone = prepare(split(SPEC, delta)[0], residual, TUNED.sent(1), codec)
    encodings = {entry.name: entry.encoding for entry in update.manifest.entries}
    assert encodings == {"a": codec.encoding, "b": codec.encoding, "control/a": "float32", "control/b": "float32"}
    payload.check_manifest(update.manifest, SPEC.sent(1), (codec.encoding,))
    decoded = payload.decode(update.manifest, memoryview(update.payload))
    for name in ("control/a", "control/b"):
        np.testing.assert_array_equal(decoded[name], delta[name])
    for ours, theirs in (
        (update.residual_if_counted, alone.residual_if_counted),
        (update.residual_if_not, alone.residual_if_not),
    ):
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_another_encoding_of_a_section_is_refused() -> None:
    manifest, _ = payload.encode(values(2), [replace(t, section=ADAPTER) for t in SPEC.sent(1)], "float16")
    with pytest.raises(ManifestInvalid, match=r"control/a is encoded as 'float16'; this run takes float32"):
        payload.check_manifest(manifest, SPEC.sent(1), ("float16",))


def test_the_wire_keeps_sections_and_a_spec_without_them_as_it_was() -> None:
    assert wire.spec_from_proto(wire.spec_to_proto(SPEC)) == SPEC
    message = wire.spec_to_proto(TUNED)
    assert not message.sections and all(not t.section for t in message.tensors)


def broken(**changes: Any) -> AdapterSpec:
    """Returns a spec whose tensor control/b is changed."""
    return AdapterSpec.of("m", [replace(t, **changes) if t.name == "control/b" else t for t in SPEC.tensors])


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"section": Section("Control", 4.0, "float32")}, "not named by 1 to 32 of lower-case letters"),
        ({"section": Section("adapter", 4.0, "float32")}, "or is 'adapter'"),
        ({"section": Section("control", 5.0, "float32")}, "declared in two ways"),
        ({"section": Section("other", 4.0, "float32")}, "not named other/MEMBER"),
        (
            {"section": Section("other", 0.0, "float32"), "name": "other/b"},
            "divisor is 0.0, not a finite",
        ),
        ({"section": Section("other", float("inf"), "float32"), "name": "other/b"}, "divisor is inf"),
        ({"section": Section("other", 4.0, "sparse+float32"), "name": "other/b"}, "one is needed that is not sparse"),
        ({"roles": (TensorRole.LOCAL,)}, "and local, so it has no place there"),
        ({"name": "control/"}, "not named control/MEMBER"),
    ],
)
def test_a_section_that_breaks_a_rule_is_refused(changes: dict[str, Any], fault: str) -> None:
    with pytest.raises(SpecInvalid, match=fault):
        broken(**changes)


def test_a_spec_of_sections_alone_is_refused() -> None:
    with pytest.raises(SpecInvalid, match="has no tuned tensor"):
        AdapterSpec("m", tuple(t for t in SPEC.tensors if t.section == CONTROL))


def test_sections_that_the_tensors_do_not_have_are_refused() -> None:
    for change in ("unused", "twice", "undeclared"):
        message = wire.spec_to_proto(SPEC)
        if change == "undeclared":
            del message.sections[:]
        else:
            message.sections.add(name="control" if change == "twice" else "other", divisor=1, encoding="float32")
        with pytest.raises(SpecInvalid, match="sections of the adapter spec are not those of its tensors"):
            wire.spec_from_proto(message)
