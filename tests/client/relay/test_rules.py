"""Suitability of a run for a relay, and the run that its edge holds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fedpeft.adapters.spec import AdapterSpec, Section, TensorSpec
from fedpeft.config import parse_config
from fedpeft.rounds.combinations import check_combination
from fedpeft.rpc import wire
from fedpeft.v1 import run_pb2
from fedpeft_client.owner.policy import NO_LIMITS, Policy
from fedpeft_client.relay.options import RelayOptions
from fedpeft_client.relay.rules import edge_config, reasons_against
from fedpeft_client.state.runs import KnownRun

OPTIONS = RelayOptions("127.0.0.1:7071", "north", 4, quorum=3)
SPEC = AdapterSpec.of("bias", [TensorSpec("a", (10,))])
EXACT = {"aggregation": {"exact_sum": True}}


def known(spec: AdapterSpec = SPEC, **sections: dict[str, Any]) -> KnownRun:
    model = {"name": "vit_tiny_patch16_224", "classes": ["cat", "dog"]}
    config = parse_config({"model": model, "peft": {"method": "bias"}, **sections})
    run = run_pb2.Run(
        id="run-a",
        config=wire.config_to_proto(config),
        spec=wire.spec_to_proto(spec),
        backbone_fingerprint="ab" * 32,
    )
    return KnownRun.of(run, of_sums=True)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({}, "it needs exact_sum = true in [aggregation]"),
        ({"rounds": {"policy": "buffered"}}, "in buffered rounds each update may start from another"),
        (
            {"privacy": {"mechanism": "central", "clip_norm": 1.0, "noise_multiplier": 1.0, "delta": 1e-5}},
            'privacy.mechanism "central" hides a client',
        ),
        ({"aggregation": {"strategy": "median", "exact_sum": True}}, "the edge could not hold the run: aggregation"),
    ],
)
def test_what_makes_more_of_updates_than_their_sum_is_declined(sections: dict[str, Any], words: str) -> None:
    told = [(reason.kind, reason.public_text) for reason in reasons_against(known(**sections), OPTIONS, NO_LIMITS)]
    assert any(words in text and kind == "CONFIG_INVALID" for kind, text in told), told


def test_a_run_with_sections_is_declined() -> None:
    spec = AdapterSpec(
        "bias", (*SPEC.tensors, TensorSpec("control/a", (10,), section=Section("control", 4.0, "float32")))
    )
    (reason,) = reasons_against(known(spec, **EXACT), OPTIONS, NO_LIMITS)
    assert "of adapters alone, and the run has section 'control' beside them" in reason.public_text


@pytest.mark.parametrize(
    "sections",
    [
        {"rounds": {"policy": "relayed"}},
        {"privacy": {"mechanism": "example", "clip_norm": 1.0, "noise_multiplier": 1.0, "delta": 1e-5}},
        {"aggregation": {"strategy": "fedadam", "exact_sum": True}},
        {"codec": {"up": "int8"}},
    ],
)
def test_what_is_one_sum_suits(sections: dict[str, Any]) -> None:
    assert reasons_against(known(**{**EXACT, **sections}), OPTIONS, NO_LIMITS) == ()


def test_the_owners_policy_is_held_and_knows_the_encoding_of_sums() -> None:
    policy = Policy.model_validate({"transfer": {"encodings": ["float32"]}, "model": {"hub": False}})
    (reason,) = reasons_against(known(**EXACT), OPTIONS, policy)
    assert reason.kind == "REFUSED_BY_POLICY" and "encoding sum128" in reason.local_text
    assert known(**EXACT).upload_bounds(1) == (160, 160)


def test_the_edges_run_is_the_parents_with_rounds_of_its_own() -> None:
    rounds = {
        "count": 7,
        "clients": 20,
        "quorum": 15,
        "min_available": 18,
        "over_selection": 0.5,
        "deadline_s": 100.0,
        "max_extensions": 1,
        "seed": 9,
        "wait_s": 50.0,
    }
    run = known(rounds=rounds, **EXACT)
    edge = edge_config(run.config, OPTIONS)
    assert edge.rounds.model_dump(exclude_none=True) == {
        "count": 7,
        "clients": 4,
        "quorum": 3,
        "over_selection": 0.0,
        "deadline_s": 75.0,
        "max_extensions": 1,
        "seed": 9,
        "wait_s": 50.0,
        "policy": "relayed",
    }
    assert edge.model_copy(update={"rounds": run.config.rounds}) == run.config
    check_combination(edge, run.spec)
    assert edge_config(run.config, replace(OPTIONS, quorum=None)).rounds.needed == 3
