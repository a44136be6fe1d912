"""FFA-LoRA and RoLoRA: the roles of the factors, what they cost, and that their means are exact."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from fedpeft.adapters.spec import AdapterSpec, TensorSpec
from fedpeft.config import ModelConfig
from fedpeft.models import backbones
from fedpeft.models.backbones import Backbone
from fedpeft.peft import TunedModel, count, timm_spec, tune

CONFIG = ModelConfig(name="vit_tiny_patch16_224", weights="none", image_size=32, depth=2, classes=("a", "b", "c"))
VIT, HEAD = "vit_base_patch16_224", 76_900
OPTIONS = {"rank": 2, "alpha": 6.0, "targets": "proj"}
A_MEMBER, B_MEMBER = "lora_A.weight", "lora_B.weight"


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return backbones.build(CONFIG, seed=3)


def trained(model: TunedModel, number: int, client: int) -> dict[str, np.ndarray]:
    """Trains three steps of a round on a client's own images, from what the model holds; returns what it holds then."""
    generator = torch.Generator().manual_seed(client)
    images = torch.randn(4, 3, 32, 32, generator=generator)
    optimizer = torch.optim.SGD(model.trainable(number).values(), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model.module(images), torch.tensor([0, 1, 2, 0])).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return model.state()


def product(state: dict[str, np.ndarray], scale: float) -> dict[str, np.ndarray]:
    """Returns s B A of every layer, float64."""
    layers = [name.removesuffix(A_MEMBER) for name in state if name.endswith(A_MEMBER)]
    return {n: scale * state[n + B_MEMBER].astype(float) @ state[n + A_MEMBER].astype(float) for n in layers}


def names(spec: AdapterSpec, number: int) -> set[str]:
    return {tensor.name.rsplit(".", 2)[1] for tensor in spec.sent(number)}


@pytest.mark.parametrize(("rank", "b"), [(8, 221_184), (16, 442_368)])  # 12 layers x rank x 2304
def test_ffa_lora_tunes_and_sends_b_and_the_head(rank: int, b: int) -> None:
    assert count(VIT, "ffa_lora", {"rank": rank}, 100) == b + HEAD
    assert timm_spec(VIT, "ffa_lora", {"rank": rank}, 100).largest_update == b + HEAD
    square = {"rank": 8, "targets": "attn.proj"}
    lora, ffa = (timm_spec(VIT, method, square, 100) for method in ("lora", "ffa_lora"))
    assert 2 * (ffa.largest_update - HEAD) == lora.largest_update - HEAD


def test_what_versions_differ_in_goes_down(backbone: Backbone) -> None:
    def parts(tensors: tuple[TensorSpec, ...]) -> set[str]:
        return {part for t in tensors for part in t.name.split(".") if part in ("lora_A", "lora_B", "head")}

    ffa, ro = (tune(backbone, method, OPTIONS, 0).spec for method in ("ffa_lora", "rolora"))
    assert parts(ffa.changed(0, 9)) == {"lora_B", "head"}
    assert parts(ffa.shared) == {"lora_A", "lora_B", "head"}
    assert [parts(ro.changed(n, n + 1)) for n in (0, 1, 2)] == [
        {"lora_B", "head"},
        {"lora_A", "head"},
        {"lora_B", "head"},
    ]
    assert ro.changed(3, 5) == ro.changed(5, 3) == ro.shared
    assert ro.changed(4, 4) == ()


@pytest.mark.parametrize("method", ["ffa_lora", "rolora"])
def test_the_mean_of_a_round_is_the_mean_of_the_products(backbone: Backbone, method: str) -> None:
    model, scale = tune(backbone, method, OPTIONS, 0), OPTIONS["alpha"] / OPTIONS["rank"]
    version, weights = model.state(), np.array([0.2, 0.5, 0.3])
    history = [version]
    for number in (1, 2, 3):
        sent = {tensor.name for tensor in model.spec.sent(number)}
        states = []
        for client in range(3):
            model.load(version)
            states.append(trained(model, number, client))
        for state in states:
            idle = state.keys() - sent
            assert idle and all(np.array_equal(state[name], version[name]) for name in idle)
        mean = {
            name: sum(w * state[name].astype(float) for w, state in zip(weights, states, strict=True))
            for name in version
        }
        means = product(mean, scale)
        for layer, exact in product(states[0], scale).items():
            exact = sum(w * product(state, scale)[layer] for w, state in zip(weights, states, strict=True))
            # What did not train is a mean of equal values here, which rounds: 1e-15 relative of them.
            np.testing.assert_allclose(means[layer], exact, rtol=0, atol=1e-12)
            assert np.abs(exact).max() > 1e-4, "nothing was trained"
        version = {n: version[n] if n not in sent else mean[n].astype(np.float32) for n in version}
        history.append(version)
    moved = [
        {n.rsplit(".", 2)[1] for n in one if not np.array_equal(one[n], other[n])} for one, other in pairwise(history)
    ]
    assert moved == [names(model.spec, number) for number in (1, 2, 3)]


def test_a_is_equal_on_all_clients_of_a_run(backbone: Backbone) -> None:
    one, other, lora = (tune(backbone, method, OPTIONS, 7).state() for method in ("ffa_lora", "ffa_lora", "lora"))
    assert all(np.array_equal(one[name], other[name]) and np.array_equal(one[name], lora[name]) for name in lora)


def test_fedsa_lora_sends_a_alone_and_keeps_b_and_the_head() -> None:
    spec = timm_spec(VIT, "fedsa_lora", {"rank": 8, "targets": ["qkv.q", "qkv.v"]}, 100)
    assert {name.rsplit(".", 2)[1].rpartition("_")[2] for name in (t.name for t in spec.sent(1))} == {"A"}
    lora = timm_spec(VIT, "lora", {"rank": 8, "targets": ["qkv.q", "qkv.v"]}, 100)
    assert 2 * spec.largest_update == lora.largest_update - HEAD, "in / (in + out) of LoRA's values, here a half"
    assert spec.shared == spec.sent(1), "nothing else goes down either"
    averaged = timm_spec(VIT, "fedsa_lora", {"rank": 8, "local_head": False}, 100)
    assert averaged.largest_update == 12 * 8 * 768 + HEAD


def test_clients_of_one_a_keep_models_of_their_own(backbone: Backbone) -> None:
    model = tune(backbone, "fedsa_lora", OPTIONS, 0)
    sent = {tensor.name for tensor in model.spec.sent(1)}
    first = model.state()
    states = []
    for client in range(2):
        model.load(first)
        states.append(trained(model, 1, client))
    version = {name: (states[0][name] + states[1][name]) / 2 for name in sent}
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(9))
    outputs = []
    for state in states:
        model.load({**{name: values for name, values in state.items() if name not in sent}, **version})
        with torch.no_grad():
            outputs.append(model.module(images))
        assert all(np.array_equal(model.state()[name], values) for name, values in version.items())
    assert not torch.allclose(outputs[0], outputs[1], atol=1e-4)
    assert sent and all(not np.array_equal(version[name], first[name]) for name in sent)
