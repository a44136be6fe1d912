"""Building a backbone: weights from everywhere, strictness, fingerprints."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from fedpeft.config import ModelConfig
from fedpeft.data.transforms import ImageInputs
from fedpeft.errors import ModelInvalid
from fedpeft.models.backbones import build, fingerprint, resolve_weights
from fedpeft.peft import spec_of, tune

NAME = "vit_tiny_patch16_224"


def config(**changes: Any) -> ModelConfig:
    return ModelConfig(
        **{"name": NAME, "weights": "none", "image_size": 32, "depth": 2, "classes": ("a", "b", "c"), **changes}
    )


@pytest.fixture(scope="module")
def checkpoint() -> dict[str, torch.Tensor]:
    """A pre-trained checkpoint as timm has it: three blocks, 48 px, 1000 classes."""
    torch.manual_seed(5)
    state: dict[str, torch.Tensor] = timm.create_model(NAME, depth=3, img_size=48).state_dict()
    return {name: tensor + 0.01 for name, tensor in state.items()}


@pytest.fixture
def weights(tmp_path: Path, checkpoint: dict[str, torch.Tensor]) -> Path:
    path = tmp_path / "vit.safetensors"
    save_file(checkpoint, path)
    return path


def test_random_weights_come_from_the_seed_alone() -> None:
    torch.manual_seed(1)
    one = build(config(), 7)
    before = torch.get_rng_state()
    again = build(config(), 7)
    assert torch.equal(torch.get_rng_state(), before)
    other = build(config(), 8)
    state, same, different = (b.module.state_dict() for b in (one, again, other))
    assert all(torch.equal(state[n], same[n]) for n in state)
    assert not torch.equal(state["head.weight"], different["head.weight"])
    assert not torch.equal(state["blocks.0.attn.qkv.weight"], different["blocks.0.attn.qkv.weight"])


def test_a_backbone_is_described_by_timm() -> None:
    backbone = build(config(), 0)
    assert backbone.images == ImageInputs(32, (0.5,) * 3, (0.5,) * 3, "bicubic")
    assert backbone.parameters == sum(t.numel() for t in backbone.module.state_dict().values())
    assert not backbone.module.training
    assert backbone.device == torch.device("cpu")
    own = build(ModelConfig(name=NAME, weights="none", classes=("a", "b")), 0)
    assert own.images is not None and own.images.image_size == 224
    assert len(own.structure.blocks) == 12
    assert own.module(torch.zeros(1, 3, 224, 224)).shape == (1, 2)


@pytest.mark.parametrize("form", ["safetensors", "plain", "state_dict", "model", "module."])
def test_a_file_is_loaded(tmp_path: Path, checkpoint: dict[str, torch.Tensor], form: str) -> None:
    path = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pth")
    if form == "safetensors":
        save_file(checkpoint, path)
    elif form == "module.":
        torch.save({f"module.{n}": t for n, t in checkpoint.items()}, path)
    else:
        torch.save({form: checkpoint, "epoch": 3} if form != "plain" else checkpoint, path)
    backbone = build(config(weights=str(path)), 0)
    state = backbone.module.state_dict()
    same = [n for n in state if n in checkpoint and torch.equal(state[n], checkpoint[n])]
    assert sorted(state.keys() - same) == ["head.bias", "head.weight", "pos_embed"]
    assert state["head.weight"].shape == (3, 192)
    assert state["pos_embed"].shape == (1, 5, 192)  # resampled from 3 x 3 patches


def test_the_head_is_the_same_whatever_the_weights(weights: Path) -> None:
    one, other = build(config(weights=str(weights)), 7), build(config(), 7)
    assert torch.equal(one.module.get_parameter("head.weight"), other.module.get_parameter("head.weight"))
    assert 0.01 < one.module.get_parameter("head.weight").std() < 0.03
    assert not one.module.get_parameter("head.bias").any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_become_float32(
    tmp_path: Path, checkpoint: dict[str, torch.Tensor], dtype: torch.dtype
) -> None:
    path = tmp_path / "half.safetensors"
    save_file({n: t.to(dtype) for n, t in checkpoint.items()}, path)
    state = build(config(weights=str(path)), 0).module.state_dict()
    assert {t.dtype for t in state.values()} == {torch.float32}
    assert torch.equal(state["norm.weight"], checkpoint["norm.weight"].to(dtype).float())


def broken(state: dict[str, torch.Tensor], how: str) -> dict[str, torch.Tensor]:
    state = dict(state)
    if how == "missing":
        del state["blocks.1.mlp.fc1.bias"]
    elif how == "unknown":
        state["blocks.0.attn.gate"] = torch.zeros(3)
    elif how == "shape":
        state["norm.weight"] = torch.zeros(191)
    elif how == "dtype":
        state["norm.weight"] = torch.zeros(192, dtype=torch.int64)
    return state


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("missing", r"it lacks blocks\.1\.mlp\.fc1\.bias$"),
        ("unknown", r"which has no blocks\.0\.attn\.gate$"),
        ("shape", r"norm\.weight is \(191,\), not \(192,\)"),
        ("dtype", r"norm\.weight is torch\.int64"),
    ],
)
def test_a_file_must_fit(tmp_path: Path, checkpoint: dict[str, torch.Tensor], how: str, says: str) -> None:
    path = tmp_path / "bad.safetensors"
    save_file(broken(checkpoint, how), path)
    with pytest.raises(ModelInvalid, match=says) as caught:
        build(config(weights=str(path)), 0)
    assert str(path) in caught.value.message


def test_blocks_may_be_left_out_only_by_depth(weights: Path) -> None:
    with pytest.raises(ModelInvalid, match=r"it lacks blocks\.10\.attn.* and \d+ more"):
        build(config(weights=str(weights), depth=None), 0)
    assert len(build(config(weights=str(weights), depth=3), 0).structure.blocks) == 3
    with pytest.raises(ModelInvalid, match=r"model\.depth: 13 is more than the 12 blocks"):
        build(config(depth=13), 0)


def test_image_size_must_divide_into_patches() -> None:
    with pytest.raises(ModelInvalid, match=r"image_size: 40 .* multiples of 16"):
        build(config(image_size=40), 0)


def test_pooling_keeps_the_norm_where_the_checkpoint_has_it(weights: Path, checkpoint: dict[str, torch.Tensor]) -> None:
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    outputs = []
    for pooling in ("token", "avg", "max"):
        backbone = build(config(weights=str(weights), pooling=pooling), 0)
        assert torch.equal(backbone.module.get_parameter("norm.weight"), checkpoint["norm.weight"])
        outputs.append(backbone.module(images))
    assert not torch.allclose(outputs[0], outputs[1], 0, 1e-3)
    assert not torch.allclose(outputs[1], outputs[2], 0, 1e-3)


class Bomb:
    """Something whose unpickling would run code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("exploded"),))


