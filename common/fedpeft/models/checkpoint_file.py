"""A weights file to named tensors: told by its content, read without running anything, found in what it holds.

Notable: nothing of a pickled file is run. Beside tensors and plain values, what training scripts leave of their options
and figures (argparse.Namespace, numbers of NumPy) is let through, because it is data and does nothing.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch.serialization import safe_globals

from fedpeft.errors import ModelInvalid
from fedpeft.models.checkpoint_errors import PICKLE, ZIP, begins_as_safetensors, not_safetensors, not_unpickled, some
from fedpeft.process.file_formats import HEAD_BYTES

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
    if begins_as_safetensors(head) or (path.suffix == ".safetensors" and not head.startswith((ZIP, PICKLE))):
        return _safetensors(path, head)
    return _state_dict(_unpickled(path, head), path)


def _safetensors(path: Path, head: bytes) -> Tensors:
    try:
        tensors: Tensors = safetensors.torch.load_file(path)
        with safetensors.safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
    except MemoryError:
        raise
    except Exception as error:
        raise not_safetensors(path, head) from error
    if str(about.get("format", "")).startswith("fedpeft-"):
        raise ModelInvalid(f"{path} is a file of FedPEFT with an adapter or a state, not the weights of a backbone")
    if not tensors:
        raise ModelInvalid(f"{path} holds no state dict: there is no tensor in it")
    return tensors


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
        raise not_unpickled(path, head, error) from error


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
