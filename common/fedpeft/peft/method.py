"""Interface of a PEFT method, and the registry of all of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn

from fedpeft.adapters.payload import Tensors
from fedpeft.adapters.spec import Section, TensorRole
from fedpeft.config import RunConfig
from fedpeft.config_errors import faults_of
from fedpeft.errors import ConfigInvalid
from fedpeft.models.structure import ModelStructure
from fedpeft.registry import Registry

if TYPE_CHECKING:
    from peft import PeftConfig


@dataclass(frozen=True, slots=True)
class PeftForm:
    """The form in which the Hugging Face `peft` library holds the adapters of a method.

    Attributes:
        type: The library's name of the tuner, `peft_type` of its configurations.
        noun: An adapter's name in a sentence of its model card, with the article: "a LoRA".
        change: The clients' part beside the head, likewise: "a low-rank change".
        tag: The card's tag for model hubs: "lora".
        flag: A key that is true in the library's configurations of this method, and of no other of the type.
        library: The library's releases that load the folder rightly, as a requirement of Python's packages.
    """

    type: str
    noun: str
    change: str
    tag: str
    flag: str = ""
    library: str = "peft"


class MethodOptions(BaseModel):
    """Options of a method, written beside `method` in the run file; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


OptionsT = TypeVar("OptionsT", bound=MethodOptions)


class Method(ABC, Generic[OptionsT]):
    """One way of choosing what of a model is tuned. The head always is.

    A method changes no name of the plain model, or says in `canonical` how to undo it: specs, fingerprints and exports
    know canonical names only.
    """

    Options: ClassVar[type[MethodOptions]] = MethodOptions
    whole_model_trains: ClassVar[bool] = False
    """Puts the whole backbone in training mode while training; else only the injected modules are."""
    needs: ClassVar[tuple[str, ...]] = ()
    """The parts of a `ModelStructure` that the method attaches to; a model that lacks one cannot be tuned so."""

    peft_form: ClassVar[PeftForm | None] = None
    """The form that the Hugging Face `peft` library has for the adapter (`peft_config`); None if it has none."""
    variants: ClassVar[Mapping[str, Mapping[str, object]]] = MappingProxyType({})
    """Options beside the defaults that `fedpeft params` counts, by the name that it shows."""

    def __init__(self, options: OptionsT) -> None:
        self.options = options

    def inject(self, module: nn.Module, structure: ModelStructure, generator: torch.Generator) -> Sequence[nn.Module]:
        """Adds modules to `module` and hooks them in.

        Hooks must be bound methods of the injected modules: those are copied rightly with the model. Initial values are
        drawn on the CPU, in float32, in the order of the blocks. The modules may be left on the CPU.

        Args:
            module: The model, on any device, the meta device included.
            structure: Names of its parts.
            generator: A CPU generator, seeded from the run.

        Returns:
            The modules whose training mode follows the tuned model's.
        """
        return ()

    @abstractmethod
    def tunes(self, name: str) -> bool:
        """Returns whether the parameter of this canonical name, not of the head, is tuned."""

    def roles(self, name: str) -> tuple[TensorRole, ...]:
        """Returns the roles in turn of a tuned parameter, those of the head included."""
        return (TensorRole.SENT,)

    def sections(self, config: RunConfig) -> tuple[Section, ...]:
        """Returns the sections beside the adapter that a run with this method needs."""
        return ()

    def canonical(self, name: str) -> str:
        """Returns the name in the spec of a parameter's name in the tuned model."""
        return name

    def peft_config(self, module: nn.Module, structure: ModelStructure) -> PeftConfig:
        """Returns the configuration with which the `peft` library builds the method's modules on the plain model.

        Raises:
            ConfigInvalid: If the library has none.
        """
        raise ConfigInvalid("the method has no peft form; keep the adapter file (safetensors) itself")

    def peft_state(self, state: Tensors) -> Tensors:
        """Returns the tuned tensors, by canonical name, under the names and in the shapes of the `peft` library.

        Names are those inside the model; what the library holds beside it begins with `fedpeft.peft.tuners.BESIDE`.

        Raises:
            ConfigInvalid: If the library cannot hold them; the message is a whole sentence.
        """
        return state

    def from_peft_state(self, state: Tensors) -> Tensors:
        """Returns the tuned tensors of the library's: `peft_state` the other way round.

        Raises:
            ConfigInvalid: If the method cannot hold them; the message goes on after the name of the place.
        """
        return state

    @classmethod
    def from_peft_config(cls, config: Mapping[str, Any], targets: tuple[str, ...]) -> dict[str, object]:
        """Returns the options under which the method builds the modules of a configuration of the `peft` library.

        Args:
            config: A configuration of the method's `peft_form`, as adapter_config.json holds it.
            targets: Patterns that fit the wrapped layers, and no other.

        Raises:
            ConfigInvalid: If the method cannot build them; the message goes on after the name of the place.
        """
        raise ConfigInvalid("holds an adapter that the method cannot read")

    def plain(self, module: nn.Module) -> dict[str, torch.Tensor]:
        """Returns the state dict of a tuned model, with all that can be merged into the plain model merged."""
        return dict(module.state_dict())


def unfit(text: str, option: str = "method") -> ConfigInvalid:
    """Returns the error for a method, or an option of it, that fits nothing in a model."""
    return ConfigInvalid(f"peft.{option}: {text}", ((f"peft.{option}", text),))


methods: Registry[type[Method[Any]]] = Registry("fedpeft.peft", "fedpeft.methods", "PEFT method")


def make(name: str, options: Mapping[str, object]) -> Method[Any]:
    """Builds a method from its name and options.

    Raises:
        ConfigInvalid: If there is no such method, or an option is unknown or out of range.
    """
    try:
        cls = methods.get(name)
    except ConfigInvalid as error:
        raise ConfigInvalid(error.message, (("peft.method", error.message),)) from None
    try:
        return cls(cls.Options.model_validate(dict(options)))
    except ValidationError as error:
        unknown = f"is not an option of {name}; there are: {', '.join(sorted(cls.Options.model_fields)) or 'none'}"
        faults = tuple(
            (path, unknown if text.startswith("is not a known key") else text)
            for path, text in faults_of(error, options, "peft")
        )
        raise ConfigInvalid("; ".join(f"{path}: {text}" for path, text in faults), faults) from None
