"""Transforms: steps of an update between training and its encoding, each with its counterpart at the server.

    client   change + residual -> transform -> ... -> encoding -> payload
    server   payload -> check of every transform -> fold -> event of every transform in the round's record

A transform sees all tensors of an update together, those of every section. The client runs them in order, then encodes;
the server, which sees only the result, refuses what cannot have passed.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fedpeft.config import RunConfig
from fedpeft.errors import PayloadInvalid
from fedpeft.privacy.events import Clipped, Event, LocallyNoised
from fedpeft.privacy.noise import GriddedNoise

Arrays = dict[str, NDArray[np.float32]]

_ROUNDING = 2.0**-20
"""Part of the bound by which an update is clipped further, for scaling rounds to float32."""


class Transform(ABC):
    """One step."""

    field: ClassVar[str]
    """The field of a run file that asks for it."""

    @abstractmethod
    def apply(self, tensors: Arrays, slack: float) -> tuple[Arrays, dict[str, float]]:
        """Returns the tensors after the step, and figures of it for the update's metrics; changes no argument.

        Args:
            tensors: By name, float32, finite.
            slack: The part of a bound, 0 to 1, to stay below it, so that the rounding of the encoding does not lead
                beyond.
        """

    @abstractmethod
    def check(self, norm: float) -> None:
        """Checks an encoded update.

        Args:
            norm: Its Euclidean norm as decoded, by `fedpeft.adapters.payload.squared_norm`.

        Raises:
            PayloadInvalid: If it cannot have passed the step.
        """

    @abstractmethod
    def event(self, count: int) -> Event:
        """Returns the event of a round that folded `count` updates."""


class Clip(Transform):
    """Scales an update down to a norm: delta * min(1, C / ||delta||), arXiv 1710.06963.

    Args:
        bound: C, above 0.
    """

    field = "privacy.clip_norm"

    def __init__(self, bound: float) -> None:
        self._bound = bound

    def apply(self, tensors: Arrays, slack: float) -> tuple[Arrays, dict[str, float]]:
        """See `Transform.apply`; `clip_factor` is what the update was multiplied by, 1 if it was within the bound."""
        norm, most = euclidean(tensors), self._bound * (1 - slack)
        if norm <= most:
            return tensors, {"clip_factor": 1.0}
        factor = most / norm
        scaled = {name: (values.astype(np.float64) * factor).astype(np.float32) for name, values in tensors.items()}
        return scaled, {"clip_factor": factor}

    def check(self, norm: float) -> None:
        """See `Transform.check`."""
        if norm > self._bound:
            text = f"have a norm of {norm:.9g}; privacy.clip_norm of this run is {self._bound:g}"
            raise PayloadInvalid(f"the values of the update {text}: the client did not clip it", (("tensors", text),))

    def event(self, count: int) -> Event:
        """See `Transform.event`."""
        return Clipped(self._bound, count)


class LocalNoise(Transform):
    """Clips an update, then adds noise to every value: client-level local differential privacy.

    The server gets the sum and nothing that the noise does not hide, so neither the norm nor the factor of clipping is
    among the figures. What it does with the update is post-processing.

    Args:
        bound: C, above 0.
        noise_multiplier: Standard deviation of the noise in C; it is drawn anew whenever the step is applied.
    """

    field = "privacy.mechanism"

    def __init__(self, bound: float, noise_multiplier: float) -> None:
        self._bound = bound
        self._noise_multiplier = noise_multiplier

    def apply(self, tensors: Arrays, slack: float) -> tuple[Arrays, dict[str, float]]:
        """See `Transform.apply`; the noise has no bound that the encoding could break."""
        clipped, _ = Clip(self._bound).apply(tensors, _ROUNDING)
        size = sum(values.size for values in clipped.values())
        noise = GriddedNoise.of(self._bound, self._noise_multiplier, size)
        noised = {name: values.astype(np.float64) for name, values in clipped.items()}
        for values in noised.values():
            noise.add(values)
        return {name: values.astype(np.float32) for name, values in noised.items()}, {}

    def check(self, norm: float) -> None:
        """See `Transform.check`; any norm can have passed."""

    def event(self, count: int) -> Event:
        """See `Transform.event`."""
        return LocallyNoised(self._bound, self._noise_multiplier, count)


def transforms_of(config: RunConfig) -> tuple[Transform, ...]:
    """Returns the transforms of a run's updates, in the order in which a client applies them."""
    privacy = config.privacy
    bound = privacy.scaled_by_client if privacy else None
    if privacy is None or bound is None:
        return ()
    if privacy.mechanism == "local":
        return (LocalNoise(bound, privacy.noise_multiplier or math.inf),)
    return (Clip(bound),)


def euclidean(tensors: Mapping[str, NDArray[np.float32]]) -> float:
    """Returns the Euclidean norm over all tensors, in float64."""
    return float(np.sqrt(sum(float(np.square(values, dtype=np.float64).sum()) for values in tensors.values())))
