"""Backbones: a pre-trained model with a fresh head, and the fingerprint that proves two of them equal.

A backbone never changes: tuning works on a model that shares its frozen tensors (`fedpeft.peft.tune`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data.config import resolve_data_config
from torch import nn

from fedpeft import seeds
from fedpeft.checkpoints import DTYPES, fit, from_hub, inside, read_checkpoint, resolve_weights
from fedpeft.config import ModelConfig
from fedpeft.errors import ModelInvalid
from fedpeft.families import Anatomy, Family, family_of
from fedpeft.spec import AdapterSpec

__all__ = ["Backbone", "StoredTensor", "build", "check_weights", "fingerprint", "resolve_weights", "skeleton"]

HEAD_STD = 0.02
"""Standard deviation of a fresh head's weight (truncated normal), timm's own for a ViT; its bias is zero."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """What a fingerprint takes of one tensor of a checkpoint.

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
        config: What the run wanted.
        module: timm's model; maps float32 [batch, 3, image_size, image_size] to logits [batch, classes].
        anatomy: Where its parts lie.
        arguments: timm's keyword arguments that build it.
        image_size: Side of the square input in pixels.
        mean: Of each channel, for inputs scaled to 0..1.
        std: Likewise.
        interpolation: How images are resized: bicubic, bilinear...
        stored: The tensors as the checkpoint has them, by name.
    """

    config: ModelConfig
    module: nn.Module = field(repr=False)
    anatomy: Anatomy = field(repr=False)
    arguments: Mapping[str, Any]
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    stored: Mapping[str, StoredTensor] = field(repr=False)

    @property
    def parameters(self) -> int:
        """Values in the whole model, head included: what full fine-tuning would send."""
        return sum(p.numel() for p in self.module.parameters())

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.module.parameters()).device


def build(config: ModelConfig, seed: int, weights: Path | None = None, device: str = "cpu") -> Backbone:
    """Builds a run's backbone.

    Args:
        config: The model of the run.
        seed: The run's seed; the head, and all of it for weights = "none", derive from it, on the CPU.
        weights: A file, or a folder of files, that stands for the one the run names; see `resolve_weights`.
        device: Where the model goes.

    Raises:
        ModelInvalid: If there is no such model, or the weights are missing or do not fit it.
    """
    family = family_of(config.name)
    path = resolve_weights(config.weights, weights)
    arguments = _arguments(config, family)
    checkpoint = from_hub(config.name) if path is None and config.weights == "hub" else None
    if path is not None:
        checkpoint = read_checkpoint(path)
    module = _random(config.name, arguments, seed) if checkpoint is None else _empty(config.name, arguments)
    anatomy = family.anatomy(module)
    _fresh_head(module.get_submodule(anatomy.head), seed)
    fresh = module.state_dict()
    if checkpoint is None:
        stored = fresh
    else:
        state = fit(family, checkpoint, module, anatomy.head, str(path or "the hub's checkpoint"))
        stored = {name: checkpoint.get(name, tensor) for name, tensor in state.items()}
        head = {name: fresh[name] for name in fresh if inside(name, anatomy.head)}
        stored |= head
        module.load_state_dict(state | head, strict=True)
    digests = {name: _digest(tensor) for name, tensor in stored.items()}
    module.requires_grad_(False).eval().to(device)
    return Backbone(config, module, anatomy, arguments, *_inputs(module, config), digests)


def skeleton(config: ModelConfig) -> tuple[nn.Module, Anatomy]:
    """Returns a run's model without values (meta device) and where its parts lie; needs no weights.

    Raises:
        ModelInvalid: If timm has no such model, or not in this size or depth.
    """
    family = family_of(config.name)
    module = _create(config.name, "meta", **_arguments(config, family)).requires_grad_(False)
    return module, family.anatomy(module)


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
        module, anatomy = skeleton(config)
        fit(family_of(config.name), read_checkpoint(path), module, anatomy.head, str(path))
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
    text = json.dumps([backbone.config.name, backbone.image_size, frozen])
    return hashlib.sha256(text.encode()).hexdigest()


def _arguments(config: ModelConfig, family: Family) -> dict[str, Any]:
    return family.arguments(config, _native(config.name))


@lru_cache(maxsize=16)
def _native(name: str) -> nn.Module:
    """Returns the model as timm has it, without values; it is only looked at."""
    return _create(name, "meta")


def _create(name: str, device: str, **arguments: Any) -> nn.Module:
    try:
        with torch.device(device):
            module: nn.Module = timm.create_model(name, **arguments)
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        text = f"timm cannot build model {name!r} with {arguments}: {error}"
        raise ModelInvalid(text, (("model", text),)) from error
    return module


def _random(name: str, arguments: Mapping[str, Any], seed: int) -> nn.Module:
    """Returns a model with timm's own initial values, which derive from the seed; no other generator is touched."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seeds.derive(seed, "backbone"))
        return _create(name, "cpu", **arguments)


def _empty(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Returns a model to be filled from a state dict: for a ViT-B 0.1 s instead of 3 s for values that go at once."""
    module = _create(name, "meta", **arguments)
    if module.state_dict().keys() >= {buffer for buffer, _ in module.named_buffers()}:
        return module.to_empty(device="cpu")
    return _create(name, "cpu", **arguments)  # buffers that no state dict holds need their values


def _fresh_head(head: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seeds.derive(seeds.initialisation(seed), "head"))
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            else:
                nn.init.trunc_normal_(parameter, std=HEAD_STD, generator=generator)


def _inputs(
    module: nn.Module, config: ModelConfig
) -> tuple[int, tuple[float, float, float], tuple[float, float, float], str]:
    """Returns image size, mean, std and interpolation: the model's own, from timm."""
    own: dict[str, Any] = resolve_data_config({}, model=module)  # type: ignore[no-untyped-call]
    mean, std = (tuple(map(float, own[key])) for key in ("mean", "std"))
    if len(mean) != 3 or len(std) != 3:
        raise ModelInvalid(f"{config.name} takes {len(mean)} channels; images have 3")
    size = config.image_size or int(own["input_size"][-1])
    return size, (mean[0], mean[1], mean[2]), (std[0], std[1], std[2]), str(own["interpolation"])


def _digest(tensor: torch.Tensor) -> StoredTensor:
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    digest = hashlib.sha256(data.data).hexdigest()
    return StoredTensor(DTYPES[tensor.dtype], tuple(tensor.shape), digest)
