"""Parts of a run that do not fit each other are refused when it is created."""

from __future__ import annotations

import pytest

from fedpeft.adapters.spec import AdapterSpec, TensorSpec
from fedpeft.config import parse_config
from fedpeft.errors import ConfigInvalid
from fedpeft.rounds.combinations import check_combination

RUN = {"model": {"name": "vit_tiny_patch16_224", "classes": ["a", "b"]}, "aggregation": {"strategy": "lora_fair"}}


def test_lora_fair_needs_the_factors_of_lora() -> None:
    bias = AdapterSpec.of("bias", [TensorSpec("head.weight", (2, 3))])
    with pytest.raises(ConfigInvalid, match=r"aggregation\.strategy is 'lora_fair': .* has none; method is 'bias'"):
        check_combination(parse_config({**RUN, "peft": {"method": "bias"}}), bias)
    lora = AdapterSpec.of("lora", [TensorSpec(f"qkv.lora_{x}.weight", (2, 2)) for x in "AB"])
    check_combination(parse_config({**RUN, "peft": {"method": "lora"}}), lora)
