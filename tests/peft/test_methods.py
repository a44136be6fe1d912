"""Duties of every PEFT method: it starts as the backbone, moves the tensors that it tunes, and nothing else."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedpeft.adapters.spec import AdapterSpec, TensorRole, TensorSpec
from fedpeft.config import ModelConfig
from fedpeft.errors import ModelInvalid, SpecInvalid
from fedpeft.models import backbones
from fedpeft.models.backbones import Backbone
from fedpeft.peft import Method, MethodOptions, TunedModel, methods, tune

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("full", {}),
    "head": ("head", {}),
    "bias": ("bias", {}),
    "adapter": ("adapter", {}),
    "adapter-per-block": ("adapter", {"shared": False, "width": 8}),
    "prompt": ("prompt", {"tokens": 3}),
    "prompt-shallow": ("prompt", {"tokens": 3, "deep": False}),
    "layernorm": ("layernorm", {}),
    "partial": ("partial", {}),
    "ssf": ("ssf", {}),
    "ia3": ("ia3", {}),
    "adaptformer": ("adaptformer", {"width": 8}),
    "lora": ("lora", {"rank": 2}),
    "rolora": ("rolora", {"rank": 2}),
    "lora-q-v": ("lora", {"rank": 2, "targets": ["qkv.q", "qkv.v"]}),
    "dora": ("dora", {"rank": 2}),
    "vera": ("vera", {"rank": 16, "targets": ["qkv", "mlp.*"]}),
    "lora-all": ("lora", {"rank": 2, "targets": ["qkv", "proj", "mlp.*"], "dropout": 0.1}),
}
COMPILED = (
    "bias",
    "adapter",
    "adapter-per-block",
    "adaptformer",
    "ia3",
    "prompt",
    "prompt-shallow",
    "ssf",
    "lora-q-v",
    "lora-all",
)
CONSTANT = ("ia3", "ssf", "vera")
"""Cases whose additions start the same for every seed."""
CONFIG = ModelConfig(name="vit_tiny_patch16_224", weights="none", image_size=32, depth=2, classes=("a", "b", "c"))
every_case = pytest.mark.parametrize("case", CASES)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return backbones.build(CONFIG, seed=3)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def tuned(backbone: Backbone, case: str, seed: int = 3) -> TunedModel:
    name, options = CASES[case]
    return tune(backbone, name, options, seed)


def step(model: TunedModel, images: torch.Tensor, count: int) -> torch.optim.Optimizer:
    """Trains `count` steps of SGD with momentum, all images of classes 0, 1, 2, 0."""
    optimizer = torch.optim.SGD(model.trainable(1).values(), lr=0.5, momentum=0.9)
    model.train()
    for _ in range(count):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model.module(images), torch.tensor([0, 1, 2, 0])).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    model.eval()
    return optimizer


def logits(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(images)
    return found


@pytest.fixture(autouse=True)
def untouched(backbone: Backbone) -> Iterator[None]:
    """Checks that the backbone stays as it was built, bit for bit, in every test with tuned models."""
    before = {n: t.clone() for n, t in backbone.module.state_dict().items()}
    yield
    after = backbone.module.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n], before[n]) for n in before)
    assert not any(p.requires_grad or p.grad is not None for p in backbone.module.parameters())


@every_case
def test_starts_as_the_backbone(backbone: Backbone, images: torch.Tensor, case: str) -> None:
    same = torch.allclose(logits(tuned(backbone, case).module, images), logits(backbone.module, images), 0, 1e-6)
    assert same is not case.startswith("prompt")  # whose tokens are there from the start


@every_case
def test_everything_tuned_moves_and_nothing_else(backbone: Backbone, images: torch.Tensor, case: str) -> None:
    model = tuned(backbone, case)
    names = set(model.trainable(1))
    before = {n: p.detach().clone() for n, p in model.module.named_parameters()}
    start = model.state()
    # The second step: a factor beside one that starts at zero gets its first gradient only then.
    optimizer = step(model, images, 2)
    still = [name for name, values in model.state().items() if np.array_equal(values, start[name])]
    assert still == [name for name in start if name not in names]
    for name, parameter in model.module.named_parameters():
        if model.method.canonical(name) not in names:
            assert torch.equal(parameter, before[name]), name
            assert parameter.grad is None
            assert parameter not in optimizer.state
    assert len(optimizer.state) == len(names)


def test_one_step_moves_all_but_the_factors_behind_a_zero(backbone: Backbone, images: torch.Tensor) -> None:
    waiting = {"adapter": {"adapter.down.weight", "adapter.down.bias"}, "bias": set(), "prompt": set()}
    qkv = [f"blocks.{i}.attn.qkv" for i in range(2)]
    waiting |= {"layernorm": set(), "partial": set(), "ssf": set(), "ia3": set()}
    waiting |= {case: {f"{layer}.lora_A.weight" for layer in qkv} for case in ("lora", "dora")}
    waiting["lora-q-v"] = {f"{layer}.parts.{part}.lora_A.weight" for layer in qkv for part in "qv"}
    waiting["vera"] = {n for n in tuned(backbone, "vera").state() if n.endswith("vera_lambda_d")}
    waiting["adaptformer"] = {f"blocks.{i}.adaptformer.down.{n}" for i in range(2) for n in ("weight", "bias")}
    for case, expected in waiting.items():
        model = tuned(backbone, case)
        start = model.state()
        step(model, images, 1)
        assert {n for n, values in model.state().items() if np.array_equal(values, start[n])} == expected


@every_case
def test_extracted_and_put_back_gives_the_same_logits(backbone: Backbone, images: torch.Tensor, case: str) -> None:
    model = tuned(backbone, case)
    step(model, images, 2)
    other = tuned(backbones.build(CONFIG, seed=3), case, seed=99)
    assert not torch.equal(logits(other.module, images), logits(model.module, images))
    other.load(model.state())
    assert torch.equal(logits(other.module, images), logits(model.module, images))


@every_case
def test_spec_and_state_agree(backbone: Backbone, case: str) -> None:
    model = tuned(backbone, case)
    state = model.state()
    assert [(t.name, t.shape) for t in model.spec.tensors] == [(n, v.shape) for n, v in state.items()]
    assert all(v.dtype == np.float32 and v.flags.writeable for v in state.values())
    assert model.spec.method == CASES[case][0]
    trainable = {n for n, p in model.module.named_parameters() if p.requires_grad}
    assert {model.method.canonical(n) for n in trainable} == set(model.trainable(1))
    state["head.bias"][:] = 7  # a copy
    assert not np.any(model.state()["head.bias"] == 7)


@every_case
def test_the_seed_decides_the_start(backbone: Backbone, case: str) -> None:
    torch.manual_seed(11)
    one = tuned(backbone, case).state()
    torch.manual_seed(12)
    again = tuned(backbone, case).state()
    other = tuned(backbone, case, seed=4).state()
    assert all(np.array_equal(one[n], again[n]) for n in one)
    injected = {n for n in one if n not in backbone.stored}
    assert (not injected) or (case in CONSTANT) is not any(not np.array_equal(one[n], other[n]) for n in injected)


@every_case
def test_names_of_frozen_tensors_stay(backbone: Backbone, case: str) -> None:
    model = tuned(backbone, case)
    names = {model.method.canonical(n) for n in model.module.state_dict()}
    assert names == backbone.module.state_dict().keys() | {t.name for t in model.spec.tensors}


@every_case
def test_modes(backbone: Backbone, images: torch.Tensor, case: str) -> None:
    model = tuned(backbone, case)
    assert torch.equal(logits(model.module, images), logits(model.module, images))
    model.train()
    assert model.module.get_submodule("blocks.0.norm1").training is (case == "full")
    random = not torch.equal(logits(model.module, images), logits(model.module, images))
    # With B at zero the dropout before A changes nothing yet.
    assert random is case.startswith("prompt")
    model.eval()
    assert not any(part.training for part in model.module.modules())


@pytest.mark.parametrize("case", COMPILED)
def test_compiles_whole_and_gives_the_same(backbone: Backbone, images: torch.Tensor, case: str) -> None:
    torch.compiler.reset()
    model = tuned(backbone, case)
    compiled: Any = torch.compile(model.module, backend="aot_eager", fullgraph=True)
    assert torch.allclose(logits(compiled, images), logits(model.module, images), 0, 1e-5)
    model.train()
    compiled(images).sum().backward()
    parameters = dict(model.module.named_parameters()).values()
    assert all((p.grad is not None) is p.requires_grad for p in parameters)
    model.trainable(1)
    assert all(p.grad is None for p in parameters)


@pytest.mark.parametrize("case", ["prompt", "prompt-shallow"])
def test_prompts_pass_the_blocks_and_no_further(backbone: Backbone, images: torch.Tensor, case: str) -> None:
    model = tuned(backbone, case)
    seen: list[int] = []
    for part in ("blocks.0.norm1", "blocks.1.norm1", "norm"):
        model.module.get_submodule(part).register_forward_hook(lambda m, a, out: seen.append(out.shape[1]))
    logits(model.module, images)
    assert seen == [8, 8, 5]  # 4 patches, the class token, and 3 prompts


def test_prompts_start_within_the_bound_of_vpt(backbone: Backbone) -> None:
    tokens = tune(backbone, "prompt", {"tokens": 500}, 0).state()["blocks.1.prompt.tokens"]
    bound = (6 / (3 * 16 * 16 + 192)) ** 0.5
    assert 0.99 * bound < np.abs(tokens).max() <= bound
    assert abs(tokens.mean()) < 0.01 * bound * 3


def test_the_shared_adapter_stands_behind_every_mlp(backbone: Backbone, images: torch.Tensor) -> None:
    shared, each = tuned(backbone, "adapter"), tune(backbone, "adapter", {"shared": False}, 0)
    rng = np.random.default_rng(0)
    state = {n: rng.normal(0, 0.1, v.shape).astype(np.float32) for n, v in shared.state().items()}
    shared.load(state)
    bottleneck = {n: v for n, v in state.items() if n.startswith("adapter.")}
    head = {n: v for n, v in state.items() if n.startswith("head.")}
    each.load(head | {f"blocks.{i}.{n}": v for i in range(2) for n, v in bottleneck.items()})
    assert torch.allclose(logits(shared.module, images), logits(each.module, images), 0, 1e-6)
    assert not torch.allclose(logits(shared.module, images), logits(backbone.module, images), 0, 1e-2)


def test_models_on_one_backbone_do_not_meet(backbone: Backbone, images: torch.Tensor) -> None:
    one, other = tuned(backbone, "bias"), tuned(backbone, "full")
    before = logits(one.module, images)
    step(other, images, 2)
    assert torch.equal(logits(one.module, images), before)
    frozen = [p for n, p in one.module.named_parameters() if n == "blocks.0.attn.qkv.weight"]
    assert frozen[0].data_ptr() == backbone.module.get_parameter("blocks.0.attn.qkv.weight").data_ptr()


def test_load_is_strict_and_sets_nothing_when_it_fails(backbone: Backbone) -> None:
    model = tuned(backbone, "lora")
    before = model.state()
    good = {n: v + 1 for n, v in before.items()}
    cases = [
        ({n: v for n, v in good.items() if n != "head.bias"}, "head.bias of adapter lora is missing"),
        (good | {"blocks.0.norm1.bias": np.zeros(192, np.float32)}, "blocks.0.norm1.bias is not of adapter"),
        (good | {"head.bias": np.zeros(4, np.float32)}, r"shape \(4,\); the model needs \(3,\)"),
    ]
    for tensors, says in cases:
        with pytest.raises(ModelInvalid, match=says):
            model.load(tensors)
        assert all(np.array_equal(v, before[n]) for n, v in model.state().items())
    for values in good.values():
        values.setflags(write=False)  # as arrays over received bytes are
    model.load(good)
    assert all(np.array_equal(v, good[n]) for n, v in model.state().items())


@pytest.fixture
def alternating() -> Iterator[str]:
    """A method with roles: the head stays local, weights and biases of the last norm take turns."""

    class Alternating(Method[MethodOptions]):
        def tunes(self, name: str) -> bool:
            return name.startswith("norm.")

        def roles(self, name: str) -> tuple[TensorRole, ...]:
            if name.startswith("head."):
                return (TensorRole.LOCAL,)
            turns = (TensorRole.SENT, TensorRole.FROZEN)
            return turns if name.endswith("bias") else turns[::-1]

    methods.names()
    methods.register("alternating")(Alternating)
    yield "alternating"
    del methods._items["alternating"]


def test_roles_choose_what_trains_in_a_round(backbone: Backbone, images: torch.Tensor, alternating: str) -> None:
    model = tune(backbone, alternating, {}, 0)
    assert list(model.trainable(1)) == ["head.bias", "head.weight", "norm.bias"]
    step(model, images, 1)
    chosen = model.trainable(2)
    assert list(chosen) == ["head.bias", "head.weight", "norm.weight"]
    required = {n for n, p in model.module.named_parameters() if p.requires_grad}
    assert required == set(chosen)
    assert all(p.grad is None for p in model.module.parameters())
    head = model.state()["head.weight"]
    model.load({n: np.zeros(192, np.float32) for n in ("norm.bias", "norm.weight")})  # what a version holds
    assert np.array_equal(model.state()["head.weight"], head)


def test_a_tensor_may_not_be_local_in_one_round_and_sent_in_another() -> None:
    with pytest.raises(SpecInvalid, match=r"x is local in one round and sent in another"):
        AdapterSpec.of("own", [TensorSpec("x", (2,), (TensorRole.SENT, TensorRole.LOCAL))])
    spec = AdapterSpec.of("own", [TensorSpec("x", (2,), (TensorRole.LOCAL, TensorRole.FROZEN)), TensorSpec("y", (2,))])
    assert [tensor.name for tensor in spec.shared] == ["y"]  # what stays at the client is in no version
