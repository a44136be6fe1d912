"""A run's model before it has values: one of timm's, or one of a kind that is installed here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import timm
import torch
from timm.data.config import resolve_data_config
from torch import nn

from fedpeft.config import ModelConfig
from fedpeft.errors import FedpeftError, ModelInvalid
from fedpeft.models.checkpoints import from_hub
from fedpeft.models.families import Anatomy, State, family_of
from fedpeft.models.kind import kind_of


@dataclass(frozen=True)
class ImageInputs:
    """The images that a model takes.

    Attributes:
        image_size: Side of the square input in pixels.
        mean: Of each channel, for inputs scaled to 0..1.
        std: Likewise.
        interpolation: How images are resized: bicubic, bilinear...
    """

    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str


class Architecture(ABC):
    """A model to be built.

    Attributes:
        arguments: timm's keyword arguments that build it; none for another kind.
    """

    arguments: Mapping[str, Any]

    @abstractmethod
    def create(self, device: str) -> nn.Module:
        """Returns the model with its initial random values, on a device; `meta` for none.

        Raises:
            ModelInvalid: If it cannot be built.
        """

    @abstractmethod
    def anatomy(self, module: nn.Module) -> Anatomy:
        """Returns where the parts of the model lie."""

    @abstractmethod
    def pretrained(self) -> State:
        """Returns the tensors that `weights = "hub"` stands for."""

    @abstractmethod
    def inputs(self, module: nn.Module) -> ImageInputs | None:
        """Returns what images the model takes; None if it takes something else."""

    def convert(self, checkpoint: State, module: nn.Module) -> State:
        """Returns a checkpoint's tensors under the names and in the shapes of `module`."""
        return checkpoint

    def beyond(self, name: str, module: nn.Module) -> bool:
        """Returns whether a tensor belongs to a block that `module` was cut short of."""
        return False


def architecture_of(config: ModelConfig) -> Architecture:
    """Returns what a run's `[model]` names.

    Raises:
        ModelInvalid: If there is no such model, or not in this size or depth.
    """
    return Plugged(config) if config.kind else Timm(config)


class Timm(Architecture):
    """An image classifier of timm."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._family = family_of(config.name)
        self.arguments = self._family.arguments(config, _native(config.name))

    def create(self, device: str) -> nn.Module:
        """See `Architecture.create`."""
        return _create(self._config.name, device, **self.arguments)

    def anatomy(self, module: nn.Module) -> Anatomy:
        """See `Architecture.anatomy`."""
        return self._family.anatomy(module)

    def pretrained(self) -> State:
        """See `Architecture.pretrained`."""
        return from_hub(self._config.name)

    def inputs(self, module: nn.Module) -> ImageInputs:
        """Returns the model's own, from timm."""
        own: dict[str, Any] = resolve_data_config({}, model=module)  # type: ignore[no-untyped-call]
        mean, std = (tuple(map(float, own[key])) for key in ("mean", "std"))
        if len(mean) != 3 or len(std) != 3:
            raise ModelInvalid(f"{self._config.name} takes {len(mean)} channels; images have 3")
        size = self._config.image_size or int(own["input_size"][-1])
        return ImageInputs(size, (mean[0], mean[1], mean[2]), (std[0], std[1], std[2]), str(own["interpolation"]))

    def convert(self, checkpoint: State, module: nn.Module) -> State:
        """See `Architecture.convert`."""
        return self._family.convert(checkpoint, module)

    def beyond(self, name: str, module: nn.Module) -> bool:
        """See `Architecture.beyond`."""
        return self._family.beyond(name, module)


class Plugged(Architecture):
    """A model of a kind that is installed here."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._kind = kind_of(config.kind)
        self.arguments = {}

    def create(self, device: str) -> nn.Module:
        """See `Architecture.create`."""
        try:
            with torch.device(device):
                return self._kind.module(self._config)
        except FedpeftError:
            raise
        except Exception as error:  # whatever somebody's class raises
            text = f"{self._config.name!r} cannot be built: {type(error).__name__}: {error}"
            raise ModelInvalid(text, (("model.name", text),)) from error

    def anatomy(self, module: nn.Module) -> Anatomy:
        """See `Architecture.anatomy`.

        Raises:
            ModelInvalid: If it names a head that the model does not have.
        """
        anatomy = self._kind.anatomy(module)
        if anatomy.head not in dict(module.named_modules()):
            raise ModelInvalid(f"{self._config.name!r} names {anatomy.head!r} as its head and has no such module")
        return anatomy

    def pretrained(self) -> State:
        """There is no hub for it.

        Raises:
            ModelInvalid: Always.
        """
        text = f'"hub" is timm\'s; {self._config.name!r} takes "none" or a weights file'
        raise ModelInvalid(f"model.weights: {text}", (("model.weights", text),))

    def inputs(self, module: nn.Module) -> None:
        """See `Architecture.inputs`."""
        return None


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
