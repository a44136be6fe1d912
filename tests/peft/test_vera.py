"""VeRA: two vectors a layer around random matrices that every site draws for itself, to the same bits."""

import copy
import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from fedpeft.errors import ConfigInvalid, ModelInvalid
from fedpeft.export import formats
from fedpeft.models import backbones
from fedpeft.peft import count, timm_spec, tune
from fedpeft.peft.tuners.vera import drawn

from .plain_vit import BASE, CONFIG, HEAD, HIDDEN, PlainVit, State, close, images, moved

OPTIONS = {"rank": 16, "targets": ["qkv", "mlp.*"]}
WIDEST = HIDDEN  # rows of B, those of fc1, and columns of A, those of fc2


class Scaled(PlainVit):
    """The method written out, of rank 16 and seed 0."""

    down, up = (torch.from_numpy(drawn(0, name, shape)) for name, shape in
                (("vera_A", (16, WIDEST)), ("vera_B", (WIDEST, 16))))  # fmt: skip

    def layer(self, name: str, x: torch.Tensor) -> torch.Tensor:
        y = super().layer(name, x)
        if f"{name}.vera_lambda_b" not in self.state:
            return y
        b, d = self.state[f"{name}.vera_lambda_b"], self.state[f"{name}.vera_lambda_d"]
        return y + b * ((d * (x @ self.down[:, : x.shape[-1]].T)) @ self.up[: len(b)].T)


@pytest.mark.parametrize(("rank", "expected"), [(256, 30_720), (1024, 39_936)])  # 12 x (2304 + rank)
def test_counts_and_shapes_of_vit_b(rank: int, expected: int) -> None:
    assert count(BASE, "vera", {"rank": rank}, 100) == expected + 76_900
    parts = {"vera_lambda_b": (2304,), "vera_lambda_d": (rank,)}
    spec = timm_spec(BASE, "vera", {"rank": rank}, 100)
    names = {f"blocks.{i}.attn.qkv.{n}": s for i in range(12) for n, s in parts.items()}
    assert {t.name: t.shape for t in spec.tensors} == HEAD | names
    assert spec.shared == spec.sent(1) == spec.tensors, "A and B are in no version and no update"


def test_equals_the_formula_written_out() -> None:
    model, state = moved("vera", **OPTIONS)
    assert close(model, Scaled(state))


def test_vectors_start_at_a_tenth_and_zero_whatever_the_seed_of_the_run() -> None:
    for name, values in tune(backbones.build(CONFIG, 3), "vera", OPTIONS, 8).state().items():
        assert name.startswith("head.") or (values == np.float32(0.1 if name.endswith("_d") else 0)).all()


@pytest.mark.parametrize(
    ("seed", "name", "sha256"),
    [
        (0, "vera_A", "9258389f8beae5e2"),
        (0, "vera_B", "73bc719b8eb1c0c3"),
        (7, "vera_A", "c3f3bddad946195a"),
    ],
)
def test_random_matrices_have_these_bits_on_every_machine(seed: int, name: str, sha256: str) -> None:
    values = drawn(seed, name, (64, 24))
    assert hashlib.sha256(values.astype("<f4").tobytes()).hexdigest()[:16] == sha256


def test_random_matrices_are_uniform_within_kaimings_bound() -> None:
    values, bound = drawn(3, "vera_A", (256, 768)), (6 / 768) ** 0.5
    assert 0.999 * bound < np.abs(values).max() <= bound
    counts, _ = np.histogram(values, 64, (-bound, bound))
    assert ((counts - values.size / 64) ** 2).sum() / (values.size / 64) < 63 + 5 * 126**0.5  # chi-square


def test_clients_have_the_same_matrices_in_all_layers_and_runs() -> None:
    one, other = (tune(backbones.build(CONFIG, seed), "vera", OPTIONS, seed) for seed in (3, 4))
    held = [part.vera_A["default"] for m in (one, other) for part in m.module.modules() if hasattr(part, "vera_A")]
    assert len(held) == 2 * 2 * 3 and all(torch.equal(held[0], each) for each in held)
    assert len({each.data_ptr() for each in held}) == 2, "one a model"
    assert held[0].shape == (16, WIDEST) and not any("vera_A" in name for name in one.module.state_dict())
    twin = copy.deepcopy(one.module)
    with torch.no_grad():
        assert torch.equal(twin(images()), one.module(images()))


def test_merges_into_the_plain_model(tmp_path: Path) -> None:
    model, _ = moved("vera", **OPTIONS)
    formats.as_timm(model, tmp_path / "model.safetensors")
    assert close(model, PlainVit(load_file(tmp_path / "model.safetensors")))


@pytest.fixture
def exported(tmp_path: Path) -> tuple[Path, State]:
    formats.as_peft(moved("vera", **OPTIONS)[0], tmp_path)
    return tmp_path, load_file(tmp_path / "adapter_model.safetensors")


def test_the_peft_library_loads_it_with_our_matrices_and_it_comes_back(exported: tuple[Path, State]) -> None:
    folder, _ = exported
    model, _ = moved("vera", **OPTIONS)
    loaded = PeftModel.from_pretrained(backbones.build(CONFIG, 3).module, str(folder)).eval()
    read = formats.from_peft(folder, model.backbone)
    assert read.method == "vera" and read.options["targets"] == ("attn.qkv", "mlp.fc1", "mlp.fc2")
    again = tune(model.backbone, "vera", read.options, 8)
    again.load(read.tensors)
    with torch.no_grad():
        assert torch.allclose(loaded(images()), model.module(images()), 0, 1e-6)
        assert torch.equal(again.module(images()), model.module(images()))
    card = (folder / "README.md").read_text()
    assert "# A VeRA for image classification" in card and "It needs the package `peft>=0.21`." in card


def test_a_library_that_has_no_place_for_the_matrices_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As releases before 0.21, which would write matrices of their own."""
    taken = SimpleNamespace(unexpected_keys=["base_model.vera_A", "base_model.vera_B"])
    monkeypatch.setattr("peft.set_peft_model_state_dict", lambda *_: taken)
    said = r"has no place for base_model\.vera_A .*; install peft>=0\.21, or keep the adapter file"
    with pytest.raises(ConfigInvalid, match=said):
        formats.as_peft(moved("vera", **OPTIONS)[0], tmp_path)
    assert not list(tmp_path.iterdir())


def test_matrices_that_we_would_not_draw_are_refused(exported: tuple[Path, State]) -> None:
    folder, state = exported
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    backbone = backbones.build(CONFIG, 3)
    save_file(state | {"base_model.vera_B": state["base_model.vera_B"] + 1e-6}, weights)
    with pytest.raises(ModelInvalid, match="has another vera_B than method vera draws from seed 0"):
        formats.from_peft(folder, backbone)
    save_file({n: t for n, t in state.items() if n != "base_model.vera_A"}, weights)
    with pytest.raises(ModelInvalid, match="has no vera_A"):
        formats.from_peft(folder, backbone)
    save_file(state, weights)
    data = json.loads(config.read_text())
    for change, says in (({"bias": "all"}, "uses bias"), ({"projection_prng_key": 1}, "draws from seed 1")):
        config.write_text(json.dumps(data | change))
        with pytest.raises(ModelInvalid, match=says):
            formats.from_peft(folder, backbone)
    del data["r"]
    config.write_text(json.dumps(data))
    with pytest.raises(ModelInvalid, match="has no r, which every VeRA has"):
        formats.from_peft(folder, backbone)
