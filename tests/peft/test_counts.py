"""The paper's parameter counts, on the meta device: no weights, no memory."""

import re
from pathlib import Path

import pytest

from fedpeft.config import ModelConfig
from fedpeft.errors import ConfigInvalid, ModelInvalid
from fedpeft.models.families import family_of
from fedpeft.peft import Method, count, methods, spec_of

BASE, SMALL, LARGE = (f"vit_{size}_patch16_224" for size in ("base", "small", "large"))
METHODS = ("full", "head", "bias", "adapter", "prompt")

PAPER = {
    (BASE, 100): (85_875_556, 76_900, 179_812, 225_220, 169_060),
    (BASE, 45): (85_833_261, 34_605, 137_517, 182_925, 126_765),
    (BASE, 2): (85_800_194, 1_538, 104_450, 149_858, 93_698),
    (SMALL, 100): (21_704_164, 38_500, 89_956, 75_796, 84_580),
    (SMALL, 45): (21_682_989, 17_325, 68_781, 54_621, 63_405),
    (SMALL, 2): (21_666_434, 770, 52_226, 38_066, 46_850),
    (LARGE, 100): (303_404_132, 102_500, 374_884, 365_796, 348_260),
    (LARGE, 45): (303_347_757, 46_125, 318_509, 309_421, 291_885),
    (LARGE, 2): (303_303_682, 2_050, 274_434, 265_346, 247_810),
}


def shapes(model: str, method: str, classes: int = 2, **options: object) -> dict[str, tuple[int, ...]]:
    config = ModelConfig(name=model, weights="none", classes=tuple(map(str, range(classes))))
    return {t.name: t.shape for t in spec_of(config, method, options).tensors}


@pytest.mark.parametrize(("model", "classes"), PAPER)
def test_paper_counts(model: str, classes: int) -> None:
    assert tuple(count(model, method, {}, classes) for method in METHODS) == PAPER[model, classes]


@pytest.mark.parametrize(("classes", "expected"), [(100, 1_856_740), (45, 1_814_445), (2, 1_781_378)])
def test_adapter_per_block(classes: int, expected: int) -> None:
    assert count(BASE, "adapter", {"shared": False}, classes) == expected


def test_shallow_prompt_is_one_set() -> None:
    assert count(BASE, "prompt", {"deep": False}, 100) == 10 * 768 + 76_900
    assert count(BASE, "prompt", {"tokens": 3}, 100) == 12 * 3 * 768 + 76_900


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"rank": 4}, 147_456),
        ({}, 294_912),
        ({"rank": 16}, 589_824),
        ({"rank": 4, "targets": ["qkv", "proj", "fc1", "fc2"]}, 589_824),
        ({"targets": ["attn.*", "mlp.fc?"]}, 1_179_648),
    ],
)
def test_lora(options: dict[str, object], expected: int) -> None:
    assert count(BASE, "lora", options, 100) == expected + 76_900


ROW = re.compile(r"^\| `(\w+)` .*\| ([\d,]+) \| (as it is|merged|no) \| (yes|no) \|$", re.M)


def test_the_table_of_methods_is_true() -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "run-file.md"
    rows = {name: facts for name, *facts in ROW.findall(page.read_text(encoding="utf-8"))}
    assert rows.keys() == {name for name in methods.names() if methods.get(name).__module__.startswith("fedpeft.")}
    for name, (values, timm, peft) in rows.items():
        assert count(BASE, name, {}, 100) - 76_900 == int(values.replace(",", "")), name
        assert (methods.get(name).peft_form is not None) is (peft == "yes"), name
        merges = methods.get(name).plain is not Method.plain
        assert merges is (timm == "merged"), name


HEAD = {"head.weight": (2, 768), "head.bias": (2,)}


