"""Clipping by norm: an encoded update is within the bound as the server measures it, whatever the encoding rounds."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.adapters import payload
from fedpeft.adapters.sections import with_sections
from fedpeft.adapters.spec import AdapterSpec, Section, TensorSpec
from fedpeft.adapters.updates import PreparedUpdate, prepare
from fedpeft.config import CodecConfig, RunConfig, parse_config
from fedpeft.errors import ConfigInvalid, PayloadInvalid
from fedpeft.privacy.events import Clipped
from fedpeft.privacy.transforms import Clip, euclidean, transforms_of

TUNED = AdapterSpec("m", (TensorSpec("a", (40,)), TensorSpec("b", (5, 7))))
SPECS = with_sections(TUNED, [Section("control", 3.0, "float32")]).sent(1)
CODECS = [
    CodecConfig(),
    CodecConfig(up="float16"),
    CodecConfig(up="bfloat16"),
    CodecConfig(up="sparse", density=0.3, values="bfloat16"),
    CodecConfig(up="bfloat16", error_feedback=False),
    CodecConfig(up="int8"),
    CodecConfig(up="uniform2", error_feedback=False),
    CodecConfig(up="eden1"),
]
Arrays = dict[str, np.ndarray]


def run(**privacy: Any) -> RunConfig:
    model = {"name": "vit_tiny_patch16_224", "classes": ["a", "b"]}
    return parse_config({"model": model, "peft": {"method": "bias"}, "privacy": privacy})


def changes(seed: int, scale: float = 1.0, specs: tuple[TensorSpec, ...] = SPECS) -> Arrays:
    draw = np.random.default_rng(seed)
    return {t.name: (scale * draw.standard_normal(t.shape)).astype(np.float32) for t in specs}


def measured(update: PreparedUpdate) -> float:
    """Returns the norm as a server measures it."""
    return math.sqrt(payload.squared_norm(update.manifest, memoryview(update.payload)))


@given(
    seed=st.integers(0, 1000),
    exponent=st.integers(-30, 30),
    scale=st.integers(-12, 30),
    codec=st.sampled_from(CODECS),
)
def test_what_is_encoded_is_within_the_bound(seed: int, exponent: int, scale: int, codec: CodecConfig) -> None:
    bound = math.ldexp(1 + seed / 1001, exponent)
    update = prepare(changes(seed, math.ldexp(1.0, scale)), None, SPECS, codec, (Clip(bound),))
    assert measured(update) <= bound
    Clip(bound).check(measured(update))


@pytest.mark.parametrize("codec", CODECS[:3])
def test_an_update_that_is_too_large_is_scaled_down_to_the_bound(codec: CodecConfig) -> None:
    delta = changes(1)
    update = prepare(delta, None, SPECS, codec, (Clip(2.0),))
    norm = math.sqrt(sum(float(np.square(v.astype(np.float64)).sum()) for v in delta.values()))
    assert norm > 10 and euclidean(delta) == pytest.approx(norm, rel=1e-12)
    assert update.figures["clip_factor"] == pytest.approx(2.0 / norm, rel=2e-2)
    assert 1.95 < measured(update) <= 2.0
    decoded = payload.decode(update.manifest, memoryview(update.payload))
    for name, values in decoded.items():  # all sections by one factor: the direction stays
        np.testing.assert_allclose(values, delta[name] * update.figures["clip_factor"], rtol=1e-2)


@pytest.mark.parametrize("codec", CODECS)
def test_an_update_within_the_bound_has_the_bytes_that_it_had(codec: CodecConfig) -> None:
    delta, residual = changes(2), {"a": np.ones(40, np.float32)}
    plain, clipped = prepare(delta, residual, SPECS, codec), prepare(delta, residual, SPECS, codec, (Clip(1e6),))
    assert (clipped.manifest, clipped.payload) == (plain.manifest, plain.payload)
    assert clipped.figures == {"clip_factor": 1.0} and plain.figures == {}
    for ours, theirs in (
        (clipped.residual_if_counted, plain.residual_if_counted),
        (clipped.residual_if_not, plain.residual_if_not),
    ):
        assert ours.keys() == theirs.keys() and all(np.array_equal(ours[n], theirs[n]) for n in ours)


def test_what_clipping_takes_away_is_in_no_residual() -> None:
    """Were it kept, the residual would grow with every round, and go up once the client trains less."""
    codec, delta, residual = CodecConfig(up="sparse", density=0.2), changes(3, 100.0, TUNED.tensors), dict[str, Any]()
    total = {name: np.zeros(values.shape) for name, values in delta.items()}
    for _ in range(40):
        update = prepare(delta, residual, TUNED.tensors, codec, (Clip(1.0),))
        assert euclidean(update.residual_if_not) <= 1.0 + 1e-6
        decoded = payload.decode(update.manifest, memoryview(update.payload))
        passed = {n: decoded[n] + update.residual_if_counted.get(n, np.float32(0)) for n in decoded}
        assert euclidean(passed) == pytest.approx(1.0, rel=1e-5), "sent and kept are what passed, and no more"
        residual = update.residual_if_counted
        total = {name: total[name] + decoded[name] for name in total}
    assert math.sqrt(sum(float(np.square(v).sum()) for v in total.values())) <= 40.0
    still = {name: np.zeros_like(values) for name, values in delta.items()}
    for _ in range(40):
        last = prepare(still, residual, TUNED.tensors, codec, (Clip(1.0),))
        residual = last.residual_if_counted
    assert euclidean(residual) < 1e-3, "what the encoding left goes up within a few rounds, and then nothing is left"


def test_the_sum_of_a_round_changes_by_no_more_than_the_bound() -> None:
    """The sensitivity: one client's update in place of none moves the sum before the fold by at most C."""
    sums = [np.zeros(75)]
    for client in range(4):
        update = prepare(changes(client, 10.0**client, TUNED.tensors), None, TUNED.tensors, CODECS[2], (Clip(0.7),))
        decoded = payload.decode(update.manifest, memoryview(update.payload))
        sums.append(sums[-1] + np.concatenate([v.reshape(-1).astype(np.float64) for v in decoded.values()]))
    assert all(np.linalg.norm(after - before) <= 0.7 * (1 + 1e-12) for before, after in pairwise(sums))


def test_the_counterpart_refuses_what_cannot_have_passed() -> None:
    (clip,) = transforms_of(run(clip_norm=1.5))
    clip.check(1.5)
    with pytest.raises(PayloadInvalid, match=r"norm of 1\.50000001; privacy\.clip_norm of this run is 1\.5") as caught:
        clip.check(1.50000001)
    assert caught.value.fields[0][0] == "tensors"
    assert clip.event(7) == Clipped(1.5, 7)


def test_a_run_without_a_bound_has_no_transform() -> None:
    assert transforms_of(run()) == ()
    for wrong in (0, -1.0, "1"):
        with pytest.raises(ConfigInvalid, match=r"privacy\.clip_norm"):
            run(clip_norm=wrong)
