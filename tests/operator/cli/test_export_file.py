"""`fedpeft export`: what a simulation leaves becomes a model that timm and peft load, without a server."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

import fedpeft
from fedpeft.adapters.tensor_errors import as_os_errors
from fedpeft.data import partitions
from fedpeft.data.partition_writer import write_parts
from fedpeft.data.sources.opening import open_source
from fedpeft.errors import BlobCorrupt, DiskFull
from fedpeft.models import backbones
from fedpeft.peft import methods
from fedpeft.process import durable
from fedpeft_operator.app import main

from ...api.test_simulated import RUN_FILE
from ...data.test_sources import table, write

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
    plain = backbones.build(done.config.model, 0).module
    plain.load_state_dict(load_file(out), strict=True)
    assert torch.allclose(logits(plain), logits(done.load().module), atol=1e-5)


def test_peft_loads_a_lora(simulations: dict[str, fedpeft.Simulation], tmp_path: Path) -> None:
    done, out = simulations["lora"], tmp_path / "folder"
    ends_with(0, done.folder / "adapter.safetensors", "--format", "peft", "--out", out)
    base = backbones.build(done.config.model, done.config.rounds.seed).module
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
    with_form = ", ".join(name for name in methods.names() if methods.get(name).peft_form)
    assert f"--format peft is for {with_form}; this run tunes bias" in capsys.readouterr().err
    ends_with(2, adapter, "--format", "safetensors", *out)
    assert "'safetensors' is not one of 'timm', 'peft'" in " ".join(capsys.readouterr().err.replace("│", " ").split())
    os.mkfifo(tmp_path / "pipe")
    ends_with(2, adapter, "--out", tmp_path / "pipe")
    assert "is a device or a pipe; timm is written as a file" in capsys.readouterr().err
    ends_with(2, adapter, "--sha256", "abc", *out)
    assert "--sha256 'abc' is not a SHA-256: 64 hexadecimal digits" in capsys.readouterr().err
    save_file({"x": torch.zeros(2)}, tmp_path / "other.safetensors")
    assert "is not a file of format fedpeft-adapter" in refused(tmp_path / "other.safetensors", *out)
    assert "No such file" in refused(tmp_path / "none.safetensors", *out)
    with safe_open(adapter, "np") as file:
        metadata = dict(file.metadata())
    tensors = load_file(adapter)
    save_file(tensors, tmp_path / "bare.safetensors", {**metadata, "extra": "{}"})
    said = refused(tmp_path / "bare.safetensors", *out)
    assert "does not hold the run file of its run: it is missing or damaged" in said
    for what, other in (("model", "vit_huge_patch14_224"), ("method", "head")):
        save_file(tensors, tmp_path / "altered.safetensors", {**metadata, what: other})
        said = refused(tmp_path / "altered.safetensors", *out)
        assert f"altered.safetensors was changed: its {what} is {other!r}, and {metadata[what]!r} in the run" in said
    save_file(tensors, tmp_path / "odd.safetensors", {**metadata, "backbone": "0" * 64})
    assert "the backbone here has fingerprint" in refused(tmp_path / "odd.safetensors", *out)


def test_the_adapter_file_is_not_replaced_by_what_is_made_of_it(
    simulations: dict[str, fedpeft.Simulation], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = tmp_path / "adapter.safetensors"
    adapter.write_bytes(before := (simulations["bias"].folder / "adapter.safetensors").read_bytes())
    (tmp_path / "link").symlink_to(adapter)
    for out in (adapter, tmp_path / "link"):
        ends_with(2, adapter, "--format", "timm", "--out", out)
        assert f"--out {out} is the adapter file itself" in capsys.readouterr().err
    assert adapter.read_bytes() == before


@pytest.mark.parametrize("version", [0, 1])
def test_a_file_that_was_changed_is_refused(
    simulations: dict[str, fedpeft.Simulation], version: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = simulations["bias"].folder / "adapter.safetensors", tmp_path / "out"
    whole = source.read_bytes()
    if version == 0:  # the first version is named by the record of the round that began with it
        whole = whole.replace(b'"version":"1"', b'"version":"0"')
    digest = hashlib.sha256(whole).hexdigest()
    changed = bytearray(whole)
    changed[-100] ^= 1
    file = tmp_path / "adapter.safetensors"
    file.write_bytes(changed)
    ends_with(1, file, "--out", out, "--sha256", digest.upper())
    assert f"{file} was changed: its sha256 is" in (said := capsys.readouterr().err)
    assert f"--sha256 says {digest}" in said
    records = (simulations["bias"].folder / "records.jsonl").read_text()
    (tmp_path / "records.jsonl").write_text(records)
    ends_with(1, file, "--out", out)
    assert f"the record of it in {tmp_path / 'records.jsonl'} says" in capsys.readouterr().err
    assert not out.exists()
    if version:
        (tmp_path / "records.jsonl").write_text("")
        ends_with(1, file, "--out", out)
        assert f"{tmp_path / 'records.jsonl'} ends before version 1, which" in capsys.readouterr().err
    (tmp_path / "records.jsonl").write_text(records.replace('"simulation"', '"another"'))
    ends_with(0, file, "--out", out, "--json")  # records of another run say nothing of this file
    assert json.loads(capsys.readouterr().out)["adapter_sha256"] == hashlib.sha256(changed).hexdigest()


def test_the_result_of_a_simulation_that_was_changed_is_not_loaded(
    simulations: dict[str, fedpeft.Simulation], tmp_path: Path
) -> None:
    done = simulations["bias"]
    shutil.copytree(done.folder, tmp_path / "copy")
    copy = fedpeft.Simulation(tmp_path / "copy")
    file = copy.folder / "adapter.safetensors"
    assert all((copy.adapter()[name] == values).all() for name, values in done.adapter().items())
    changed = bytearray(file.read_bytes())
    changed[-100] ^= 1
    file.write_bytes(changed)
    for load in (copy.adapter, copy.load):
        with pytest.raises(BlobCorrupt, match="is recorded"):
            load()


@pytest.mark.parametrize("form", ["timm", "peft"])
def test_a_file_that_cannot_be_written_is_said_and_leaves_nothing(
    simulations: dict[str, fedpeft.Simulation], form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, before = simulations["lora"].folder / "adapter.safetensors", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        ends_with(1, adapter, "--format", form, "--out", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert f"fedpeft: writing {tmp_path / 'out'} failed: File too large; check its folder" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_from_other_errors_of_the_package(tmp_path: Path) -> None:
    full = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    with (
        pytest.raises(DiskFull, match="no room left on its disk"),
        durable.refusals("writing x"),
        as_os_errors(tmp_path / "x"),
    ):
        raise full
    with pytest.raises(SafetensorError), as_os_errors(tmp_path / "x"):
        raise SafetensorError("invalid header")
