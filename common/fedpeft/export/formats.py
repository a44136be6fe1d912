"""Adapters in the forms that others load, and back: a timm state dict, a Hugging Face `peft` directory.

At rest an adapter is a safetensors file of its own tensors, whatever the method; these are for use outside FedPEFT.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import safetensors.torch
import timm
import torch
from numpy.typing import NDArray
from torch import nn

from fedpeft import text_files
from fedpeft.adapters.tensor_errors import as_os_errors
from fedpeft.errors import BackboneMismatch, ConfigInvalid, ModelInvalid
from fedpeft.export.model_card import Provenance, card
from fedpeft.models.backbones import Backbone, fingerprint
from fedpeft.models.checkpoints import read_checkpoint
from fedpeft.models.families import timm_arguments
from fedpeft.peft.method import methods
from fedpeft.peft.tuned import TunedModel, tune
from fedpeft.peft.tuners import BESIDE, target_layers

if TYPE_CHECKING:
    from peft import PeftModel

Arrays = dict[str, NDArray[np.float32]]

PREFIX = "base_model.model."
"""Prefix that the `peft` library puts before the names of a model it wraps."""


def as_timm(tuned: TunedModel, path: Path) -> None:
    """Writes the whole tuned model as a timm state dict, in a safetensors file.

    It loads strictly into `timm.create_model(name, **arguments)`; name, arguments and class names are in the file's
    metadata, as JSON under "timm".

    Args:
        tuned: Under a method that adds nothing to the model (full, head, bias...) or whose additions merge into it
            (lora, ssf, ia3...).
        path: The file; replaced if it exists.

    Raises:
        ConfigInvalid: If the method's tensors have no place in timm's model (adapter, adaptformer, prompt).
        OSError: If the file cannot be written.
    """
    backbone = tuned.backbone
    state = _plain(tuned)
    about = {
        "name": backbone.config.name,
        "arguments": timm_arguments(backbone.config),
        "classes": backbone.config.classes,
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    path.touch()
    mode = path.stat().st_mode
    with as_os_errors(path):
        safetensors.torch.save_file(tensors, path, {"format": "pt", "timm": json.dumps(about)})
    path.chmod(mode)  # the package's files are for their owner alone, whatever the umask


def timm_model(tuned: TunedModel) -> nn.Module:
    """Returns the tuned model as timm builds it, in evaluation mode on the CPU; arguments and errors as `as_timm`."""
    backbone = tuned.backbone
    state = {name: tensor.detach().cpu() for name, tensor in _plain(tuned).items()}
    model: nn.Module = timm.create_model(backbone.config.name, **timm_arguments(backbone.config))
    model.load_state_dict(state, strict=True)
    return model.eval()


def peft_model(tuned: TunedModel) -> PeftModel:
    """Returns an adapter as the `peft` library loads it, on its timm model; arguments and errors as `as_peft`."""
    from peft import PeftModel

    with TemporaryDirectory() as folder:
        as_peft(tuned, Path(folder))
        plain = copy.deepcopy(tuned.backbone.module).cpu()
        loaded: PeftModel = PeftModel.from_pretrained(plain, folder).eval()
    return loaded


def from_timm(path: Path, tuned: TunedModel) -> Arrays:
    """Reads an adapter out of a whole timm state dict, as `as_timm` writes it.

    Args:
        path: A safetensors file, or a PyTorch file of plain tensors.
        tuned: The backbone under the adapter's method; is not changed.

    Returns:
        The adapter's tensors, float32, ready for `TunedModel.load`.

    Raises:
        ModelInvalid: If the file cannot be read, or lacks a tensor or has another shape.
        BackboneMismatch: If a frozen tensor differs from the backbone's.
        ConfigInvalid: If the method's tensors are not in such a file, or were merged in it.
    """
    plain = tuned.backbone.module.state_dict()
    names = [tensor.name for tensor in tuned.spec.tensors]
    if not plain.keys() >= set(names):
        raise ConfigInvalid(
            f"an adapter of method {tuned.spec.method} cannot be read from a timm state dict, which has no {names[0]}; "
            "read it from its safetensors file, or from its peft directory if it has one"
        )
    state = read_checkpoint(path)
    for name, own in plain.items():
        if name not in state or state[name].shape != own.shape:
            has = tuple(state[name].shape) if name in state else "missing"
            raise ModelInvalid(f"{path}: tensor {name} is {has}; the model has {tuple(own.shape)}")
        # A backbone's position embedding may differ in the last bit where it was resampled on another CPU.
        if name not in names and not torch.allclose(state[name].float(), own.cpu(), 1e-5, 1e-6):
            raise BackboneMismatch(
                f"{path}: tensor {name} differs from the backbone's, and method {tuned.spec.method} leaves it frozen"
            )
    return {name: _array(state[name]) for name in names}


def as_peft(tuned: TunedModel, folder: Path, provenance: Provenance | None = None) -> None:
    """Writes a directory of the `peft` library: adapter_config.json, adapter_model.safetensors, README.md.

    `peft.PeftModel.from_pretrained(model, folder)` loads it, where model is the backbone's timm model; the head goes
    along as a module to save.

    Args:
        tuned: Under a method that has a form in that library.
        folder: Made if missing.
        provenance: Origin of the adapter, for its card.

    Raises:
        ConfigInvalid: If the library does not have the method, or is too old for it.
        OSError: If a file cannot be written.
    """
    from peft import get_peft_model, set_peft_model_state_dict

    _check_timm(tuned.backbone)
    backbone = tuned.backbone
    if tuned.method.peft_form is None:
        raise ConfigInvalid(
            f"an adapter of method {tuned.spec.method} has no peft form; keep the adapter file (safetensors) itself"
        )
    config: Any = tuned.method.peft_config(backbone.module, backbone.structure)
    saved = tuned.method.peft_state(tuned.state())
    layers = list(config.target_modules)  # the library shortens a long list
    config.modules_to_save = [tuned.backbone.structure.head]
    plain = copy.deepcopy(tuned.backbone.module).cpu()
    model = get_peft_model(plain, config)
    wrapped = {name for name, _ in model.named_modules()}
    assert all(f"{PREFIX}{layer}" in wrapped for layer in layers)
    inside = {name: name if name.startswith(BESIDE) else f"{PREFIX}{name}" for name in saved}
    state = {inside[name]: torch.from_numpy(values) for name, values in saved.items()}
    taken: Any = set_peft_model_state_dict(model, state)
    if left_out := taken.unexpected_keys:
        raise ConfigInvalid(
            f"the installed peft {version('peft')} has no place for {left_out[0]} of an adapter of method "
            f"{tuned.spec.method}; install {tuned.method.peft_form.library}, or keep the adapter file (safetensors) "
            "itself"
        )
    config.base_model_name_or_path = tuned.backbone.config.name
    with as_os_errors(folder / "adapter_model.safetensors"):
        model.save_pretrained(str(folder), save_embedding_layers=False)  # else it may ask the hub for a vocabulary
    (folder / "README.md").write_text(
        card(tuned, fingerprint(tuned.backbone, tuned.spec), provenance), encoding="utf-8"
    )
    mode = (folder / "adapter_config.json").stat().st_mode
    (folder / "adapter_model.safetensors").chmod(mode)  # as in as_timm


class ReadAdapter(NamedTuple):
    """An adapter of the `peft` library, for `tune(backbone, method, options, seed).load(tensors)`."""

    method: str
    options: dict[str, object]
    tensors: Arrays


def from_peft(folder: Path, backbone: Backbone, method: str | None = None) -> ReadAdapter:
    """Reads an adapter from a directory of the `peft` library.

    Args:
        folder: As `as_peft` writes it, or the library itself for a timm model of this family.
        backbone: The model it is for.
        method: Registered name of the method to read it as; if absent the one of its type that is no variant of another
            (`lora`, not `rolora`).

    Raises:
        ModelInvalid: If the directory cannot be read, is of a type that no method has, uses what the method does not
            have, or does not fit the model.
        ConfigInvalid: If there is no such method, or several of the type are no variant of another.
    """
    try:
        data = text_files.json_of(text_files.read(folder / "adapter_config.json"))
        if not isinstance(data, dict):
            raise ValueError("its configuration is not a JSON object")
    except (OSError, ValueError) as error:
        raise ModelInvalid(f"{folder} is not a directory of the peft library: {error}") from error
    name = method or _method_of(data, folder)
    cls = methods.get(name)
    if cls.peft_form is None or cls.peft_form.type != data.get("peft_type"):
        raise ModelInvalid(f"{folder} holds a {data.get('peft_type')} adapter, which method {name} cannot read")
    state = read_checkpoint(folder / "adapter_model.safetensors")
    tensors = {_unwrapped(key, backbone.structure.head): _array(t) for key, t in state.items()}
    try:
        options = cls.from_peft_config(data, _targets(_wrapped(tensors, backbone.module), backbone))
    except ConfigInvalid as error:
        raise ModelInvalid(f"{folder} {error.message}") from error
    try:
        tuned = tune(backbone, name, options, 0)
    except ConfigInvalid as error:
        raise ModelInvalid(f"{folder} does not fit {backbone.config.name}: {error.message}") from error
    try:
        tensors = dict(tuned.method.from_peft_state(tensors))
    except ConfigInvalid as error:
        raise ModelInvalid(f"{folder} {error.message}") from error
    shapes = {tensor.name: tensor.shape for tensor in tuned.spec.tensors}
    found = {name: values.shape for name, values in tensors.items()}
    if found != shapes:
        odd = sorted(n for n in shapes.keys() | found.keys() if shapes.get(n) != found.get(n))[0]
        raise ModelInvalid(
            f"{folder} does not fit {backbone.config.name}: {odd} is {found.get(odd, 'missing')} there, "
            f"{shapes.get(odd, 'unknown')} in the model"
        )
    return ReadAdapter(name, options, tensors)


def _method_of(config: Mapping[str, Any], folder: Path) -> str:
    """Returns the method of a configuration of the library of which all others that it may be are variants."""
    known = {name: methods.get(name) for name in methods.names()}
    forms = {name: cls.peft_form for name, cls in known.items() if cls.peft_form is not None}
    peft_type = config.get("peft_type")
    found = [name for name, form in forms.items() if form.type == peft_type]
    flagged = [name for name in found if config.get(forms[name].flag)]
    found = flagged or [name for name in found if not forms[name].flag]
    if not found:
        types = ", ".join(sorted({form.type for form in forms.values()}))
        raise ModelInvalid(f"{folder} holds a {peft_type} adapter; only {types} can be read")
    plainest = [name for name in found if all(issubclass(known[other], known[name]) for other in found)]
    if not plainest:
        raise ConfigInvalid(f"{folder} holds a {peft_type} adapter; say which method reads it: {', '.join(found)}")
    return plainest[0]


def _plain(tuned: TunedModel) -> dict[str, torch.Tensor]:
    """Returns the state dict of timm's model that a tuned model is."""
    _check_timm(tuned.backbone)
    state = tuned.method.plain(tuned.module)
    if state.keys() != tuned.backbone.module.state_dict().keys():
        raise ConfigInvalid(
            f"an adapter of method {tuned.spec.method} has no plain timm form: its modules do not exist in "
            f"{tuned.backbone.config.name}; keep the adapter file (safetensors) itself, and load it into "
            "fedpeft.peft.tune(...)"
        )
    return state


