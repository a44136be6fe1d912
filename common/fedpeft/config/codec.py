"""Section `[codec]` of the run file."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from fedpeft.config.section import Section, refuse_unused, registered
from fedpeft.config_errors import fault_at
from fedpeft.registry import registry_of


class CodecConfig(Section):
    """`[codec]`: how tensors travel."""

    up: str = "float32"
    """float32, float16, bfloat16, int8, sparse; uniform2, uniform4, uniform8: rounded at random to 2, 4 or 8 bits;
    eden1 to eden4: rotated, then 1 to 4 bits; or a codec that is installed beside fedpeft."""
    down: str = "float32"
    """Encoding of adapter versions on their way to clients: as `up`, but not sparse, uniform or eden."""
    density: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Share of values kept by sparse: the largest by magnitude over the whole update."""
    values: str = "float32"
    """Encoding of the values that sparse keeps: float32, float16, bfloat16 or int8."""
    error_feedback: bool = True
    """Adds what was not sent, or not counted, to the client's next update; must be false with uniform2."""

    @field_validator("up")
    @classmethod
    def _of_updates(cls, name: str) -> str:
        # The registry knows sparse with the encoding of its values; a run file names that beside it.
        registry = registry_of("fedpeft.codecs")
        if name not in {each.partition("+")[0] for each in registry.names()} or (
            name in registry and registry.get(name).is_sum
        ):
            known = sorted({each.partition("+")[0] for each in registry.names() if not registry.get(each).is_sum})
            raise ValueError(f"there is no encoding {name!r}; there are: {', '.join(known)}")
        return name

    @field_validator("down")
    @classmethod
    def _whole(cls, name: str) -> str:
        registry = registry_of("fedpeft.codecs")
        if any(each.startswith(f"{name}+") for each in registry.names()) or (
            registry.get(registered("fedpeft.codecs", name)).is_sparse
        ):
            raise ValueError(f"{name!r} is sparse, and a version has all of its values")
        if registry.get(name).is_sum:
            raise ValueError(f"{name!r} is of sums of updates, and not of versions")
        if registry.get(name).is_random:
            raise ValueError(f"{name!r} rounds at random, and all copies of a version have the same bytes")
        return name

    @field_validator("values")
    @classmethod
    def _of_sparse(cls, name: str) -> str:
        known = sorted({each.partition("+")[2] for each in registry_of("fedpeft.codecs").names()} - {""})
        if name not in known:
            raise ValueError(f"there is no encoding {name!r} of kept values; there are: {', '.join(known)}")
        return name

    @model_validator(mode="after")
    def _composes(self) -> Self:
        registered("fedpeft.codecs", self.encoding)
        if self.error_feedback and not registry_of("fedpeft.codecs").get(self.encoding).contracts:
            text = f"must be false with {self.encoding}: its error can be larger than the update, and would add up"
            raise fault_at("error_feedback", text)
        return self

    @model_validator(mode="after")
    def _unused(self, info: ValidationInfo) -> Self:
        text = f'{self.up} takes none; leave it out, or give up = "sparse"'
        if not registry_of("fedpeft.codecs").get(self.encoding).is_sparse:
            refuse_unused(self, info, ["density"], text)
        if self.encoding == self.up:
            refuse_unused(self, info, ["values"], text)
        return self

    @property
    def encoding(self) -> str:
        """The registered codec of updates: `up`, or with `values` behind it where such a one is (`sparse+float32`)."""
        composed = f"{self.up}+{self.values}"
        return composed if composed in registry_of("fedpeft.codecs") else self.up
