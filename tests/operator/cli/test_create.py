"""`fedpeft run create` and `export` with real models: what is uploaded is version 0, and it comes back as files."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.numpy import load, load_file, save

from fedpeft.config import load_run_file
from fedpeft.models.backbones import build, fingerprint
from fedpeft.peft import tune
from fedpeft.rpc.wire import config_from_proto
from fedpeft_operator.app import main

from ..operator_double import Double, Serving, adapter, serving

RUN_FILE = """
name = "tiny"
[model]
name = "vit_tiny_patch16_224"
weights = "none"
image_size = 32
depth = 1
classes = ["cat", "dog"]
[peft]
method = "{method}"
[rounds]
count = 2
clients = 2
seed = 7
"""


@pytest.fixture
def served() -> Iterator[Serving]:
    with serving(Double()) as answer:
        yield answer


def fedpeft(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return int(ended.value.code or 0)


def run_file(folder: Path, method: str = "bias", extra: str = "") -> Path:
    path = folder / "run.toml"
    path.write_text(RUN_FILE.format(method=method) + extra)
    return path


def test_ctrl_c_says_where_to_look(served: Serving, tmp_path: Path) -> None:
    create = ["--server", served.address, "run", "create", str(run_file(tmp_path))]
    command = [sys.executable, "-m", "fedpeft_operator.app", *create]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as creating:
        assert creating.stderr is not None and creating.stderr.readline() == "building the model ...\n"
        creating.send_signal(signal.SIGINT)
        out, err = creating.communicate(timeout=60)
    said = "fedpeft: interrupted; `fedpeft run list` says whether the run was created\n"
    assert (creating.returncode, out, err) == (130, "", said)


def test_flags_stand_in_place_of_fields_of_the_file(
    served: Serving, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = ["--set", "training.learning_rate=0.005", "--set", "rounds.count=5", "--seed", "11"]
    assert fedpeft("run", "create", str(run_file(tmp_path)), "--check", "--json", *flags) == 0
    made = json.loads(capfd.readouterr().out)["config"]
    assert made["training"]["learning_rate"] == 0.005
    assert (made["rounds"]["count"], made["rounds"]["seed"], made["rounds"]["clients"]) == (5, 11, 2)
    assert fedpeft("run", "create", str(run_file(tmp_path)), "--check", "--set", "rounds.count") != 0
    assert "KEY=VALUE" in capfd.readouterr().err
    assert fedpeft("run", "create", str(run_file(tmp_path)), "--check", "--set", "rounds.cuont=3") != 0
    assert "rounds.cuont" in capfd.readouterr().err


def test_created_run_is_version_0_of_the_file(
    served: Serving, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = run_file(tmp_path)
    assert fedpeft("--server", served.address, "run", "create", str(path), "--json") == 0
    answer = json.loads(capfd.readouterr().out)
    assert (answer["run"], answer["name"], answer["state"]) == ("run-000000000001", "tiny", "running")
    ((header, data),) = served.double.created.values()
    config = load_run_file(path)
    assert config_from_proto(header.config) == config
    backbone = build(config.model, 7)
    tuned = tune(backbone, "bias", {}, 7)
    assert header.backbone_fingerprint == answer["backbone_fingerprint"] == fingerprint(backbone, tuned.spec)
    assert header.model_parameters == backbone.parameters
    assert data == b"".join(tuned.state()[tensor.name].tobytes() for tensor in tuned.spec.shared)


def test_created_run_in_words(served: Serving, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert fedpeft("--server", served.address, "run", "create", str(run_file(tmp_path, "head"))) == 0
    out, err = capfd.readouterr()
    assert out == (
        "run-000000000001 is created: 386 parameters in version 0\nwatch it with: fedpeft run watch run-000000000001\n"
    )
    assert err == "building the model ...\n"  # tens of seconds on a busy machine, and nothing else is said meanwhile


def test_check_sends_nothing_and_needs_no_server(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = run_file(tmp_path, "head")
    assert fedpeft("--server", "127.0.0.1:1", "run", "create", str(path), "--check") == 0
    assert capfd.readouterr().out == (
        f"{path} is valid: head on vit_tiny_patch16_224, 386 parameters, 2 rounds of 2 clients; weights: random\n"
    )
    assert fedpeft("run", "create", str(path), "--check", "--json") == 0
    answer = json.loads(capfd.readouterr().out)
    assert (answer["valid"], answer["adapter_parameters"], answer["config"]["rounds"]["seed"]) == (True, 386, 7)


@pytest.mark.parametrize(
    ("method", "extra", "sentence"),
    [
        ("bias", "quorum = 3\n", "run.toml:11: rounds: quorum 3 is more than clients 2"),
        ("bias", "clocks = 3\n", "rounds.clocks: is not a known key"),
        ("bais", "", "there is no PEFT method 'bais'; there are: adapter, "),
    ],
)
def test_wrong_run_file_is_a_usage_error(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], method: str, extra: str, sentence: str
) -> None:
    assert fedpeft("run", "create", str(run_file(tmp_path, method, extra)), "--check") == 2
    assert sentence in capfd.readouterr().err


ALGORITHM = '[training.algorithm]\nname = "scaffold"\npopulation = 9\n'
SCAFFOLD = "[training]\nmomentum = 0.0\n" + ALGORITHM
NO_MIX = {
    "momentum": ("bias", "[training]\nmomentum = 0.9\n" + ALGORITHM, "training.momentum is 0.9"),
    "adamw": ("bias", '[training]\noptimizer = "adamw"\n' + ALGORITHM, "training.optimizer is 'adamw'"),
    "population": ("bias", SCAFFOLD.replace("= 9", "= 1"), "training.algorithm.population is 1, fewer than the 2"),
    "median": ("bias", SCAFFOLD + '[aggregation]\nstrategy = "median"\n', "aggregation.strategy is 'median'"),
    "fednova": ("bias", SCAFFOLD + '[aggregation]\nstrategy = "fednova"\n', "aggregation.strategy is 'fednova'"),
    "sparse": ("bias", SCAFFOLD + '[codec]\nup = "sparse"\n', "codec.up is 'sparse'"),
    "clip": ("bias", SCAFFOLD + "[privacy]\nclip_norm = 1.0\n", "privacy.clip_norm does not go with section"),
    "fair, bias": ("bias", '[aggregation]\nstrategy = "lora_fair"\n', "aggregation.strategy is 'lora_fair'"),
    "fair, rolora": ("rolora", '[aggregation]\nstrategy = "lora_fair"\n', "aggregation.strategy is 'lora_fair'"),
    "buffered": ("bias", 'policy = "buffered"\n' + SCAFFOLD, "rounds.policy is 'buffered'"),
    "relayed": ("bias", 'policy = "relayed"\n[aggregation]\nexact_sum = true\n', "rounds.policy is 'relayed'"),
}


@pytest.mark.parametrize(("method", "extra", "said"), NO_MIX.values(), ids=NO_MIX)
def test_check_refuses_a_combination_in_the_words_of_create(
    served: Serving, tmp_path: Path, capfd: pytest.CaptureFixture[str], method: str, extra: str, said: str
) -> None:
    path = run_file(tmp_path, method, extra)
    assert fedpeft("run", "create", str(path), "--check") == 2
    checked = capfd.readouterr().err
    field, text = said.split(" ", 1)
    lines = path.read_text().splitlines()
    (line,) = [number for number, each in enumerate(lines, 1) if each.startswith(f"{field.split('.')[-1]} = ")]
    assert checked.startswith(f"fedpeft: {path}:{line}: {field}: {text}")
    assert fedpeft("--server", served.address, "run", "create", str(path)) == 2
    assert capfd.readouterr().err == "building the model ...\n" + checked


def test_check_refuses_an_engine_that_there_is_not(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = run_file(tmp_path, "bias", '[simulation]\nengine = "rays"\n')
    assert fedpeft("run", "create", str(path), "--check") == 2
    assert f"{path}:16: simulation.engine: there is no engine 'rays'; there are: " in capfd.readouterr().err


def test_check_of_sections_counts_the_adapter_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert fedpeft("run", "create", str(run_file(tmp_path, "head", SCAFFOLD)), "--check", "--json") == 0
    assert json.loads(capfd.readouterr().out)["adapter_parameters"] == 386


def test_missing_run_file_and_weights(served: Serving, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert fedpeft("run", "create", str(tmp_path / "absent.toml")) == 2
    path = run_file(tmp_path)
    path.write_text(path.read_text().replace('"none"', '"absent.safetensors"'))
    assert fedpeft("--server", served.address, "run", "create", str(path)) == 2
    assert f"{path}:5: model.weights: the run's weights file absent.safetensors is not here" in capfd.readouterr().err


def test_check_looks_at_the_weights(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = run_file(tmp_path, "head")
    path.write_text(path.read_text().replace('"none"', '"own.safetensors"'))
    assert fedpeft("run", "create", str(path), "--check") == 2
    assert f"{path}:5: model.weights: the run's weights file own.safetensors is not here" in capfd.readouterr().err
    weights = tmp_path / "own.safetensors"
    state = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=64).state_dict()
    weights.write_bytes(save({name: tensor.numpy() for name, tensor in state.items()}))
    assert fedpeft("run", "create", str(path), "--check", "--weights", str(tmp_path)) == 0
    assert f"; weights: {weights}, which fits\n" in capfd.readouterr().out
    del state["norm.weight"]
    weights.write_bytes(save({name: tensor.numpy() for name, tensor in state.items()}))
    assert fedpeft("run", "create", str(path), "--check", "--weights", str(weights)) == 1
    assert "does not fit the model: it lacks norm.weight" in capfd.readouterr().err


def test_weights_that_would_not_be_used_are_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = run_file(tmp_path)
    for command in (["run", "create", "--check"], ["simulate", "--data", str(tmp_path), "--out", str(tmp_path / "o")]):
        assert fedpeft(*command, str(path), "--weights", str(path)) == 2
        assert 'would not be used: the run says weights = "none"' in capfd.readouterr().err


def test_server_is_looked_for_before_the_model_is_built(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = run_file(tmp_path)
    path.write_text(path.read_text().replace('"none"', '"absent.safetensors"'))
    assert fedpeft("--server", "127.0.0.1:1", "run", "create", str(path)) == 3


def created(served: Serving, tmp_path: Path, method: str) -> tuple[str, dict[str, np.ndarray]]:
    """A run whose version 1 has other values than its version 0."""
    assert fedpeft("--server", served.address, "run", "create", str(run_file(tmp_path, method))) == 0
    (run,) = served.double.runs.values()
    config = config_from_proto(run.config)
    state = tune(build(config.model, 7), method, {}, 7).state()
    changed = {name: (values + 0.5).astype(np.float32) for name, values in state.items()}
    run.version = 1
    served.double.files = {
        (run.id, version): adapter(run, version, values) for version, values in enumerate((state, changed))
    }
    return run.id, changed


def test_export_as_timm_loads_strictly(served: Serving, tmp_path: Path) -> None:
    run, changed = created(served, tmp_path, "bias")
    out = tmp_path / "whole.safetensors"
    assert fedpeft("--server", served.address, "run", "export", run, "--format", "timm", "--out", str(out)) == 0
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=2)
    state = {name: torch.from_numpy(values) for name, values in load_file(out).items()}
    model.load_state_dict(state, strict=True)
    for name, values in changed.items():
        np.testing.assert_array_equal(state[name].numpy(), values)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.toml", "whole.safetensors"]


def test_export_as_peft_folder(served: Serving, tmp_path: Path) -> None:
    run, changed = created(served, tmp_path, "lora")
    out = tmp_path / "lora"
    assert fedpeft("--server", served.address, "run", "export", run, "--format", "peft", "--out", str(out)) == 0
    assert json.loads((out / "adapter_config.json").read_text())["peft_type"] == "LORA"
    tensors = load((out / "adapter_model.safetensors").read_bytes())
    (name,) = [name for name in changed if "lora_A" in name]
    np.testing.assert_array_equal(tensors[f"base_model.model.{name}"], changed[name])
    text = (out / "README.md").read_text()
    assert f"| run | `{run}`, version 1 of 2 rounds |" in text
    assert "hf.co" not in text and "More Information Needed" not in text


def test_export_says_that_it_replaced_a_file(
    served: Serving, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run, _ = created(served, tmp_path, "head")
    out = tmp_path / "adapter.safetensors"
    export = ("--server", served.address, "run", "export", run, "--out", str(out), "--json")
    capfd.readouterr()
    assert fedpeft(*export) == 0
    assert capfd.readouterr().err == ""
    assert fedpeft(*export) == 0
    assert capfd.readouterr().err == f"fedpeft: {out} was there and is replaced\n"


def test_export_with_another_backbone_is_refused(
    served: Serving, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run, _ = created(served, tmp_path, "bias")
    served.double.runs[run].backbone_fingerprint = "0" * 64
    out = tmp_path / "whole.safetensors"
    assert fedpeft("--server", served.address, "run", "export", run, "--format", "timm", "--out", str(out)) == 1
    assert "the run was made with 0000000000000000; name the right weights" in capfd.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.toml"]
