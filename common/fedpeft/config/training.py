"""Section `[training]` of the run file, and its table `[training.algorithm]`."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from fedpeft.config.section import OptionedSection, Section, check_options, known_in, refuse_unused

DEFAULT_EPOCHS = 1
"""Passes over the local data where neither epochs nor steps is given."""
DEFAULT_FINAL_FACTOR = 0.01
"""`final_factor` where it is not given."""
DEFAULT_DROPS = 2
"""`schedule_drops` where it is not given."""
PLAIN = "plain"
"""The local algorithm where none is given."""


class AlgorithmConfig(OptionedSection):
    """`[training.algorithm]`: the rule that local training follows; its options stand beside `name`."""

    name: Annotated[str, known_in("fedpeft.algorithms")] = PLAIN
    """plain, fedprox, scaffold, feddyn..."""

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
    """Constant within a round; `schedule` and `warmup_rounds` change it from round to round."""
    schedule: Literal["constant", "linear", "cosine", "step"] | None = None
    """The learning rate over the rounds: constant if absent; the others fall from `learning_rate` to `final_factor` of
    it in the last round, evenly, along half a cosine, or in `schedule_drops` steps."""
    warmup_rounds: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """First rounds, over which the rate rises evenly; the round after them has `learning_rate`."""
    final_factor: Annotated[float, Field(ge=1e-6, le=1)] | None = None
    """The last round's share of `learning_rate`; 0.01 if absent."""
    schedule_drops: Annotated[int, Field(ge=1, le=1000)] | None = None
    """Number of drops of schedule step, evenly spaced, each by the same factor; 2 if absent."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """SGD's momentum."""
    weight_decay: Annotated[float, Field(ge=0, le=10)] = 1e-4
    """L2 for SGD, decoupled for AdamW."""
    clip_gradient_norm: Annotated[float, Field(gt=0, le=1e30)] | None = None
    """Largest Euclidean norm of a step's gradient of the loss, over all trained tensors; no bound if absent. What the
    local algorithm adds to the gradient comes on top."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto is bfloat16 where a GPU has it, else float32."""
    augmentation: Literal["none", "flip", "crop"] = "flip"
    """flip: horizontal; crop: random crop with padding 4 (at 32 px, scaled) and flip, the paper's CIFAR-100 setting."""
    keep_features: bool = False
    """Computes what the model makes of each example before the first tuned tensor once and keeps it: for methods that
    tune the end of a model (head, partial), with augmentation none."""
    algorithm: AlgorithmConfig | None = None
    """The table `[training.algorithm]`: a rule beside the loss, such as FedProx; plain if absent."""

    @field_validator("keep_features")
    @classmethod
    def _features_stay(cls, keep: bool, others: ValidationInfo) -> bool:
        if keep and others.data.get("augmentation", "none") != "none":
            text = f'is true, and augmentation "{others.data["augmentation"]}" changes the images in each pass'
            raise ValueError(f'{text}; leave it out, or set augmentation = "none"')
        return keep

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("give epochs or steps, not both")
        return self

    @model_validator(mode="after")
    def _unused(self, info: ValidationInfo) -> Self:
        if self.optimizer == "adamw":
            refuse_unused(self, info, ["momentum"], "adamw takes none; leave it out")
        return self

    @model_validator(mode="after")
    def _schedule_has_its_settings(self) -> Self:
        name = self.schedule or "constant"
        if self.final_factor is not None and name == "constant":
            raise ValueError('final_factor is not a setting of schedule = "constant", whose rate does not fall')
        if self.schedule_drops is not None and name != "step":
            raise ValueError(f'schedule_drops is not a setting of schedule = "{name}"; only "step" has drops')
        return self
