"""Another tuner of the `peft` library, from a package installed beside fedpeft, is exported and read like LoRA."""

from __future__ import annotations

from pathlib import Path

from ..config.installed import install, run

LOHA = """
import torch
from fedpeft.errors import ConfigInvalid
from fedpeft.peft.method import MethodOptions, PeftForm
from fedpeft.peft.tuners import ADAPTER, Targets, Tuner
from peft import LoHaConfig

FACTORS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


class LohaOptions(MethodOptions):
    rank: int = 4
    alpha: float = 8.0
    layers: Targets = "qkv"


class Loha(Tuner):
    Options = LohaOptions
    parameters = frozenset(FACTORS)
    peft_form = PeftForm("LOHA", "a LoHa", "a Hadamard product of low-rank changes", "loha")

    @property
    def targets(self):
        return self.options.layers

    def config(self, layers):
        return LoHaConfig(r=self.options.rank, alpha=self.options.alpha, target_modules=list(layers))

    @classmethod
    def from_peft_config(cls, config, targets):
        if config["use_effective_conv2d"]:
            raise ConfigInvalid("uses use_effective_conv2d")
        return {"rank": config["r"], "alpha": config["alpha"], "layers": targets}

    def start(self, layer, generator):
        for factor in FACTORS:
            values = getattr(layer, factor)[ADAPTER]
            values.copy_(torch.randn(values.shape, generator=generator) * 0.1)
"""
CODE = """
import json, pathlib, sys
import torch
from fedpeft.config import ModelConfig
from fedpeft.errors import FedpeftError
from fedpeft.export import formats
from fedpeft.models.backbones import build
from fedpeft.peft import tune

folder = pathlib.Path(sys.argv[1])
model = ModelConfig(name="vit_tiny_patch16_224", weights="none", image_size=32, depth=2, classes=["a", "b", "c"])
backbone = build(model, 0)
images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def logits(module):
    with torch.no_grad():
        return module.eval()(images)


tuned = tune(backbone, "loha", {"rank": 3, "layers": ["qkv", "proj"]}, 1)
formats.as_peft(tuned, folder / "loha")
read = formats.from_peft(folder / "loha", backbone)
again = tune(backbone, read.method, read.options, 5)
again.load(read.tensors)
formats.as_timm(tuned, folder / "merged.safetensors")
config = folder / "loha" / "adapter_config.json"
config.write_text(json.dumps(json.loads(config.read_text()) | {"use_effective_conv2d": True}))
try:
    formats.from_peft(folder / "loha", backbone)
    refused = ""
except FedpeftError as error:
    refused = error.message
tuned_logits = logits(tuned.module)
print(json.dumps({
    "method": read.method, "options": {**read.options, "layers": sorted(read.options["layers"])},
    "spec": again.spec.sha256 == tuned.spec.sha256, "same": torch.equal(logits(again.module), tuned_logits),
    "changed": not torch.allclose(logits(backbone.module), tuned_logits),
    "library": torch.allclose(logits(formats.peft_model(tuned)), tuned_logits, 0, 1e-5),
    "merged": torch.allclose(logits(formats.timm_model(tuned)), tuned_logits, 0, 1e-4),
    "card": (folder / "loha" / "README.md").read_text(), "refused": refused,
}))
"""


def test_an_installed_tuner_has_its_own_card_and_comes_back(tmp_path: Path) -> None:
    install(tmp_path, "loha", LOHA, "[fedpeft.methods]\nloha = loha:Loha\n")
    found = run(tmp_path, CODE)
    card, refused = found.pop("card"), found.pop("refused")
    options = {"rank": 3, "alpha": 8.0, "layers": ["attn.proj", "attn.qkv"]}
    true = dict.fromkeys(("spec", "same", "changed", "library", "merged"), True)
    assert found == {"method": "loha", "options": options, **true}
    assert "# A LoHa for image classification" in card and "trained a Hadamard product of low-rank changes" in card
    assert "- loha" in card and "lora" not in card.lower()
    assert refused == f"{tmp_path}/loha uses use_effective_conv2d"