def _check_timm(backbone: Backbone) -> None:
    if backbone.config.task:
        raise ConfigInvalid(f"{backbone.config.name} is no model of timm; keep the adapter file (safetensors) itself")


def _unwrapped(name: str, head: str) -> str:
    """Returns the canonical name of a tensor of the library's file."""
    name = name.removeprefix(PREFIX)
    return name.replace(f"{head}.modules_to_save.default.", f"{head}.")


def _wrapped(names: Iterable[str], module: nn.Module) -> list[str]:
    """Returns the layers of the plain model to which tensors of these names were added, in their order."""
    layers, own = {name for name, _ in module.named_modules()}, module.state_dict()
    found = dict[str, None]()
    for name in names:
        parts = [] if name in own else name.split(".")
        places = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
        if layer := next((place for place in places if place in layers), ""):
            found[layer] = None
    return list(found)


def _targets(layers: list[str], backbone: Backbone) -> tuple[str, ...]:
    """Returns the shortest patterns that fit exactly these layers: their ends where every block has them."""
    ends = tuple(sorted({layer.split(".", 2)[2] for layer in layers if layer.count(".") > 1}))
    try:
        fits = target_layers(backbone.structure, ends)
    except ConfigInvalid:
        fits = []
    return ends if ends and set(fits) == set(layers) else tuple(layers)


def _array(tensor: torch.Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = tensor.detach().to("cpu", torch.float32, copy=True).numpy()
    return array
