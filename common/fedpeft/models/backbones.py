"""Backbones: a pre-trained model with a fresh head, and the fingerprint that proves two of them equal.

A backbone never changes: tuning works on a model that shares its frozen tensors (`fedpeft.peft.tune`).
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch
from torch import nn

from fedpeft import seeds
from fedpeft.adapters.spec import AdapterSpec
from fedpeft.config import ModelConfig
from fedpeft.data.transforms import ImageInputs
from fedpeft.errors import FedpeftError, ModelInvalid
from fedpeft.models.checkpoints import DTYPES, fit, inside, read_checkpoint, resolve_weights, under_own_names
from fedpeft.models.structure import ModelStructure, State
from fedpeft.models.tasks import Task, task_of
from fedpeft.models.tied_weights import aliases_of, names_of, put, spread, tied_beyond

__all__ = ["Backbone", "StoredTensor", "build", "check_weights", "fingerprint", "resolve_weights", "skeleton"]

HEAD_STD = 0.02
"""Standard deviation of a fresh head's weight (truncated normal), timm's own for a ViT; its bias is zero."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """The part of a fingerprint that comes from one tensor of a checkpoint.

    Attributes:
        dtype: As safetensors names it.
        shape: Extents, outermost first.
        sha256: Of its little-endian bytes, hexadecimal.
    """

    dtype: str
    shape: tuple[int, ...]
    sha256: str


@dataclass(frozen=True)
class Backbone:
    """A pre-trained model with a fresh head, in eval mode, nothing of it trainable.

    Attributes:
        config: The run's [model].
        module: The model; timm's map float32 [batch, 3, image_size, image_size] to logits [batch, classes].
        structure: Names of its parts.
        images: The images it takes; None if it takes something else.
        stored: The tensors as the checkpoint has them, by name.
    """

    config: ModelConfig
    module: nn.Module = field(repr=False)
    structure: ModelStructure = field(repr=False)
    images: ImageInputs | None
    stored: Mapping[str, StoredTensor] = field(repr=False)

    @property
    def parameters(self) -> int:
        """Values in the whole model, head included: what full fine-tuning would send."""
        return sum(p.numel() for p in self.module.parameters())

    @property
    def device(self) -> torch.device:
        """Device that the model is on."""
        return next(self.module.parameters()).device


def build(config: ModelConfig, seed: int, weights: Path | None = None, device: str = "cpu") -> Backbone:
    """Builds a run's backbone.

    Args:
        config: The model of the run.
        seed: The run's seed; the head, and all of it for weights = "none", derive from it, on the CPU.
        weights: A file, or a folder of files, that stands for the one the run names; see `resolve_weights`.
        device: Device of the model.

    Raises:
        ModelInvalid: If there is no such model, or the weights are missing or do not fit it.
    """
    task = task_of(config.task)
    path = resolve_weights(config.weights, weights)
    checkpoint = task.pretrained(config) if path is None and config.weights == "hub" else None
    if path is not None:
        checkpoint = read_checkpoint(path)
    module = _random(task, config, seed) if checkpoint is None else _empty(task, config)
    structure = _structure(task, module, config)
    tied = tied_beyond(module, structure.head)
    _fresh_head(module, structure.head, tied, seed)
    fresh = module.state_dict()
    if checkpoint is None:
        stored = fresh
    else:
        checkpoint = under_own_names(checkpoint, module)
        state = _fit(task, checkpoint, module, config, structure.head, str(path or "the hub's checkpoint"))
        stored = {name: checkpoint.get(name, tensor) for name, tensor in state.items()}
        head = {name: fresh[name] for name in fresh if inside(name, structure.head) and name not in tied}
        stored |= head
        module.load_state_dict(spread(state | head, module), strict=True)
    aliases = aliases_of(module)
    digests = {name: _digest(tensor) for name, tensor in spread(stored, module).items() if name not in aliases}
    module.requires_grad_(False).eval().to(device)
    return Backbone(config, module, structure, task.images(module, config), digests)


def skeleton(config: ModelConfig) -> tuple[nn.Module, ModelStructure]:
    """Returns a run's model without values (meta device) and where its parts lie; needs no weights.

    Raises:
        ModelInvalid: If there is no such model, or not in this size or depth.
    """
    return copy.deepcopy(_skeleton(config.model_dump_json()))


@lru_cache(maxsize=1)
def _skeleton(written: str) -> tuple[nn.Module, ModelStructure]:
    """Returns what `skeleton` returns a copy of: timm takes five times as long to build one, and methods change it."""
    config = ModelConfig.model_validate_json(written)
    task = task_of(config.task)
    module = _created(task, config, "meta").requires_grad_(False)
    return module, _structure(task, module, config)


def check_weights(config: ModelConfig, weights: Path | None = None) -> Path | None:
    """Returns the file that a run's weights come from here, if it is one; it fits the model then.

    Args:
        config: The model of the run.
        weights: As for `build`.

    Raises:
        ModelInvalid: As `build`; but the hub is not asked.
    """
    path = resolve_weights(config.weights, weights)
    if path is not None:
        module, structure = skeleton(config)
        checkpoint = under_own_names(read_checkpoint(path), module)
        _fit(task_of(config.task), checkpoint, module, config, structure.head, str(path))
    return path


def fingerprint(backbone: Backbone, spec: AdapterSpec) -> str:
    """Returns the digest of all that stays frozen under an adapter spec, 64 hexadecimal digits.

    It covers the model's name, the image size, and name, dtype, shape and bytes (by their sha256) of every tensor of
    the plain model that the spec does not name, sorted by name. The tensors are those of the checkpoint, not of the
    model: resampling the position embedding for another image size may differ in the last bit from one CPU to another.
    So it depends neither on device nor training nor injected modules, and is the same for all methods that freeze the
    same tensors.
    """
    tuned = {tensor.name for tensor in spec.tensors}
    frozen = [
        [name, tensor.dtype, tensor.shape, tensor.sha256]
        for name, tensor in sorted(backbone.stored.items())
        if name not in tuned
    ]
    size = None if backbone.images is None else backbone.images.image_size
    text = json.dumps([backbone.config.name, size, frozen])
    return hashlib.sha256(text.encode()).hexdigest()


def _created(task: Task, config: ModelConfig, device: str) -> nn.Module:
    """Returns a task's model with its initial random values, on a device; `meta` for none."""
    try:
        with torch.device(device):
            return task.module(config)
    except FedpeftError:
        raise
    except Exception as error:  # whatever somebody's class raises
        text = f"{config.name!r} cannot be built: {type(error).__name__}: {error}"
        raise ModelInvalid(text, (("model.name", text),)) from error


