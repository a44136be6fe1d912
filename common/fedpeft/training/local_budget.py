"""The privacy budget of a client that adds the noise to its updates itself; it is part of the client's state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fedpeft.adapters.updates import Arrays
from fedpeft.config import CodecConfig, RunConfig
from fedpeft.errors import TrainingFailed
from fedpeft.privacy.accounting import local_epsilon, locally_overspent
from fedpeft.privacy.statement import EPSILON
from fedpeft.rounds.groups import SENT
from fedpeft.rounds.local_job import LocalJob

_OF_NO_DATA = ("seconds", "images_per_second", "steps", "micro_batch", "threads", "gpu_memory_bytes")
"""Figures that are sent beside an update with noise: those of the machine."""


@dataclass(frozen=True)
class LocalBudget:
    """The budget of a client after one more update; of a run without such noise it changes nothing.

    Attributes:
        codec: Encoding of the update. Without a residual: it would hold the noise, and go up with the next update.
        state: The client's state after the update, whatever becomes of it: it may have left the site.
        epsilon: Spent then; None without noise.
    """

    codec: CodecConfig
    state: Mapping[str, Arrays]
    epsilon: float | None

    @classmethod
    def of(cls, config: RunConfig, job: LocalJob) -> LocalBudget:
        """Returns the budget after the update of a job.

        Raises:
            TrainingFailed: If that would spend more than the client may.
        """
        privacy = config.privacy
        if privacy is None or privacy.mechanism != "local":
            return cls(config.codec, {}, None)
        sent = int(job.state.get(SENT, {}).get("updates", np.zeros(1, np.float32))[0])
        if why := locally_overspent(config, sent):
            raise TrainingFailed(why)
        spent = local_epsilon(privacy.noise_multiplier or 0.0, sent + 1, privacy.delta or 0.0)
        state = {SENT: {"updates": np.array([sent + 1], np.float32)}}
        return cls(config.codec.model_copy(update={"error_feedback": False}), state, spent)

    def figures(self, measured: Mapping[str, float]) -> dict[str, float]:
        """Returns the figures that may be sent: with noise only those that say nothing of the data, and epsilon."""
        if self.epsilon is None:
            return dict(measured)
        return {name: measured[name] for name in _OF_NO_DATA if name in measured} | {EPSILON: self.epsilon}