def test_pickled_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "bomb.pth"
    torch.save({"norm.weight": Bomb()}, path)
    with pytest.raises(ModelInvalid, match="not a safetensors file or a PyTorch file of plain tensors"):
        build(config(weights=str(path)), 0)
    assert not (tmp_path / "exploded").exists()


JUNK = {
    "empty.pth": (b"", "it is empty"),
    "empty.safetensors": (b"", "it is empty"),
    "junk.safetensors": (b"no weights at all", "its header is not that of a safetensors file"),
    "passwd": (b"root:x:0:0:root:/root:/bin/bash\n", "its first bytes are those of neither"),
    "noise.pth": (bytes(range(255, 0, -1)), "its first bytes are those of neither"),
    "cut.zip": (b"PK\x03\x04" + bytes(64), "it is a zip archive that PyTorch did not write"),
    "stack.pth": (b"\x80\x04.", "it is damaged, or holds more than tensors"),
    "call.pth": (b"\x80\x04cos\nsystem\n.", "it is damaged, or holds more than tensors"),
}


@pytest.mark.parametrize("name", JUNK)
def test_junk_is_refused_in_words_of_our_own(tmp_path: Path, name: str) -> None:
    data, wrong = JUNK[name]
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(ModelInvalid) as caught:
        build(config(weights=str(path)), 0)
    start = f"{path} is not a safetensors file or a PyTorch file of plain tensors: {wrong}"
    assert caught.value.message.startswith(start)
    assert "weights_only" not in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("data", [{}, [1, 2], {"norm.weight": "text"}, {1: torch.zeros(1)}])
def test_files_of_something_else_are_refused(tmp_path: Path, data: object) -> None:
    path = tmp_path / "else.pth"
    torch.save(data, path)
    with pytest.raises(ModelInvalid, match="state dict"):
        build(config(weights=str(path)), 0)


def test_resolve_weights(tmp_path: Path) -> None:
    here = tmp_path / "site"
    here.mkdir()
    file = here / "vit.safetensors"
    file.touch()
    assert resolve_weights("none", here) is None
    assert resolve_weights("hub", None) is None
    assert resolve_weights("hub", here) is None
    assert resolve_weights("hub", file) == file
    assert resolve_weights("/elsewhere/vit.safetensors", here) == file
    assert resolve_weights("/elsewhere/vit.safetensors", file) == file
    assert resolve_weights(str(file), None) == file
    for given in (None, tmp_path, tmp_path / "absent"):
        with pytest.raises(ModelInvalid, match="--weights"):
            resolve_weights("/elsewhere/vit.safetensors", given)


def test_no_network_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelInvalid, match="give a file with --weights"):
        build(config(weights="hub"), 0)


