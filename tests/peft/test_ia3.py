"""(IA)^3: factors of keys, values and hidden values, which merge and which the `peft` library loads."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from fedpeft.errors import ConfigInvalid, ModelInvalid
from fedpeft.export import formats
from fedpeft.models import backbones
from fedpeft.models.structure import ModelStructure
from fedpeft.peft import count, timm_spec, tune
from fedpeft.peft.method import make

from .plain_vit import BASE, CONFIG, HEAD, HIDDEN, WIDTH, PlainVit, State, close, images, moved


class Factored(PlainVit):
    """The method written out; `queries` has the factors of queries, which the method leaves at one."""

    queries = torch.ones(WIDTH)

    def layer(self, name: str, x: torch.Tensor) -> torch.Tensor:
        if name.endswith("fc2"):
            x = x * self.state[f"{name}.ia3.hidden"]
        y = super().layer(name, x)
        if name.endswith("qkv"):
            y = y * torch.cat((self.queries, self.state[f"{name}.ia3.k"], self.state[f"{name}.ia3.v"]))
        return y


def test_counts_and_shapes_of_vit_b() -> None:
    assert count(BASE, "ia3", {}, 100) == 55_296 + 76_900
    parts = {"attn.qkv.ia3.k": (768,), "attn.qkv.ia3.v": (768,), "mlp.fc2.ia3.hidden": (3072,)}
    expected = HEAD | {f"blocks.{i}.{name}": shape for i in range(12) for name, shape in parts.items()}
    assert {t.name: t.shape for t in timm_spec(BASE, "ia3", {}, 100).tensors} == expected


def test_equals_the_formula_written_out() -> None:
    model, state = moved("ia3")
    assert close(model, Factored(state))


def test_queries_never_change() -> None:
    model, _ = moved("ia3")
    x = torch.randn(2, 5, WIDTH)
    with torch.no_grad():
        tuned, plain = (m.get_submodule("blocks.0.attn.qkv")(x) for m in (model.module, model.backbone.module))
    same = [torch.equal(one, other) for one, other in zip(tuned.chunk(3, -1), plain.chunk(3, -1), strict=True)]
    assert same == [True, False, False]


def test_starts_at_one_whatever_the_seed() -> None:
    state = tune(backbones.build(CONFIG, 3), "ia3", {}, 8).state()
    assert all((values == 1).all() for name, values in state.items() if ".ia3." in name)
    assert state["blocks.0.mlp.fc2.ia3.hidden"].shape == (HIDDEN,)


def test_merges_into_the_plain_model(tmp_path: Path) -> None:
    model, _ = moved("ia3")
    formats.as_timm(model, tmp_path / "model.safetensors")
    assert close(model, PlainVit(load_file(tmp_path / "model.safetensors")))


def test_the_peft_library_loads_it_and_it_comes_back(tmp_path: Path) -> None:
    model, state = moved("ia3")
    formats.as_peft(model, tmp_path)
    loaded = PeftModel.from_pretrained(backbones.build(CONFIG, 3).module, str(tmp_path)).eval()
    with torch.no_grad():
        assert torch.allclose(loaded(images()), model.module(images()), 0, 1e-6)
    read = formats.from_peft(tmp_path, model.backbone)
    assert (read.method, read.options) == ("ia3", {})
    again = tune(model.backbone, "ia3", {}, 8)
    again.load(read.tensors)
    assert all(torch.equal(torch.from_numpy(values), state[name]) for name, values in again.state().items())
    card = (tmp_path / "README.md").read_text()
    assert "# An (IA)^3 adapter for image classification" in card and "| method | ia3 |" in card


@pytest.fixture
def exported(tmp_path: Path) -> tuple[Path, State]:
    formats.as_peft(moved("ia3")[0], tmp_path)
    return tmp_path, load_file(tmp_path / "adapter_model.safetensors")


def test_factors_of_queries_are_refused(exported: tuple[Path, State]) -> None:
    folder, state = exported
    state["base_model.model.blocks.1.attn.qkv.ia3_l"][3] = 1.5
    save_file(state, folder / "adapter_model.safetensors")
    with pytest.raises(ModelInvalid, match=r"scales the queries of blocks\.1\.attn\.qkv, which method ia3 does not"):
        formats.from_peft(folder, backbones.build(CONFIG, 3))


def test_other_layers_are_refused(exported: tuple[Path, State]) -> None:
    folder, state = exported
    config = folder / "adapter_config.json"
    place = "base_model.model.blocks.0.mlp.fc2.ia3_l"
    save_file(state | {place: torch.ones(WIDTH, 1)}, folder / "adapter_model.safetensors")
    with pytest.raises(ModelInvalid, match=r"fc2\.ia3_l is \(192, 1\); it needs \(1, 768\)"):
        formats.from_peft(folder, backbones.build(CONFIG, 3))
    save_file({n: t for n, t in state.items() if n != place}, folder / "adapter_model.safetensors")
    with pytest.raises(ModelInvalid, match=r"fc2\.ia3_l is missing"):
        formats.from_peft(folder, backbones.build(CONFIG, 3))
    save_file(
        state | {"base_model.model.blocks.0.attn.proj.ia3_l": torch.ones(WIDTH, 1)},
        folder / "adapter_model.safetensors",
    )
    with pytest.raises(ModelInvalid, match=r"proj\.ia3_l is \(192, 1\) there, unknown in the model"):
        formats.from_peft(folder, backbones.build(CONFIG, 3))
    config.write_text(json.dumps(json.loads(config.read_text()) | {"peft_type": "PREFIX_TUNING"}))
    with pytest.raises(ModelInvalid, match=r"holds a PREFIX_TUNING adapter; only IA3, .*LORA.* can be read"):
        formats.from_peft(folder, backbones.build(CONFIG, 3))


def test_a_model_without_keys_and_values_is_refused() -> None:
    block = torch.nn.ModuleDict({"mix": torch.nn.Linear(4, 4), "mlp": torch.nn.Linear(4, 4)})
    structure = ModelStructure("", {"blocks.0": block}, (block["mlp"],), 4)
    with pytest.raises(ConfigInvalid, match=r"peft\.method: ia3 scales keys.*blocks\.0 has no linear layers") as caught:
        make("ia3", {}).inject(block, structure, torch.Generator())
    assert [field for field, _ in caught.value.fields] == ["peft.method"]
