"""The privacy budget of a client that adds the noise itself, to updates or to steps; part of the client's state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fedpeft.adapters.updates import Arrays
from fedpeft.config import CodecConfig, PrivacyConfig, RunConfig, TrainingConfig
from fedpeft.errors import BudgetExhausted, TrainingFailed
from fedpeft.privacy.accounting import beyond, local_epsilon, locally_overspent
from fedpeft.privacy.example_level import Steps, example_epsilon, example_noise, no_protection
from fedpeft.privacy.statement import EPSILON
from fedpeft.rounds.groups import SENT
from fedpeft.rounds.local_job import LocalJob
from fedpeft.rounds.screening import local_steps
from fedpeft.training.example_gradients import ExampleNoise

NOISE = "privacy_noise_multiplier"
"""Figure of an update: the noise of its client's steps, which may be of its own."""
_OF_NO_DATA = ("seconds", "images_per_second", "steps", "micro_batch", "threads", "gpu_memory_bytes")
"""Figures that are sent beside an update with noise: those of the machine."""
_OF_BATCHES = ("images_per_second", "micro_batch", "gpu_memory_bytes")
"""Those of them that depend on how many examples were drawn."""
_FIXED = ("batch_size", "precision")
"""Settings of training that noise in every step, and its budget, depend on."""
TERMS = "terms"
"""Name in the state of the terms under which a budget was spent: noise, batch size (or 0), delta, target (or 0)."""
_EXACT = 2**24
"""Largest count of steps that float32, in which state is kept, holds exactly."""


@dataclass(frozen=True)
class LocalBudget:
    """The budget of a client after one more update; of a run without such noise it changes nothing.

    Attributes:
        codec: Encoding of the update. Where all of the update has noise, without a residual: it would hold the noise,
            and go up with the next update.
        state: The client's state after the update, whatever becomes of it: it may have left the site.
        epsilon: Spent then; None without noise.
        noise: Bound and noise that hide each example in training; None without.
    """

    codec: CodecConfig
    state: Mapping[str, Arrays]
    epsilon: float | None
    noise: ExampleNoise | None = None

    @classmethod
    def of(cls, config: RunConfig, job: LocalJob, examples: int) -> LocalBudget:
        """Returns the budget after the update of a job, of a client with so many examples.

        Raises:
            BudgetExhausted: If that would spend more than the client may.
            TrainingFailed: If delta protects none of its examples, or the settings are others than before.
        """
        privacy = config.privacy
        if privacy is None or not privacy.is_of_clients:
            return cls(config.codec, {}, None)
        if privacy.mechanism == "example":
            return cls._of_examples(config, privacy, job, examples)
        terms = _terms(job, privacy, privacy.noise_multiplier or 0.0)
        sent = int(job.state.get(SENT, {}).get("updates", np.zeros(1, np.float32))[0])
        if why := locally_overspent(config, sent):
            raise BudgetExhausted(why)
        spent = local_epsilon(privacy.noise_multiplier or 0.0, sent + 1, privacy.delta or 0.0)
        state = {SENT: {"updates": np.array([sent + 1], np.float32), TERMS: terms}}
        return cls(config.codec.model_copy(update={"error_feedback": False}), state, spent)

    @classmethod
    def _of_examples(cls, config: RunConfig, privacy: PrivacyConfig, job: LocalJob, examples: int) -> LocalBudget:
        _check_settings(config, job)
        if why := no_protection(privacy, examples):
            raise TrainingFailed(why)
        ledger = _with(_ledger(job), Steps(examples, _steps(job.settings, examples)))
        first = ledger[0].examples  # noise of a client's own stays what it was when its data grow
        z = example_noise(config, first, _steps(config.training, first))
        terms = _terms(job, privacy, z, float(job.settings.batch_size))
        spent = example_epsilon(z, job.settings.batch_size, ledger, privacy.delta or 0.0)
        if why := beyond(privacy, spent, f"round {job.round} of this client"):
            raise BudgetExhausted(why)
        state = {
            "examples": np.array([steps.examples for steps in ledger], np.float32),
            "steps": np.array([steps.count for steps in ledger], np.float32),
            TERMS: terms,
        }
        return cls(config.codec, {SENT: state}, spent, ExampleNoise(privacy.clip_norm or 0.0, z))

    def figures(self, measured: Mapping[str, float]) -> dict[str, float]:
        """Returns the figures that may be sent: with noise only those that say nothing of the data, and epsilon."""
        if self.epsilon is None:
            return dict(measured)
        kept = {name: measured[name] for name in _OF_NO_DATA if name in measured} | {EPSILON: self.epsilon}
        if self.noise is None:
            return kept
        without = {name: value for name, value in kept.items() if name not in _OF_BATCHES}
        return without | {NOISE: self.noise.noise_multiplier}


def _check_settings(config: RunConfig, job: LocalJob) -> None:
    """Checks what a ticket may not change: past steps are accounted for at the run's batch size.

    Raises:
        TrainingFailed: If the job's settings are others than the run's.
    """
    for key in _FIXED:
        asked, given = getattr(job.settings, key), getattr(config.training, key)
        if asked != given:
            raise TrainingFailed(
                f"round {job.round} asks for training.{key} = {asked!r}, and the run has {given!r}; with "
                'privacy.mechanism "example" it must be the same in all rounds: the budget is worked out for it'
            )


def _terms(job: LocalJob, privacy: PrivacyConfig, noise: float, batch_size: float = 0.0) -> NDArray[np.float32]:
    """Returns the terms of a budget, float32[4]; the past is accounted for under them, so they stay.

    Raises:
        TrainingFailed: If the client has spent some of its budget under others.
    """
    terms = np.array([noise, batch_size, privacy.delta or 0.0, privacy.target_epsilon or 0.0], np.float32)
    kept = job.state.get(SENT, {}).get(TERMS)
    if kept is not None and not np.array_equal(kept, terms):
        names = ("noise", "batch size", "delta", "target")
        changed = ", ".join(f"{n} {a:g}, then {b:g}" for n, a, b in zip(names, kept, terms, strict=True) if a != b)
        raise TrainingFailed(
            f"this client has spent privacy budget in this run under other settings ({changed}); a run keeps its "
            "[privacy], rounds and batch size: ask the operator for a new run"
        )
    return terms


def _steps(settings: TrainingConfig, examples: int) -> int:
    return int(local_steps(examples, settings))


def _ledger(job: LocalJob) -> list[Steps]:
    """Returns the steps that a client has made, by the size that its data had."""
    held = job.state.get(SENT, {})
    if not held:
        return []
    return [Steps(int(n), int(count)) for n, count in zip(held["examples"], held["steps"], strict=True)]


def _with(ledger: list[Steps], more: Steps) -> list[Steps]:
    if ledger and ledger[-1].examples == more.examples and ledger[-1].count + more.count <= _EXACT:
        return [*ledger[:-1], replace(more, count=ledger[-1].count + more.count)]
    return [*ledger, more]