def test_the_fingerprint_is_of_what_stays_frozen(weights: Path) -> None:
    backbone = build(config(weights=str(weights)), 0)
    prints = {m: fingerprint(backbone, tune(backbone, m, {}, 0).spec) for m in ("head", "adapter", "prompt", "lora")}
    assert len(set(prints.values())) == 1  # all freeze the same tensors
    assert len(prints["head"]) == 64
    others = {m: fingerprint(backbone, spec_of(backbone.config, m, {})) for m in ("bias", "full")}
    assert len({*others.values(), prints["head"]}) == 3
    assert fingerprint(build(config(weights=str(weights)), seed=99), spec_of(config(), "head", {})) == prints["head"]


def test_the_fingerprint_knows_tensors_model_and_size(
    tmp_path: Path, weights: Path, checkpoint: dict[str, torch.Tensor]
) -> None:
    spec = spec_of(config(), "bias", {})
    one = fingerprint(build(config(weights=str(weights)), 0), spec)
    pth = tmp_path / "same.pth"
    torch.save({"model": dict(reversed(checkpoint.items()))}, pth)
    assert fingerprint(build(config(weights=str(pth)), 0), spec) == one
    for name, same in (("blocks.0.norm1.weight", False), ("pos_embed", False), ("blocks.0.norm1.bias", True)):
        changed = dict(checkpoint)
        changed[name] = changed[name].clone()
        changed[name].view(-1)[0] += 1e-3
        path = tmp_path / f"{name}.safetensors"
        save_file(changed, path)
        assert (fingerprint(build(config(weights=str(path)), 0), spec) == one) is same
    assert fingerprint(build(config(weights=str(weights), image_size=48), 0), spec) != one
    assert fingerprint(build(config(weights=str(weights), depth=3), 0), spec) != one


def test_the_fingerprint_is_of_the_file_not_of_the_resampled_model(
    weights: Path, checkpoint: dict[str, torch.Tensor]
) -> None:
    backbone = build(config(weights=str(weights)), 0)
    assert backbone.stored["pos_embed"].shape == (1, 10, 192)
    assert backbone.module.get_parameter("pos_embed").shape == (1, 5, 192)
    assert backbone.stored["norm.weight"].dtype == "F32"


def test_training_does_not_change_the_fingerprint() -> None:
    backbone = build(config(), 0)
    model = tune(backbone, "full", {}, 0)
    head = spec_of(config(), "head", {})
    before = fingerprint(backbone, head)
    with torch.no_grad():
        for parameter in model.module.parameters():
            parameter.add_(1)
    assert fingerprint(backbone, head) == before


def test_the_hub_and_a_file_of_it_are_the_same_backbone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """timm's own way through the hub's cache, filled by hand and offline."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    name = f"{NAME}.augreg_in21k"
    torch.manual_seed(6)
    state = timm.create_model(name).state_dict()
    repository = tmp_path / f"models--timm--{name}"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    save_file(state, snapshot / "model.safetensors")
    hub = build(config(name=name, weights="hub"), 0)
    file = build(config(name=name, weights="hub"), 0, weights=snapshot / "model.safetensors")
    assert torch.equal(hub.module.get_parameter("blocks.1.mlp.fc2.weight"), state["blocks.1.mlp.fc2.weight"])
    spec = spec_of(hub.config, "bias", {})
    assert fingerprint(hub, spec) == fingerprint(file, spec)
    assert all(torch.equal(t, file.module.state_dict()[n]) for n, t in hub.module.state_dict().items())


@pytest.mark.parametrize("grid", [16, 37])
def test_dinov2_cut_short_at_another_size(tmp_path: Path, grid: int) -> None:
    name, path = "vit_small_patch14_dinov2", tmp_path / "dinov2.safetensors"
    torch.manual_seed(7)
    state = timm.create_model(name, depth=3, img_size=grid * 14, num_classes=0).state_dict()
    save_file({**state, "mask_token": torch.zeros(1, 384)}, path)
    backbone = build(config(name=name, weights=str(path), image_size=56), 0)
    assert backbone.module(torch.zeros(1, 3, 56, 56)).shape == (1, 3)
    assert backbone.images is not None and backbone.images.mean == pytest.approx((0.485, 0.456, 0.406))
    assert backbone.stored["pos_embed"].shape == (1, grid**2 + 1, 384)
    assert "mask_token" not in backbone.stored


def test_deit_has_its_own_normalisation_and_its_checkpoints_fit_a_vit(tmp_path: Path) -> None:
    deit = build(config(name="deit_tiny_patch16_224"), 0)
    assert deit.images is not None
    assert (deit.images.mean, deit.images.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    path = tmp_path / "deit.safetensors"
    save_file(deit.module.state_dict(), path)
    loaded = build(config(weights=str(path)), 0).module.state_dict()
    frozen = {name: tensor for name, tensor in deit.module.state_dict().items() if not name.startswith("head.")}
    assert all(torch.equal(loaded[name], tensor) for name, tensor in frozen.items())