def _structure(task: Task, module: nn.Module, config: ModelConfig) -> ModelStructure:
    """Returns where the parts of a model lie; raises `ModelInvalid` if it names a head that is not there."""
    structure = task.structure(module, config)
    if structure.head not in dict(module.named_modules()):
        raise ModelInvalid(f"{config.name!r} names {structure.head!r} as its head and has no such module")
    return structure


def _fit(task: Task, checkpoint: State, module: nn.Module, config: ModelConfig, head: str, source: str) -> State:
    return fit(lambda state, model: task.convert(state, model, config), checkpoint, module, head, source)


def _random(task: Task, config: ModelConfig, seed: int) -> nn.Module:
    """Returns a model with its own initial values, which derive from the seed; no other generator is touched."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seeds.derive(seed, "backbone"))
        return _created(task, config, "cpu")


def _empty(task: Task, config: ModelConfig) -> nn.Module:
    """Returns a model to be filled from a state dict: for a ViT-B 0.1 s instead of 3 s for values that go at once."""
    module = _created(task, config, "meta")
    if module.state_dict().keys() >= {buffer for buffer, _ in module.named_buffers()}:
        names = names_of(module)
        filled = module.to_empty(device="cpu")  # which gives a tied parameter another tensor under each name
        for first, others in names.items():
            put(filled, others[1:], filled.get_parameter(first))
        return filled
    return _created(task, config, "cpu")  # buffers that no state dict holds need their values


def _fresh_head(module: nn.Module, head: str, tied: Container[str], seed: int) -> None:
    """Gives the head its initial values, but for those of its parameters that are the backbone's too."""
    if not head:
        return
    generator = torch.Generator().manual_seed(seeds.derive(seeds.initialisation(seed), "head"))
    with torch.no_grad():
        for name, parameter in module.get_submodule(head).named_parameters(prefix=head):
            if name in tied:
                continue
            if name.endswith("bias"):
                parameter.zero_()
            else:
                nn.init.trunc_normal_(parameter, std=HEAD_STD, generator=generator)


def _digest(tensor: torch.Tensor) -> StoredTensor:
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    digest = hashlib.sha256(data.data).hexdigest()
    return StoredTensor(DTYPES[tensor.dtype], tuple(tensor.shape), digest)
