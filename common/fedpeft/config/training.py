"""Section `[training]` of the run file, and its table `[training.algorithm]`."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from fedpeft.config.section import OptionedSection, Section, check_options, known_in

DEFAULT_EPOCHS = 1
"""Passes over the local data where neither epochs nor steps is given."""
PLAIN = "plain"
"""The local algorithm where none is given."""


class AlgorithmConfig(OptionedSection):
    """`[training.algorithm]`: the rule that local training follows; its options stand beside `name`."""

    name: Annotated[str, known_in("fedpeft.algorithms")] = PLAIN
    """plain, fedprox, scaffold..."""

    @model_validator(mode="after")
    def _options_fit(self) -> Self:
        check_options("fedpeft.algorithms", self.name, self.options)
        return self


class TrainingConfig(Section):
    """`[training]`: what a client does with its data in a round."""

    epochs: Annotated[int, Field(ge=1, le=100_000)] | None = None
    """Passes over the local data; 1 if neither epochs nor steps is given."""
    steps: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    """Optimizer steps instead of epochs."""
    batch_size: Annotated[int, Field(ge=1, le=65_536)] = 64
    """Examples in an optimizer step."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """sgd is Nesterov SGD, as in the paper."""
    learning_rate: Annotated[float, Field(gt=0, le=100)] = 0.01
    """Constant within a round."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """SGD's momentum."""
    weight_decay: Annotated[float, Field(ge=0, le=10)] = 1e-4
    """L2 for SGD, decoupled for AdamW."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto is bfloat16 where a GPU has it, else float32."""
    augmentation: Literal["none", "flip", "crop"] = "flip"
    """flip: horizontal; crop: random crop with padding 4 (at 32 px, scaled) and flip, the paper's CIFAR-100 setting."""
    algorithm: AlgorithmConfig | None = None
    """The table `[training.algorithm]`: a rule beside the loss, such as FedProx; plain if absent."""

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("give epochs or steps, not both")
        return self
