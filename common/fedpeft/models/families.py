"""Families of timm's models: all that is special about one of them, in one class each.

Everything else asks the family: how a run's settings become timm's arguments, how a checkpoint becomes the model's
state dict, and where the parts lie that PEFT methods attach to. To add a family, write a `Family` and name it in
`FAMILIES` under the timm module that defines its models. A model that is not timm's has a task of its own
(`fedpeft.models.tasks`).
"""

from __future__ import annotations

import difflib
import re
from abc import ABC, abstractmethod
from functools import lru_cache
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import nn

from fedpeft.config import ModelConfig
from fedpeft.errors import ModelInvalid
from fedpeft.models.halves import Halves, vit_halves
from fedpeft.models.structure import ModelStructure, State


class Family(ABC):
    """One family of timm's models."""

    @abstractmethod
    def arguments(self, config: ModelConfig, native: nn.Module) -> dict[str, Any]:
        """Returns timm's keyword arguments for a run's model.

        Args:
            config: The run's [model].
            native: The model as timm has it, without values (meta device).

        Raises:
            ModelInvalid: If the model cannot be had in this size or depth.
        """

    @abstractmethod
    def convert(self, checkpoint: State, module: nn.Module) -> State:
        """Returns a checkpoint's tensors under the names and in the shapes of `module`, less the blocks it lacks."""

    @abstractmethod
    def structure(self, module: nn.Module) -> ModelStructure:
        """Returns where the parts of `module` lie.

        Raises:
            ModelInvalid: If the model is not built as the family is.
        """

    def halves(self, module: nn.Module, parts: int) -> Halves | None:
        """Returns a model in two; see `fedpeft.models.tasks.Task.halves`."""
        return None


class VisionTransformers(Family):
    """timm's `VisionTransformer`: ViT, DeiT-style, DINO, DINOv2, MAE, MoCo-v3, CLIP and SigLIP image towers."""

    def arguments(self, config: ModelConfig, native: nn.Module) -> dict[str, Any]:
        """See `Family.arguments`."""
        assert isinstance(native, VisionTransformer)
        arguments: dict[str, Any] = {"num_classes": len(config.classes)}
        if config.image_size is not None:
            side = native.patch_embed.patch_size[0]
            if config.image_size % side:
                raise _wrong(
                    "image_size",
                    f"{config.image_size} does not divide into patches of {side} pixels; "
                    f"{config.name} takes multiples of {side}",
                )
            arguments["img_size"] = config.image_size
        if config.depth is not None:
            if config.depth > len(native.blocks):
                raise _wrong("depth", f"{config.depth} is more than the {len(native.blocks)} blocks of {config.name}")
            arguments["depth"] = config.depth
        if config.pooling is not None:
            # timm would move the last norm behind average pooling and leave the checkpoint's own norm unused.
            arguments["global_pool"] = config.pooling
            arguments["fc_norm"] = not isinstance(native.fc_norm, nn.Identity)
        return arguments

    def convert(self, checkpoint: State, module: nn.Module) -> State:
        """See `Family.convert`; the position embedding is resampled to the model's grid."""
        assert isinstance(module, VisionTransformer)
        converted: State = checkpoint_filter_fn(dict(checkpoint), module)
        blocks = {name: re.match(r"blocks\.(\d+)\.", name) for name in converted}
        return {name: converted[name] for name, at in blocks.items() if not at or int(at[1]) < len(module.blocks)}

    def structure(self, module: nn.Module) -> ModelStructure:
        """See `Family.structure`."""
        if not isinstance(module, VisionTransformer):
            raise ModelInvalid(f"{type(module).__name__} is not a VisionTransformer of timm")
        classifier = module.get_classifier()
        head = next((name for name, part in module.named_modules() if part is classifier), None)
        blocks = {f"blocks.{index}": block for index, block in enumerate(module.blocks)}
        mlps = [getattr(block, "mlp", None) for block in blocks.values()]
        if head is None or None in mlps:
            raise ModelInvalid("the model has no classifier, or a block of it has no MLP")
        height, width = module.patch_embed.patch_size
        return ModelStructure(
            head=head,
            blocks=blocks,
            mlps=tuple(mlp for mlp in mlps if mlp is not None),
            width=module.embed_dim,
            patch_values=module.in_chans * height * width,
            behind=("norm", "attn_pool", "fc_norm", "head_drop"),
        )

    def halves(self, module: nn.Module, parts: int) -> Halves | None:
        """See `Family.halves`."""
        return vit_halves(module, parts) if isinstance(module, VisionTransformer) else None


_VIT = VisionTransformers()
FAMILIES: dict[str, Family] = {"timm.models.vision_transformer": _VIT, "timm.models.deit": _VIT}
"""Families by the timm module that defines their models."""
ALIKE = 0.8
"""Least likeness of a known model's name to a wrong one for it to be named."""


def family_of(name: str) -> Family:
    """Returns the family of the model that timm knows as `name`.

    Raises:
        ModelInvalid: If timm has no such model, or its family is not supported.
    """
    if not timm.is_model(name):
        raise _wrong("name", f"timm {timm.__version__} has no model {name!r}{_near(name)}")
    module = timm.model_entrypoint(name).__module__
    if module not in FAMILIES:
        raise _wrong("name", f"{name!r} is of {module}; the families that work are: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[module]


def timm_arguments(config: ModelConfig) -> dict[str, Any]:
    """Returns timm's keyword arguments for a run's model; raises `ModelInvalid` if there is none of that kind."""
    return family_of(config.name).arguments(config, _native(config.name))


def timm_model(name: str, **arguments: Any) -> nn.Module:
    """Returns a model of timm on torch's default device; raises `ModelInvalid` if timm cannot build it."""
    try:
        module: nn.Module = timm.create_model(name, **arguments)
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        text = f"timm cannot build model {name!r} with {arguments}: {error}"
        raise ModelInvalid(text, (("model", text),)) from error
    return module


@lru_cache(maxsize=16)
def _native(name: str) -> nn.Module:
    """Returns the model as timm has it, without values; it is only looked at."""
    with torch.device("meta"):
        return timm_model(name)


def _wrong(key: str, text: str) -> ModelInvalid:
    """Returns the error for a key of `[model]`."""
    return ModelInvalid(f"model.{key}: {text}", ((f"model.{key}", text),))


def _near(name: str) -> str:
    """Names models that would work and begin like `name`: who takes the advice is not refused again."""
    known = [model for module in FAMILIES for model in timm.list_models(module=module.removeprefix("timm.models."))]
    likeness = {model: difflib.SequenceMatcher(None, name, model[: len(name)]).ratio() for model in known}
    near = sorted((m for m in known if likeness[m] >= ALIKE), key=lambda m: (-likeness[m], len(m), m))[:3]
    return f"; near it are {', '.join(near)}" if near else ""
