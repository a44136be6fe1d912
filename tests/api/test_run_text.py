"""A configuration is written as the run file that makes it again."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.api.run_text import run_text
from fedpeft.config import parse_config

MODEL = {"name": "vit_tiny_patch16_224", "classes": ["a", "b"]}

words = st.text(st.characters(exclude_categories=("C",)), min_size=1, max_size=40).filter(
    lambda text: text == text.strip()
)


@pytest.mark.parametrize(
    "data",
    [
        {"model": MODEL, "peft": {"method": "bias"}},
        {
            "name": 'a "quoted" \\ name',
            "model": {**MODEL, "weights": "/srv/ö/w.safetensors", "image_size": 32, "depth": 2},
            "peft": {"method": "lora", "rank": 8},
            "rounds": {"count": 3, "clients": 4, "quorum": 2, "seed": 2**63 - 1},
            "training": {"steps": 7, "optimizer": "adamw", "learning_rate": 1e-05},
            "aggregation": {"strategy": "fedavgm", "momentum": 0.5},
            "codec": {"up": "sparse", "density": 0.1},
        },
        {
            "model": {"name": "text:tiny", "options": {"width": 8, "deep": {"a b": [1, 2.5, True, "x"]}}},
            "peft": {"method": "full"},
        },
    ],
)
def test_read_again_it_is_the_same(data: dict[str, Any]) -> None:
    config = parse_config(data)
    text = run_text(config)
    assert parse_config(tomllib.loads(text)) == config
    assert "\n[rounds]\n" in text


@given(st.lists(words, min_size=2, max_size=6, unique=True))
def test_any_class_names(classes: list[str]) -> None:
    config = parse_config({"model": {**MODEL, "classes": classes}, "peft": {"method": "bias"}})
    assert parse_config(tomllib.loads(run_text(config))) == config
