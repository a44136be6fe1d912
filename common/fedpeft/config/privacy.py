"""Section `[privacy]` of the run file."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from fedpeft.config.section import Section

Mechanism = Literal["central", "local", "example"]
"""Values of `privacy.mechanism`."""
DEFAULT_QUANTILE_RATE = 0.2
"""`quantile_rate` where it is not given, as in arXiv 1905.03871."""
MOST_NOISE = 10_000.0
"""Largest `noise_multiplier`."""
_OF_NOISE = ("noise_multiplier", "target_epsilon", "delta", "quantile", "quantile_noise", "quantile_rate")
_OF_QUANTILE = ("quantile_noise", "quantile_rate")


class PrivacyConfig(Section):
    """`[privacy]`: bounds on what one client can contribute, and noise that hides it; none if absent."""

    clip_norm: Annotated[float, Field(gt=0, le=1e9)] | None = None
    """Largest Euclidean norm of an update over all its tensors: the client scales it down, the server refuses more.
    With mechanism example that of the gradient of one example."""
    mechanism: Mechanism | None = None
    """central: the server adds Gaussian noise to the sum of each round; local: each client adds it to its update;
    example: each client adds it to every step of its training, which hides single examples. With the last two it keeps
    its own budget. No noise if absent. See docs/privacy.md."""
    noise_multiplier: Annotated[float, Field(ge=0.01, le=MOST_NOISE)] | None = None
    """Standard deviation of the noise, in `clip_norm`s; if absent the least that keeps `target_epsilon` in all rounds,
    with example worked out by each client for the number of its examples."""
    target_epsilon: Annotated[float, Field(ge=0.001, le=1000)] | None = None
    """Most epsilon that may be spent: before a round that would spend more the run is paused, or with local and example
    the client trains no more; no limit if absent."""
    delta: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Delta of the guarantee; needed with a mechanism, and below 1 by the number of clients, or with example by that of
    a client's examples."""
    quantile: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the updates that the bound should leave as they are: it adapts, from `clip_norm` on, and the server
    scales; if absent `clip_norm` stays."""
    quantile_noise: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """Standard deviation of the noise of the count of those updates, in updates; if absent a twentieth of
    `rounds.clients`, or `noise_multiplier` if that is larger."""
    quantile_rate: Annotated[float, Field(gt=0, le=10)] | None = None
    """Speed at which the bound adapts; 0.2 if absent."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        given = [key for key in _OF_NOISE if getattr(self, key) is not None]
        if self.mechanism is None and set(given) & {"quantile", *_OF_QUANTILE}:
            raise ValueError(f'{given[0]} needs mechanism = "central"')
        if self.mechanism is None and given:
            raise ValueError(f'{given[0]} needs mechanism = "central", "local" or "example"')
        if self.mechanism is not None:
            for key in ("clip_norm", "delta"):
                if getattr(self, key) is None:
                    raise ValueError(f'mechanism = "{self.mechanism}" needs {key}')
            if self.noise_multiplier is None and self.target_epsilon is None:
                raise ValueError(f'mechanism = "{self.mechanism}" needs noise_multiplier or target_epsilon')
        if self.is_of_clients and self.quantile is not None:
            raise ValueError('quantile needs mechanism = "central": nobody counts what each client hides')
        without = [key for key in _OF_QUANTILE if getattr(self, key) is not None]
        if self.quantile is None and without:
            raise ValueError(f"{without[0]} needs quantile")
        return self

    @property
    def is_of_clients(self) -> bool:
        """True if each client adds the noise and keeps its own budget."""
        return self.mechanism in ("local", "example")

    @property
    def scaled_by_client(self) -> float | None:
        """The bound of updates that clients keep; None without one, or if the server scales by one that adapts."""
        return None if self.mechanism == "example" or self.quantile is not None else self.clip_norm
