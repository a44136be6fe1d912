"""Section `[aggregation]` of the run file."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, field_validator, model_validator

from fedpeft.config.section import OptionedSection, check_options, known_in


class AggregationConfig(OptionedSection):
    """`[aggregation]`: how updates are folded; options of the strategy stand beside it."""

    strategy: Annotated[str, known_in("fedpeft.aggregation")] = "fedavg"
    """fedavg, fedavgm, fedadam, fedyogi, fedadagrad, fednova, fedexp, feddyn, fedbuff, median, lora_fair..."""
    norm_factor: Annotated[float, Field(ge=0, le=1e9)] | None = None
    """An update is folded up to so many times the median norm of its round and those before; 30 if absent, 0: any."""

    exact_sum: bool | None = None
    """True: updates are added up exactly, whatever their order and grouping, and may be sums of several, as edges of a
    hierarchy send them; if absent they are added in float64 in the order of client ids."""

    @field_validator("norm_factor")
    @classmethod
    def _above_the_median(cls, factor: float | None) -> float | None:
        if factor is not None and 0 < factor < 1:
            raise ValueError("must be at least 1, or 0 for no limit")
        return factor

    @model_validator(mode="after")
    def _options_fit(self) -> Self:
        check_options("fedpeft.aggregation", self.strategy, self.options)
        return self
