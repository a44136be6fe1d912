"""Checkpoints: found, read without running anything in them, and fitted to a model strictly."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import safetensors
import safetensors.torch
import timm
import torch
from timm.models import clean_state_dict
from torch import nn

from fedpeft.errors import ModelInvalid
from fedpeft.families import State
from fedpeft.tied import spread

DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}
"""The element types a checkpoint may have, as safetensors names them."""


class Fitting(Protocol):
    """How a checkpoint's tensors become a model's: see `fedpeft.architectures.Architecture`."""

    def convert(self, checkpoint: State, module: nn.Module) -> State:
        """Returns them under the names and in the shapes of `module`."""

    def beyond(self, name: str, module: nn.Module) -> bool:
        """Returns whether a tensor belongs to a block that `module` was cut short of."""


def resolve_weights(weights: str, given: Path | None) -> Path | None:
    """Returns the file that a run's `weights` stands for here, or None where no file is needed.

    Args:
        weights: "none", "hub", or the path that the run file has.
        given: What this site was told with `--weights`. A file is taken as it is, and stands for the hub as well; in a
            folder the file of the same name is looked up. The fingerprint proves that it is the right one.

    Raises:
        ModelInvalid: If there is no such file.
    """
    if weights == "none":
        return None
    if given is not None and not given.exists():
        raise ModelInvalid(f"--weights {given} does not exist; give a weights file or a folder of them")
    if given is not None and given.is_file():
        return given
    if weights == "hub":
        return None
    name = Path(weights).name
    path = Path(weights) if given is None else given / name
    if not path.is_file():
        place = "here" if given is None else f"in {given}"
        text = f"the run's weights file {name} is not {place}; name it, or its folder, with --weights"
        raise ModelInvalid(text, (("model.weights", text),))
    return path


def from_hub(name: str) -> State:
    """Returns the hub's tensors under timm's names, in the model's own size."""
    try:
        state: State = timm.create_model(name, pretrained=True).state_dict()
    except Exception as error:  # whatever the hub's libraries raise: no network, no such weights, a full disk
        raise ModelInvalid(
            f"cannot get the weights of {name} from the hub ({type(error).__name__}: {error}); connect this machine, "
            "or give a file with --weights"
        ) from error
    return state


def read_checkpoint(path: Path) -> State:
    """Reads a state dict from a safetensors file, or from a PyTorch file, whose pickled code is never run.

    Raises:
        ModelInvalid: If the file cannot be read, or holds anything but named tensors.
    """
    data = _loaded(path)
    for key in ("state_dict", "model"):
        if isinstance(data, Mapping) and isinstance(data.get(key), Mapping):
            data = data[key]
    if not isinstance(data, Mapping) or not data:
        raise ModelInvalid(f"{path} holds no state dict")
    odd = [str(name) for name, value in data.items() if not (isinstance(name, str) and isinstance(value, torch.Tensor))]
    if odd:
        raise ModelInvalid(f"{path} is not a state dict: {_some(odd)} is not a tensor under a name")
    state: State = clean_state_dict(dict(data))
    return state


def _loaded(path: Path) -> Any:
    """Returns whatever a weights file holds; its libraries' own words are for programmers, and some are bad advice."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's unpickler says on the way what the error says
            if path.suffix == ".safetensors":
                return safetensors.torch.load_file(path)
            return torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # the unpickler raises anything at all on bytes that were not made for it
        if isinstance(error, OSError) and error.strerror:
            raise ModelInvalid(f"cannot read weights file {path}: {error.strerror}") from error
        raise ModelInvalid(
            f"{path} is not a safetensors file or a PyTorch file of plain tensors: {_wrong(path, error)}"
        ) from error


def _wrong(path: Path, error: Exception) -> str:
    """Returns what is wrong with a weights file that could not be read."""
    with path.open("rb") as file:
        first = file.read(4)
    if not first:
        return "it is empty"
    if path.suffix == ".safetensors":
        return "its header is not that of a safetensors file, or its end is missing"
    if first == b"PK\x03\x04" and not isinstance(error, pickle.UnpicklingError):
        return "it is a zip archive that PyTorch did not write, or its end is missing"
    if first == b"PK\x03\x04" or first[:1] == b"\x80":
        return "it is damaged, or holds more than tensors, which is never loaded because it could run code here"
    return "it begins as neither does (a safetensors file is told by its name, .safetensors)"


def fit(fitting: Fitting, checkpoint: State, module: nn.Module, head: str, source: str) -> State:
    """Returns a checkpoint's tensors as `module` takes them, without the head; nothing else may differ."""
    try:
        state = spread(fitting.convert(checkpoint, module), module)
    except (RuntimeError, KeyError, ValueError, AttributeError) as error:
        raise ModelInvalid(f"{source} does not fit the model: {error}") from error
    state = {
        name: tensor for name, tensor in state.items() if not inside(name, head) and not fitting.beyond(name, module)
    }
    wanted = {n: t for n, t in module.state_dict().items() if not inside(n, head)}
    if missing := sorted(wanted.keys() - state.keys()):
        raise ModelInvalid(f"{source} does not fit the model: it lacks {_some(missing)}")
    if unknown := sorted(state.keys() - wanted.keys()):
        raise ModelInvalid(f"{source} does not fit the model, which has no {_some(unknown)}")
    for name, tensor in state.items():
        if tensor.shape != wanted[name].shape:
            raise ModelInvalid(
                f"{source} does not fit the model: {name} is {tuple(tensor.shape)}, not {tuple(wanted[name].shape)}"
            )
        if tensor.dtype not in DTYPES:
            raise ModelInvalid(f"{source}: {name} is {tensor.dtype}; floating-point tensors are needed")
    return state


def inside(name: str, part: str) -> bool:
    """Returns whether a tensor of this name belongs to the module `part`."""
    return name.startswith(f"{part}.")


def _some(names: Iterable[str]) -> str:
    """Returns the first few of some names."""
    names = list(names)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