def test_shapes_of_head_and_adapter() -> None:
    assert shapes(BASE, "head") == HEAD
    bottleneck = {"down.weight": (96, 768), "down.bias": (96,), "up.weight": (768, 96), "up.bias": (768,)}
    assert shapes(BASE, "adapter") == HEAD | {f"adapter.{n}": s for n, s in bottleneck.items()}
    each = {f"blocks.{i}.adapter.{n}": s for i in range(12) for n, s in bottleneck.items()}
    assert shapes(BASE, "adapter", shared=False) == HEAD | each


def test_shapes_of_prompt() -> None:
    assert shapes(BASE, "prompt") == HEAD | {f"blocks.{i}.prompt.tokens": (10, 768) for i in range(12)}
    assert shapes(BASE, "prompt", deep=False) == HEAD | {"blocks.0.prompt.tokens": (10, 768)}


def test_shapes_of_lora_on_the_fused_qkv() -> None:
    pair = {"lora_A.weight": (8, 768), "lora_B.weight": (2304, 8)}
    assert shapes(BASE, "lora") == HEAD | {f"blocks.{i}.attn.qkv.{n}": s for i in range(12) for n, s in pair.items()}


def test_shapes_of_bias() -> None:
    found = shapes(BASE, "bias")
    assert found.pop("head.weight") == (2, 768)
    assert all(name.endswith(".bias") and len(shape) == 1 for name, shape in found.items())
    block = {"norm1": 768, "attn.qkv": 2304, "attn.proj": 768, "norm2": 768, "mlp.fc1": 3072, "mlp.fc2": 768}
    assert {n: found[f"blocks.7.{n}.bias"][0] for n in block} == block
    assert len(found) == 12 * 6 + 3  # and patch embedding, last norm, head


def test_full_tunes_embeddings_too() -> None:
    found = shapes(BASE, "full")
    assert found["pos_embed"] == (1, 197, 768)
    assert found["cls_token"] == (1, 1, 768)


@pytest.mark.parametrize(
    ("method", "options", "path", "says"),
    [
        ("lora", {"rank": 0}, "peft.rank", "greater than or equal to 1"),
        ("lora", {"ranks": 4}, "peft.ranks", "there are: alpha, dropout, rank, targets"),
        ("lora", {"targets": ["qkv", "query"]}, "peft.targets", "attn.proj, attn.qkv, mlp.fc1, mlp.fc2"),
        ("lora", {"targets": []}, "peft.targets", "names no layer; there are: attn.proj, attn.qkv"),
        ("prompt", {"dropout": 1.0}, "peft.dropout", "less than 1"),
        ("head", {"rank": 8}, "peft.rank", "there are: none"),
    ],
)
def test_bad_options_name_the_field(method: str, options: dict[str, object], path: str, says: str) -> None:
    with pytest.raises(ConfigInvalid, match=says) as caught:
        count(SMALL, method, options, 2)
    assert [field for field, _ in caught.value.fields] == [path]


def test_unknown_names() -> None:
    with pytest.raises(ConfigInvalid, match=f"there are: {', '.join(methods.names())}"):
        count(SMALL, "lore", {}, 2)
    with pytest.raises(ModelInvalid, match="near it are vit_small_patch16_224"):
        count("vit_smal_patch16_224", "bias", {}, 2)
    with pytest.raises(ModelInvalid, match="no model 'vit_bas'") as caught:
        count("vit_bas", "bias", {}, 2)
    near = caught.value.message.rpartition("near it are ")[2].split(", ")
    assert "vit_base_patch16_224" in near and all(family_of(name) for name in near)  # not gcvit_base, refused next
    with pytest.raises(ModelInvalid, match=r"timm\.models\.resnet"):
        count("resnet18", "bias", {}, 2)
    with pytest.raises(ModelInvalid, match="Invalid pretrained tag"):
        count("vit_small_patch16_224.no_such_tag", "bias", {}, 2)
    with pytest.raises(ConfigInvalid, match="1 class; at least 2"):
        count(SMALL, "bias", {}, 1)
    with pytest.raises(ConfigInvalid, match=r"'\.\./vit' with 2 classes"):
        count("../vit", "bias", {}, 2)
