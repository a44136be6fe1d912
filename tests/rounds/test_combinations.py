"""Parts of a run that do not fit each other are refused when it is created."""

from __future__ import annotations

import pytest

from fedpeft.adapters.sections import with_sections
from fedpeft.adapters.spec import AdapterSpec, Section, TensorRole, TensorSpec
from fedpeft.config import parse_config
from fedpeft.errors import ConfigInvalid
from fedpeft.rounds.combinations import check_combination

RUN = {"model": {"name": "vit_tiny_patch16_224", "classes": ["a", "b"]}, "aggregation": {"strategy": "lora_fair"}}


def test_lora_fair_needs_the_factors_of_lora() -> None:
    bias = AdapterSpec.of("bias", [TensorSpec("head.weight", (2, 3))])
    with pytest.raises(ConfigInvalid, match=r"strategy is 'lora_fair', .* updates of method 'bias' do not have"):
        check_combination(parse_config({**RUN, "peft": {"method": "bias"}}), bias)
    lora = AdapterSpec.of("lora", [TensorSpec(f"qkv.lora_{x}.weight", (2, 2)) for x in "AB"])
    check_combination(parse_config({**RUN, "peft": {"method": "lora"}}), lora)


@pytest.mark.parametrize("turns", [(TensorRole.FROZEN,), (TensorRole.FROZEN, TensorRole.SENT)])
def test_lora_fair_needs_both_factors_in_every_round(turns: tuple[TensorRole, ...]) -> None:
    """With one A for all clients the mean of the B is exact, and nothing is left to correct."""
    factors = [TensorSpec("qkv.lora_A.weight", (2, 2), turns), TensorSpec("qkv.lora_B.weight", (2, 2))]
    with pytest.raises(ConfigInvalid, match=r"strategy is 'lora_fair', .* updates of method 'lora' do not have"):
        check_combination(parse_config({**RUN, "peft": {"method": "lora"}}), AdapterSpec.of("lora", factors))


BUFFERED = {**RUN, "peft": {"method": "lora"}, "rounds": {"policy": "buffered"}}


def test_buffered_rounds_need_a_strategy_that_takes_stale_updates() -> None:
    lora = AdapterSpec.of("lora", [TensorSpec(f"qkv.lora_{x}.weight", (2, 2)) for x in "AB"])
    with pytest.raises(ConfigInvalid, match=r"policy is 'buffered', .*; strategy 'lora_fair' needs those of one"):
        check_combination(parse_config(BUFFERED), lora)
    check_combination(parse_config({**BUFFERED, "aggregation": {"strategy": "fedbuff"}}), lora)


def test_buffered_rounds_send_the_same_tensors_in_every_round() -> None:
    sent = TensorRole.SENT
    roles = [TensorSpec("a", (2,), (sent, TensorRole.FROZEN)), TensorSpec("b", (2,), (TensorRole.FROZEN, sent))]
    with pytest.raises(ConfigInvalid, match=r"rounds\.policy is 'buffered', .*; method 'lora' sends other tensors"):
        config = parse_config({**BUFFERED, "aggregation": {"strategy": "fedbuff"}})
        check_combination(config, AdapterSpec.of("lora", roles))


def test_clipping_and_sections_do_not_go_together() -> None:
    """A client adds all of its change to its own control variate; the server would add what clipping left of it."""
    clipped = parse_config({**RUN, "aggregation": {}, "peft": {"method": "bias"}, "privacy": {"clip_norm": 1.0}})
    bias = AdapterSpec.of("bias", [TensorSpec("head.weight", (2, 3))])
    check_combination(clipped, bias)
    with pytest.raises(ConfigInvalid, match=r"privacy\.clip_norm does not go with section 'control'"):
        check_combination(clipped, with_sections(bias, [Section("control", 2.0, "float32")]))
