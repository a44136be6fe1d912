"""Section `[simulation]` of the run file."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, ValidationInfo, model_validator

from fedpeft.config.section import Section, refuse_unused
from fedpeft.config_errors import fault_at
from fedpeft.partition_schemes import OPTIONS, Scheme, Variant, variant_fault

DIVISION = frozenset({"clients", "partition", "alpha", "variant", "shards", "column", "examples"})
"""Fields of `[simulation]` that divide the data, and say nothing of the clients' work on it."""


class SimulationConfig(Section):
    """`[simulation]`: ignored by a daemon."""

    clients: Annotated[int, Field(ge=1, le=1_000_000)] = 8
    """Simulated clients among which the data is partitioned."""
    partition: Scheme = "iid"
    """Scheme of the division; with `column` given, natural."""
    alpha: Annotated[float, Field(gt=0)] = 0.1
    """Concentration for dirichlet and quantity: smaller is more skewed."""
    variant: Variant | None = None
    """Variant of the scheme: class-first, balanced or client-first for dirichlet (the first if absent); dirichlet or
    lognormal sizes for quantity (likewise)."""
    shards: Annotated[int, Field(ge=1, le=1000)] = 2
    """Shards of each client, for shards: runs of examples in the order of their labels."""
    examples: Annotated[int, Field(ge=1)] | None = None
    """Examples that are drawn from the data, by the run's seed, before they are divided; all of them if absent."""
    held_out: Annotated[int, Field(ge=1)] | None = None
    """Held-out examples on which versions are scored, the same for every seed; all of them if absent."""
    column: str | None = None
    """The column whose values are the clients, for natural."""
    image_column: str | None = None
    """Column of parquet that holds the images; image or img if absent."""
    label_column: str | None = None
    """Column of parquet that holds the labels; label or labels if absent."""
    max_image_pixels: Annotated[int, Field(ge=1)] | None = None
    """Pixels of the largest image that is opened; Pillow's limit, 178,956,970, if absent."""
    ranks: Annotated[tuple[Annotated[int, Field(ge=1, le=4096)], ...], Field(strict=False, min_length=1)] | None = None
    """Ranks of LoRA factors that simulated clients bear, in turn by name; the run's where absent, or larger."""
    engine: Annotated[str, Field(min_length=1, max_length=64)] = "inprocess"
    """Registered name of the engine of the simulated clients: inprocess (one after the other), processes (several),
    batched (many in one pass), ray (workers on a Ray cluster)."""
    workers: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Worker processes of the engines processes and ray, as many as there are cores for torch's threads if absent (with
    ray on GPUs, one a GPU at most); clients in a pass of the engine batched, 16 if absent."""

    @model_validator(mode="after")
    def _one_scheme(self) -> Self:
        if fault := variant_fault(self.scheme, self.variant):
            raise fault_at("variant", f"partition {fault}")
        if self.partition == "natural" and self.column is None:
            raise fault_at("column", "partition natural needs it: the column whose values are the clients")
        if self.column is not None and "partition" in self.model_fields_set and self.partition != "natural":
            raise fault_at("column", f"is for partition natural, not {self.partition}")
        return self

    @model_validator(mode="after")
    def _unused(self, info: ValidationInfo) -> Self:
        taken = OPTIONS[self.scheme]
        unused = [option for option in ("alpha", "shards") if option not in taken]
        refuse_unused(self, info, unused, f"partition {self.scheme} takes none; leave it out")
        if self.engine == "inprocess":
            text = 'engine inprocess has none; leave it out, or give engine = "processes"'
            refuse_unused(self, info, ["workers"], text)
        return self

    @property
    def divides(self) -> bool:
        """True if some field says how one data set is divided."""
        return not DIVISION.isdisjoint(self.model_fields_set)

    @property
    def scheme(self) -> Scheme:
        """The partition that is meant."""
        return self.partition if self.column is None else "natural"
