"""A weights file to named tensors: told by its content, read without running anything, found in what it holds.

Notable: nothing of a pickled file is run. Beside tensors and plain values, what training scripts leave of their options
and figures (argparse.Namespace, numbers of NumPy) is let through, because it is data and does nothing.
"""

from __future__ import annotations

import argparse
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from fedpeft.errors import ModelInvalid
from fedpeft.process.file_formats import HEAD_BYTES, kind_of

Tensors = dict[str, torch.Tensor]

FIRST = ("state_dict", "model_state_dict", "model")
"""Keys of a file that are looked at before all others."""
_DEPTH = 4
"""Mappings within each other that are looked into."""

_SCALAR = np.float64(0).__reduce__()[0]
_HARMLESS: list[Any] = [
    argparse.Namespace,
    _SCALAR,
    (_SCALAR, "numpy.core.multiarray.scalar"),  # as NumPy before 2 writes it
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("f8", "f4", "f2", "i8", "i4", "?")),
]
_OF_MODELS = ("torch.nn.", "timm.", "torchvision.", "transformers.", "open_clip.")
_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"
_GLOBAL = re.compile(r"GLOBAL ([\w.]+) was not an allowed")


def read_tensors(path: Path) -> Tensors:
    """Reads the state dict of a safetensors file or a PyTorch file; what the file is called means nothing.

    Raises:
        ModelInvalid: If the file cannot be read, is something else, or holds no state dict or several; it is named as
            what it is.
    """
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError as error:
        raise ModelInvalid(f"cannot read weights file {path}: {error.strerror}") from error
    if _begins_as_safetensors(head) or (path.suffix == ".safetensors" and not head.startswith((_ZIP, _PICKLE))):
        return _safetensors(path, head)
    return _state_dict(_unpickled(path, head), path)


def _begins_as_safetensors(head: bytes) -> bool:
    """Returns whether a file begins with the length of a header, and the header's brace."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**32


def _safetensors(path: Path, head: bytes) -> Tensors:
    try:
        tensors: Tensors = safetensors.torch.load_file(path)
        with safetensors.safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
    except MemoryError:
        raise
    except Exception as error:
        text = kind_of(head)
        raise _none(path, f"it is {text}" if text else _cut(head)) from error
    if str(about.get("format", "")).startswith("fedpeft-"):
        raise ModelInvalid(f"{path} is a file of FedPEFT with an adapter or a state, not the weights of a backbone")
    if not tensors:
        raise ModelInvalid(f"{path} holds no state dict: there is no tensor in it")
    return tensors


def _cut(head: bytes) -> str:
    if _begins_as_safetensors(head):
        return "it is a safetensors file whose header is damaged, or whose end is missing"
    return "its header is not that of a safetensors file, or its end is missing"


def _unpickled(path: Path, head: bytes) -> Any:
    """Returns whatever a PyTorch file holds; torch's own words are for programmers, and some are bad advice."""
    try:
        with warnings.catch_warnings(), safe_globals(_HARMLESS), path.open("rb") as file:
            warnings.simplefilter("ignore")  # torch's unpickler says on the way what the error says
            return torch.load(file, map_location="cpu", weights_only=True)  # by its path, it would go by its name
    except MemoryError:
        raise
    except Exception as error:  # the unpickler raises anything at all on bytes that were not made for it
        if isinstance(error, OSError) and error.strerror:
            raise ModelInvalid(f"cannot read weights file {path}: {error.strerror}") from error
        raise _none(path, _wrong(path, head, error)) from error


def _none(path: Path, wrong: str) -> ModelInvalid:
    return ModelInvalid(f"{path} is not a safetensors file or a PyTorch file of plain tensors: {wrong}")


def _wrong(path: Path, head: bytes, error: Exception) -> str:
    """Returns what a weights file that could not be unpickled is."""
    if head.startswith(_PICKLE) or head.startswith(_ZIP):
        if "TorchScript" in str(error):
            return "it is a TorchScript archive, which holds code; save model.state_dict() in its place"
        if beyond := _classes(path, error):
            return _of_classes(beyond)
        if head.startswith(_ZIP) and not _GLOBAL.search(str(error)):
            return "it is a zip archive that PyTorch did not write, or its end is missing"
        return "it is damaged, or holds more than tensors, which is never loaded because it could run code here"
    kind = kind_of(head)
    if kind == "JSON":
        kind += ", such as the index of a checkpoint in several files or a model's configuration; name the weights"
    return f"it is {kind}" if kind else "its first bytes are those of neither"


def _classes(path: Path, error: Exception) -> list[str]:
    """Returns the names of what a file holds beside tensors and plain values, the one that comes first before all."""
    first = _GLOBAL.findall(str(error))
    try:
        allowed = {"argparse.Namespace", "numpy.dtype"}
        found = [name for name in get_unsafe_globals_in_checkpoint(str(path)) if name not in allowed]
    except Exception:  # it is no archive of torch's; the error names the first
        found = []
    return list(dict.fromkeys([*first, *sorted(name for name in found if not name.startswith("numpy."))]))


def _of_classes(names: list[str]) -> str:
    if any(name.startswith(_OF_MODELS) for name in names):
        return f"it holds a whole model object ({names[0]}), not a state dict; save model.state_dict() in its place"
    return (
        f"it holds more than tensors ({some(names)}), which is never loaded because it could run code here; save the "
        "state dict alone"
    )


def _state_dict(data: Any, path: Path) -> Tensors:
    """Finds the one state dict in what a file holds."""
    if isinstance(data, Mapping):
        for _ in range(_DEPTH):
            inner = next((data[key] for key in FIRST if isinstance(data.get(key), Mapping)), None)
            if inner is None:
                break
            data = inner
    if _is_state_dict(data):
        return dict(data)
    if not isinstance(data, Mapping) or not data:
        raise ModelInvalid(f"{path} holds no state dict but {_described(data)}")
    found = {str(key): value for key, value in data.items() if _is_state_dict(value)}
    if len(found) == 1:
        return dict(next(iter(found.values())))
    if found:
        raise ModelInvalid(
            f"{path} holds {len(found)} state dicts ({some(found)}); save the one that is meant in a file of its own"
        )
    odd = [str(name) for name, value in data.items() if not (isinstance(name, str) and isinstance(value, torch.Tensor))]
    raise ModelInvalid(f"{path} is not a state dict: {some(odd)} is not a tensor under a name")


def _is_state_dict(data: Any) -> bool:
    if not isinstance(data, Mapping) or not data:
        return False
    return all(isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in data.items())


def _described(data: Any) -> str:
    if isinstance(data, torch.Tensor):
        return f"one tensor of shape {tuple(data.shape)}"
    return "an empty dict" if isinstance(data, Mapping) else f"a {type(data).__name__}"


def some(names: Iterable[str]) -> str:
    """Returns the first few of some names."""
    names = list(names)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
