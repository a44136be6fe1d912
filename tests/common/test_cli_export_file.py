"""`fedpeft export`: what a simulation leaves becomes a model that timm and peft load, without a server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fedpeft
from fedpeft import models
from fedpeft.cli.app import main
from fedpeft.data import partitions
from fedpeft.data.parts import write_parts
from fedpeft.data.sources import open_source

from .test_simulated import RUN_FILE
from .test_sources import table, write

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def simulations(tmp_path_factory: pytest.TempPathFactory) -> dict[str, fedpeft.Simulation]:
    place = tmp_path_factory.mktemp("simulations")
    whole = write(place / "data.parquet", table(24))
    write_parts(whole, partitions.dirichlet(open_source(whole).labels, 3, 1.0, 3), place / "sites")
    done = {}
    for method in ("bias", "lora"):
        (place / f"{method}.toml").write_text(
            RUN_FILE.replace('"bias"', f'"{method}"').replace("count = 2", "count = 1")
        )
        done[method] = fedpeft.simulate(str(place / f"{method}.toml"), place / "sites", place / method)
    return done


def ends_with(code: int, *arguments: object) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["export", *map(str, arguments)])
    assert (ended.value.code or 0) == code


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(IMAGES)
    return found


@pytest.mark.parametrize("method", ["bias", "lora"])
def test_timm_loads_it(
    simulations: dict[str, fedpeft.Simulation], method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done, out = simulations[method], tmp_path / "model.safetensors"
    ends_with(0, done.folder / "adapter.safetensors", "--format", "timm", "--out", out, "--json")
    said = json.loads(capsys.readouterr().out)
    assert (said["version"], said["format"], said["out"]) == (1, "timm", str(out))
    plain = models.build(done.config.model, 0).module
    plain.load_state_dict(load_file(out), strict=True)
    assert torch.allclose(logits(plain), logits(done.load().module), atol=1e-5)


def test_peft_loads_a_lora(simulations: dict[str, fedpeft.Simulation], tmp_path: Path) -> None:
    done, out = simulations["lora"], tmp_path / "folder"
    ends_with(0, done.folder / "adapter.safetensors", "--format", "peft", "--out", out)
    base = models.build(done.config.model, done.config.rounds.seed).module
    loaded = PeftModel.from_pretrained(base, str(out))
    assert torch.allclose(logits(loaded), logits(done.load().module), atol=1e-5)
    assert "LoRA" in (out / "README.md").read_text()


def test_what_cannot_be_exported_is_said(
    simulations: dict[str, fedpeft.Simulation], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = simulations["bias"].folder / "adapter.safetensors"

    def refused(*arguments: object) -> str:
        ends_with(1, *arguments)
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    out = ("--out", tmp_path / "out")
    ends_with(2, adapter, "--format", "peft", *out)
    assert "--format peft is for lora, and this run tunes bias" in capsys.readouterr().err
    ends_with(2, adapter, "--format", "safetensors", *out)
    assert "is safetensors already" in capsys.readouterr().err
    save_file({"x": torch.zeros(2)}, tmp_path / "other.safetensors")
    assert "is not a file of format fedpeft-adapter" in refused(tmp_path / "other.safetensors", *out)
    assert "No such file" in refused(tmp_path / "none.safetensors", *out)
    with safe_open(adapter, "np") as file:
        metadata = dict(file.metadata())
    tensors = load_file(adapter)
    save_file(tensors, tmp_path / "bare.safetensors", {**metadata, "extra": "{}"})
    said = refused(tmp_path / "bare.safetensors", *out)
    assert "does not hold the run file of its run: it is missing or damaged" in said
    save_file(tensors, tmp_path / "odd.safetensors", {**metadata, "backbone": "0" * 64})
    assert "the backbone here has fingerprint" in refused(tmp_path / "odd.safetensors", *out)
