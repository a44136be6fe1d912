"""Local algorithms: rules that a client's training follows beside its loss. One file each, which registers itself.

An algorithm has hooks in the one training loop: it starts from the received values, changes gradients before each
optimizer step, and finishes with what the client keeps for its next round and what it sends beside its update. The
tensors that it gets are torch's; nothing here imports torch, because servers check the options of runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias

from pydantic import BaseModel, ConfigDict

from fedpeft.adapters.spec import AdapterSpec, Section
from fedpeft.config import PLAIN, AlgorithmConfig, RunConfig
from fedpeft.config_errors import Fault
from fedpeft.registry import Registry

Tensors = Mapping[str, Any]
"""torch.Tensor float32 by the adapter's tensor names."""
TensorGroups = Mapping[str, Tensors]


class AlgorithmOptions(BaseModel):
    """Options of an algorithm, written beside `name` in `[training.algorithm]`; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


_Options: TypeAlias = AlgorithmOptions


@dataclass(frozen=True)
class RoundStart:
    """The beginning of a client's round, as an algorithm gets it.

    Attributes:
        parameters: The parameters that the round trains and sends, with the received values; on the device of training.
        learning_rate: Of the local optimizer.
        state: The client's kept state, by group and tensor, float32 on that device; zeros where it kept nothing.
        sections: Received sections beside the adapter, by section and tensor; likewise.
    """

    parameters: Tensors
    learning_rate: float
    state: TensorGroups
    sections: TensorGroups


@dataclass(frozen=True)
class RoundEnd:
    """Result of a client's round, float32.

    Attributes:
        state: State that the client keeps if the server counts its update, by group and tensor.
        sections: Changes that are sent beside the update, by section and tensor.
    """

    state: TensorGroups = field(default_factory=dict)
    sections: TensorGroups = field(default_factory=dict)


class LocalAlgorithm:
    """One rule of local training; one object serves one client's round.

    Tensors that stay at the client, or are frozen in the round, are none of its business.
    """

    Options: ClassVar[type[_Options]] = AlgorithmOptions
    groups: ClassVar[tuple[str, ...]] = ()
    """Groups of state that a client keeps from round to round, each with a value for every value that is sent."""
    needs_one_version: ClassVar[bool] = False
    """True if the clients of a round must all start from the same version."""

    def __init__(self, options: _Options) -> None:
        self.options = options

    def sections(self) -> tuple[Section, ...]:
        """Returns the sections that come with a version and, as changes, go with an update."""
        return ()

    @property
    def population(self) -> int | None:
        """Clients of the whole federation, sampled or not, as its formula has them; None if it has no such number."""
        return None

    def misfit(self, config: RunConfig, spec: AdapterSpec) -> Fault | None:
        """Returns a field of a run with which the algorithm cannot work, and why; None if there is none."""
        return None

    def start(self, start: RoundStart) -> None:
        """Takes the beginning of the round."""

    def after_gradient(self) -> None:
        """Changes the gradients, `parameter.grad`, of a whole batch in place; they are unscaled, also in float16."""

    def finish(self, steps: int) -> RoundEnd:
        """Returns what remains after so many optimizer steps; the parameters are trained now."""
        return RoundEnd()


algorithms: Registry[type[LocalAlgorithm]] = Registry("fedpeft.algorithms", "fedpeft.algorithms", "local algorithm")


def algorithm(config: AlgorithmConfig | None) -> LocalAlgorithm:
    """Builds an algorithm as `[training.algorithm]` says; None is plain.

    Raises:
        ConfigInvalid: If there is no such algorithm.
        pydantic.ValidationError: If an option is unknown or out of range.
    """
    cls = algorithms.get(config.name if config else PLAIN)
    return cls(cls.Options.model_validate(dict(config.options) if config else {}))
