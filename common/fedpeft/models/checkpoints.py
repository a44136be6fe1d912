"""Checkpoints: found, read without running anything in them, and fitted to a model strictly."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from timm.models import clean_state_dict
from torch import nn

from fedpeft.errors import ModelInvalid
from fedpeft.formatting import counted
from fedpeft.models.checkpoint_errors import some
from fedpeft.models.checkpoint_file import read_tensors
from fedpeft.models.structure import State
from fedpeft.models.tied_weights import spread

DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}
"""The element types a checkpoint may have, as safetensors names them."""


def resolve_weights(weights: str, given: Path | None) -> Path | None:
    """Returns the file that a run's `weights` stands for here, or None where no file is needed.

    Args:
        weights: "none", "hub", or the path that the run file has.
        given: This site's `--weights`. A file is taken as it is, and stands for the hub as well; in a
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
    state: State = clean_state_dict(read_tensors(path))
    return state


def under_own_names(checkpoint: State, module: nn.Module) -> State:
    """Returns a checkpoint without what wrappers put before every name, such as `model.` or `backbone.`.

    Of the prefixes that all tensors share, as many go as leave the most names that `module` has.
    """
    wanted = module.state_dict().keys()
    best = inner = checkpoint
    while inner:
        prefix = next(iter(inner)).partition(".")[0] + "."
        if not all(name.startswith(prefix) for name in inner):
            break
        inner = {name.removeprefix(prefix): tensor for name, tensor in inner.items()}
        if len(inner.keys() & wanted) > len(best.keys() & wanted):
            best = inner
    return best


def fit(
    convert: Callable[[State, nn.Module], State], checkpoint: State, module: nn.Module, head: str, source: str
) -> State:
    """Returns a checkpoint's tensors as `module` takes them, without the head; nothing else may differ.

    Args:
        convert: See `fedpeft.models.tasks.Task.convert`.
        checkpoint: The tensors as the file names them.
        module: The model.
        head: Name of its head.
        source: The file, for messages.

    Raises:
        ModelInvalid: If a tensor is missing, unknown, of another shape, not dense, or not finite.
    """
    try:
        state = spread(convert(checkpoint, module), module)
    except (RuntimeError, KeyError, ValueError, AttributeError) as error:
        raise ModelInvalid(f"{source} does not fit the model: {error}") from error
    state = {name: tensor for name, tensor in state.items() if not inside(name, head)}
    wanted = {n: t for n, t in module.state_dict().items() if not inside(n, head)}
    if missing := sorted(wanted.keys() - state.keys()):
        raise ModelInvalid(f"{source} does not fit the model: it lacks {some(missing)}{_whose(checkpoint, source)}")
    if unknown := sorted(state.keys() - wanted.keys()):
        whose = _whose(checkpoint, source)
        raise ModelInvalid(f"{source} does not fit the model, which has no {some(unknown)}{whose}")
    for name, tensor in state.items():
        if tensor.shape != wanted[name].shape:
            raise ModelInvalid(
                f"{source} does not fit the model: {name} is {tuple(tensor.shape)}, not {tuple(wanted[name].shape)}"
            )
        if tensor.layout is not torch.strided:
            kind = str(tensor.layout).removeprefix("torch.")
            raise ModelInvalid(f"{source}: {name} is {kind}; dense tensors are needed (tensor.to_dense())")
        if tensor.dtype not in DTYPES:
            raise ModelInvalid(f"{source}: {name} is {tensor.dtype}; floating-point tensors are needed")
        if bad := int((~torch.isfinite(tensor)).sum()):
            raise ModelInvalid(
                f"{source}: {name} has {counted(bad, 'value')} that are NaN or infinite; the file is damaged, or its "
                "training diverged"
            )
    return state


_FOREIGN = (
    ("attention.attention.query", "the names are those of Hugging Face transformers; timm's are needed"),
    ("encoder.layers.encoder_layer_0", "the names are those of torchvision; timm's are needed"),
    ("lora_", "it has the tensors of a LoRA adapter; the backbone's own weights are needed"),
    ("vera_lambda_", "it has the tensors of a VeRA adapter; the backbone's own weights are needed"),
    ("ia3_l", "it has the tensors of an (IA)^3 adapter; the backbone's own weights are needed"),
)
_SHARD = re.compile(r"-\d+-of-0*([1-9]\d*)\.")


def _whose(checkpoint: State, source: str) -> str:
    """Returns whose tensors a checkpoint that does not fit has, as a clause, where that shows."""
    if (shard := _SHARD.search(source)) and shard[1] != "1":
        return f"; it is one of the {shard[1]} files of a checkpoint, which must be joined into one"
    for part, whose in _FOREIGN:
        if any(part in name for name in checkpoint):
            return f"; {whose}"
    return ""


def inside(name: str, part: str) -> bool:
    """Returns whether a tensor of this name belongs to the module `part`."""
    return name.startswith(f"{part}.")
