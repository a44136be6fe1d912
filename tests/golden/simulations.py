"""Simulated runs whose results are kept: one for each PEFT method, each encoding and each strategy."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.numpy import load_file

import fedpeft

RUN_FILE = """
name = "golden"
[model]
name = "vit_tiny_patch16_224"
weights = "none"
image_size = 32
depth = 1
classes = ["cat", "dog"]
[peft]
{peft}
[rounds]
count = 2
clients = 2
quorum = 2
seed = 7
[training]
batch_size = 4
learning_rate = 0.05
augmentation = "crop"
{training}
[aggregation]
{aggregation}
[codec]
{codec}
[simulation]
clients = 3
partition = "dirichlet"
alpha = 1.0
"""
BIAS = {"peft": 'method = "bias"'}
METHODS = ("full", "head", "bias", "adapter", "prompt", "lora")
SCENARIOS: dict[str, dict[str, str]] = {
    **{f"method {name}": {"peft": f'method = "{name}"'} for name in METHODS},
    "method adapter, one a block": {"peft": 'method = "adapter"\nshared = false\nwidth = 3'},
    "method prompt, shallow": {"peft": 'method = "prompt"\ntokens = 2\ndeep = false'},
    "method lora, two targets, dropout": {"peft": 'method = "lora"\nrank = 2\ntargets = ["qkv", "fc1"]\ndropout = 0.1'},
    "optimizer adamw": BIAS | {"training": 'optimizer = "adamw"'},
    **{f"up {name}": BIAS | {"codec": f'up = "{name}"'} for name in ("float16", "bfloat16", "sparse")},
    "up sparse of float16": BIAS | {"codec": 'up = "sparse"\ndensity = 0.01\nvalues = "float16"'},
    "up sparse without feedback": BIAS | {"codec": 'up = "sparse"\nerror_feedback = false'},
    **{f"down {name}": BIAS | {"codec": f'down = "{name}"'} for name in ("float16", "bfloat16")},
    **{
        f"strategy {name}": BIAS | {"aggregation": f'strategy = "{name}"'}
        for name in ("fedavgm", "fedadagrad", "fedadam", "fedyogi")
    },
}


def images(folder: Path) -> Path:
    """Writes 24 images of noise, those of class dog brighter."""
    draw = np.random.default_rng(0)
    for index in range(24):
        label = index % 2
        pixels = draw.integers(0, 200, (32, 32, 3), np.uint8) + np.uint8(50 * label)
        path = folder / ("cat", "dog")[label] / f"{index:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return folder


def environment() -> dict[str, str]:
    """Returns what the bits of a training depend on beside its inputs."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    kernels = torch.backends.cpu.get_cpu_capability()
    return {"torch": torch.__version__.partition("+")[0], "kernels": kernels, "processor": model}


def simulated(name: str, data: Path, folder: Path) -> dict[str, Any]:
    """Runs a scenario and returns what is kept of it."""
    folder.mkdir(parents=True, exist_ok=True)
    text = {"peft": "", "training": "", "aggregation": "", "codec": "", **SCENARIOS[name]}
    run_file = folder / "run.toml"
    run_file.write_text(RUN_FILE.format(**text))
    done = fedpeft.simulate(run_file, data=data, out=folder / "out", device="cpu")
    records = (done.folder / "records.jsonl").read_bytes()
    adapter = load_file(done.folder / "adapter.safetensors")
    return {
        "records": hashlib.sha256(records).hexdigest(),
        "adapter": hashlib.sha256((done.folder / "adapter.safetensors").read_bytes()).hexdigest(),
        "parameters": done.parameters,
        "payload_bytes": [[each.payload_bytes_up, each.payload_bytes_down] for each in done.rounds],
        "clients": [list(each.clients) for each in done.rounds],
        "norms": {
            tensor: float(np.linalg.norm(values.astype(np.float64))) for tensor, values in sorted(adapter.items())
        },
        "train_loss": [each.metrics["train_loss"] for each in done.rounds],
    }
