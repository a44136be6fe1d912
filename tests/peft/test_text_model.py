"""Methods on a model of the kind of Llama: RMS norms, no biases, queries, keys and values apart, a gated MLP."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from fedpeft.config import ModelConfig
from fedpeft.errors import ConfigInvalid
from fedpeft.models.backbones import Backbone
from fedpeft.models.structure import ModelStructure
from fedpeft.peft import methods, tune

WIDTH, GROUPED = 8, 4  # keys and values of half the heads
CONFIG = ModelConfig(name="text:tiny", weights="none", classes=("a", "b"))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.o_proj = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))
        self.k_proj, self.v_proj = (nn.Linear(WIDTH, GROUPED, bias=False) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.q_proj(x).unflatten(-1, (2, GROUPED)).transpose(1, 2)
        k, v = (layer(x)[:, None].expand(q.shape) for layer in (self.k_proj, self.v_proj))
        return self.o_proj(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(WIDTH, 16, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(16, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(), Gated()
        self.input_layernorm, self.post_attention_layernorm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(16, WIDTH)
        self.layers = nn.Sequential(Block(), Block())
        self.norm = nn.RMSNorm(WIDTH)
        self.score = nn.Linear(WIDTH, 2, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.score(self.norm(self.layers(self.embed_tokens(tokens)))[:, -1])


@pytest.fixture
def backbone() -> Backbone:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Decoder().requires_grad_(False).eval()
    blocks = {f"layers.{i}": block for i, block in enumerate(module.layers)}
    structure = ModelStructure("score", blocks, tuple(block.mlp for block in module.layers), WIDTH)
    return Backbone(CONFIG, module, structure, None, {})


OPTIONS: dict[str, dict[str, object]] = {
    name: {"targets": ["q_proj", "v_proj"]}
    for name in ("lora", "lora_residual", "ffa_lora", "fedsa_lora", "rolora", "dora", "vera")
}
EXPECTED = {
    "layernorm": {"input_layernorm.weight", "post_attention_layernorm.weight"},
    "ia3": {"self_attn.k_proj.ia3.k", "self_attn.v_proj.ia3.v", "mlp.down_proj.ia3.hidden"},
    "ssf": {
        f"{layer}.ssf.{part}"
        for layer in ("input_layernorm", "post_attention_layernorm", "self_attn.q_proj", "self_attn.k_proj",
                      "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
        for part in ("scale", "shift")
    },
    "adaptformer": {f"adaptformer.{layer}.{part}" for layer in ("down", "up") for part in ("weight", "bias")},
    "lora": {f"self_attn.{p}_proj.lora_{f}.weight" for p in "qv" for f in "AB"},
    "dora": {f"self_attn.{p}_proj.lora_{f}.weight" for p in "qv" for f in ("A", "B", "magnitude_vector")},
    "vera": {f"self_attn.{p}_proj.vera_lambda_{v}" for p in "qv" for v in "bd"},
}  # fmt: skip


@pytest.mark.parametrize("method", [name for name in methods.names() if name != "prompt"])
def test_every_method_starts_as_the_backbone_and_trains(backbone: Backbone, method: str) -> None:
    model = tune(backbone, method, OPTIONS.get(method, {}), 1)
    tokens = torch.arange(16).reshape(2, 8)
    assert torch.allclose(model.module(tokens), backbone.module(tokens), 0, 1e-6)
    before = model.state()
    optimizer = torch.optim.SGD(model.trainable(1).values(), lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        functional.cross_entropy(model.module(tokens), torch.tensor([0, 1])).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    still = {name for name, values in model.state().items() if np.array_equal(values, before[name])}
    assert still == {tensor.name for tensor in model.spec.tensors} - set(model.trainable(1))


@pytest.mark.parametrize("method", EXPECTED)
def test_methods_find_their_places(backbone: Backbone, method: str) -> None:
    names = {tensor.name for tensor in tune(backbone, method, OPTIONS.get(method, {}), 1).spec.tensors}
    assert {name.removeprefix("layers.1.") for name in names if name.startswith("layers.1.")} == EXPECTED[method]


@pytest.mark.parametrize("method", ["lora", "dora", "vera"])
def test_targets_that_it_lacks_are_named_with_those_it_has(backbone: Backbone, method: str) -> None:
    says = r"'qkv' fits no linear layer of a block; there are: mlp\.down_proj, .*self_attn\.q_proj, self_attn\.v_proj"
    with pytest.raises(ConfigInvalid, match=says) as caught:
        tune(backbone, method, {}, 1)
    assert [field for field, _ in caught.value.fields] == ["peft.targets"]


@pytest.mark.parametrize("method", ["adaptformer", "ia3"])
def test_a_model_with_other_names_is_refused_by_field(backbone: Backbone, method: str) -> None:
    for block in backbone.module.layers:  # type: ignore[union-attr]
        block.second, block.self_attn.kv = block.post_attention_layernorm, block.self_attn.k_proj
        del block.post_attention_layernorm, block.self_attn.k_proj
    with pytest.raises(ConfigInvalid, match=rf"peft\.method: {method} .*layers\.0 has n") as caught:
        tune(backbone, method, {}, 1)
    assert [field for field, _ in caught.value.fields] == ["peft.method"]
