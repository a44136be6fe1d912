"""LayerNorm tuning: which parameters it finds, in ViTs and in models with norms of their own."""

import pytest
import torch
from torch import nn

from fedpeft.config import ModelConfig
from fedpeft.errors import ConfigInvalid
from fedpeft.models.structure import ModelStructure
from fedpeft.peft import count, spec_of, timm_spec
from fedpeft.peft.method import make

from .plain_vit import BASE, HEAD


def test_counts_and_shapes_of_vit_b() -> None:
    assert count(BASE, "layernorm", {}, 100) == 38_400 + 76_900
    places = ["norm", *(f"blocks.{i}.norm{n}" for i in range(12) for n in (1, 2))]
    expected = HEAD | {f"{place}.{part}": (768,) for place in places for part in ("weight", "bias")}
    assert {t.name: t.shape for t in timm_spec(BASE, "layernorm", {}, 100).tensors} == expected


def test_norms_of_other_models_are_found_wherever_they_stand() -> None:
    clip = spec_of(ModelConfig(name="vit_base_patch16_clip_224", weights="none", classes=("a", "b")), "layernorm", {})
    assert "norm_pre.weight" in {tensor.name for tensor in clip.tensors}

    class OwnRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

    model = nn.ModuleDict({"a": OwnRMSNorm(), "b": nn.RMSNorm(4), "c": nn.LayerNorm(4, elementwise_affine=False)})
    model["normal"] = nn.Linear(4, 4)
    method = make("layernorm", {})
    method.inject(model, ModelStructure(), torch.Generator())
    assert [name for name, _ in model.named_parameters() if method.tunes(name)] == ["a.weight", "b.weight"]


def test_a_model_without_norms_is_refused() -> None:
    with pytest.raises(ConfigInvalid, match=r"peft\.method: layernorm tunes .* this model has none") as caught:
        make("layernorm", {}).inject(nn.Linear(2, 2), ModelStructure(), torch.Generator())
    assert [field for field, _ in caught.value.fields] == ["peft.method"]
