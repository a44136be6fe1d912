"""LoRA on parts of a fused qkv: shapes, the formula, the parts that stay, the way to the `peft` library."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from fedpeft.errors import ConfigInvalid
from fedpeft.export import formats
from fedpeft.models import backbones
from fedpeft.peft import count, timm_spec, tune

from .plain_vit import BASE, CONFIG, HEAD, WIDTH, PlainVit, close, images, moved

Q_V = ["qkv.q", "qkv.v"]
PLACES = {"q": 0, "k": 1, "v": 2}


class Apart(PlainVit):
    """The method written out, of rank 4 and alpha 6."""

    def layer(self, name: str, x: torch.Tensor) -> torch.Tensor:
        y = super().layer(name, x)
        for part, place in PLACES.items():
            down = self.state.get(f"{name}.parts.{part}.lora_A.weight")
            if down is not None:
                rows = slice(place * WIDTH, (place + 1) * WIDTH)
                y[..., rows] += 6 / 4 * (x @ down.T @ self.state[f"{name}.parts.{part}.lora_B.weight"].T)
        return y


@pytest.mark.parametrize(("rank", "expected"), [(4, 147_456), (8, 294_912), (16, 589_824)])
def test_counts_and_shapes_of_vit_b(rank: int, expected: int) -> None:
    assert count(BASE, "lora", {"rank": rank, "targets": Q_V}, 100) == expected + 76_900
    pair = {"lora_A.weight": (rank, 768), "lora_B.weight": (768, rank)}
    names = {f"blocks.{i}.attn.qkv.parts.{p}.{n}": s for i in range(12) for p in "qv" for n, s in pair.items()}
    spec = timm_spec(BASE, "lora", {"rank": rank, "targets": Q_V}, 100)
    assert {t.name: t.shape for t in spec.tensors} == HEAD | names


def test_variants_take_the_same_targets() -> None:
    ffa = timm_spec(BASE, "ffa_lora", {"targets": Q_V}, 100)
    assert ffa.parameters == ffa.largest_update == 147_456 + 76_900
    rolora = timm_spec(BASE, "rolora", {"targets": Q_V}, 100)
    assert {t.name.split(".")[-2] for t in rolora.sent(1)} == {"lora_B", "head"}
    assert {t.name.split(".")[-2] for t in rolora.sent(2)} == {"lora_A", "head"}


@pytest.mark.parametrize("targets", [Q_V, "qkv.k", ["qkv.[qv]", "proj"], ["blocks.1.attn.qkv.v"]])
def test_equals_the_formula_written_out(targets: object) -> None:
    model, state = moved("lora", rank=4, alpha=6, targets=targets)
    if "proj" in targets:  # type: ignore[operator]
        for block in range(2):
            layer = model.module.get_submodule(f"blocks.{block}.attn.proj")
            state[f"blocks.{block}.attn.proj.weight"] = layer.weight + layer.get_delta_weight("default")  # type: ignore[operator]
    assert close(model, Apart(state), 1e-4)


def test_the_keys_stay_bit_for_bit() -> None:
    model, _ = moved("lora", targets=Q_V)
    x = torch.randn(2, 5, WIDTH)
    with torch.no_grad():
        tuned, plain = (m.get_submodule("blocks.0.attn.qkv")(x) for m in (model.module, model.backbone.module))
    same = [torch.equal(one, other) for one, other in zip(tuned.chunk(3, -1), plain.chunk(3, -1), strict=True)]
    assert same == [False, True, False]


def test_merges_into_the_plain_model_whose_keys_stay(tmp_path: Path) -> None:
    model, _ = moved("lora", targets=Q_V)
    formats.as_timm(model, tmp_path / "model.safetensors")
    state = load_file(tmp_path / "model.safetensors")
    assert close(model, PlainVit(state))
    name, keys = "blocks.1.attn.qkv.weight", slice(WIDTH, 2 * WIDTH)
    assert torch.equal(state[name][keys], model.backbone.module.get_parameter(name)[keys])


def test_the_peft_library_loads_it_as_one_lora_of_the_whole_layer(tmp_path: Path) -> None:
    model, _ = moved("lora", rank=3, alpha=5, targets=Q_V)
    formats.as_peft(model, tmp_path)
    loaded = PeftModel.from_pretrained(backbones.build(CONFIG, 3).module, str(tmp_path)).eval()
    read = formats.from_peft(tmp_path, model.backbone)
    assert read.options == {"rank": 6, "alpha": 10.0, "dropout": 0.0, "targets": ("attn.qkv",)}
    again = tune(model.backbone, read.method, read.options, 8)
    again.load(read.tensors)
    with torch.no_grad():
        for other in (loaded, again.module):
            assert torch.allclose(other(images()), model.module(images()), 0, 1e-5)


def test_what_has_no_peft_form_is_refused(tmp_path: Path) -> None:
    for targets in (["qkv.q", "proj"], ["qkv.q", "blocks.0.attn.qkv.v"]):
        with pytest.raises(ConfigInvalid, match="have no peft form; keep the adapter file"):
            formats.as_peft(moved("lora", targets=targets)[0], tmp_path)


@pytest.mark.parametrize(
    ("targets", "says"),
    [
        (["qkv", "qkv.q"], r"name blocks\.0\.attn\.qkv as a whole and in part"),
        (["qkv.w"], r"'qkv\.w' fits no linear layer of a block; there are: attn\.proj, attn\.qkv"),
        ([], r"names no layer; there are: attn\.proj, attn\.qkv"),
        (["proj.q"], r"'proj\.q' fits no linear layer of a block"),
    ],
)
def test_wrong_targets_are_named(targets: list[str], says: str) -> None:
    with pytest.raises(ConfigInvalid, match=says) as caught:
        count(BASE, "lora", {"targets": targets}, 100)
    assert [field for field, _ in caught.value.fields] == ["peft.targets"]
