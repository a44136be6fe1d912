"""Learning rates over the rounds of a run: the rate of a round is a function of the run file and its number. Pure.

With R rounds, of which the first W are warm-up, round r has the run's rate times

    r / (W + 1)                        r <= W; else, with p = (r - W - 1) / (R - W - 1)
    1                                  constant
    1 - (1 - f) p                      linear
    f + (1 - f) (1 + cos(pi p)) / 2    cosine (1608.03983, equation 5, one cycle)
    f^(j / K)                          step, j = floor((r - W - 1) (K + 1) / (R - W))

f is `final_factor`, K `schedule_drops`. All steps of a round have its rate, so FedNova's sums of gradient factors,
which are in learning rates, do not change; SCAFFOLD divides by the rate of the round. A server, or a simulation, works
the rate out and gives it to the clients, so that all of them have the same bits of it.
"""

from __future__ import annotations

import math

from fedpeft.config import DEFAULT_DROPS, DEFAULT_FINAL_FACTOR, RunConfig, TrainingConfig


def training_of(config: RunConfig, number: int) -> TrainingConfig:
    """Returns `[training]` of round `number` (1, 2, ...): with the rate of that round, and no schedule."""
    training = config.training
    if training.schedule is None and training.warmup_rounds is None:
        return training
    unscheduled = {"schedule": None, "warmup_rounds": None, "final_factor": None, "schedule_drops": None}
    rate = training.learning_rate * factor(training, number, config.rounds.count)
    return training.model_copy(update={"learning_rate": rate, **unscheduled})


def factor(training: TrainingConfig, number: int, count: int) -> float:
    """Returns the rate of round `number` of `count`, in rates of the run; above 0, at most 1."""
    warmup = training.warmup_rounds or 0
    if number <= warmup:
        return number / (warmup + 1)
    done, rounds = min(number, count) - warmup - 1, count - warmup
    final = DEFAULT_FINAL_FACTOR if training.final_factor is None else training.final_factor
    part = done / max(rounds - 1, 1)
    match training.schedule:
        case "linear":
            return 1 - (1 - final) * part
        case "cosine":
            return final + (1 - final) * (1 + math.cos(math.pi * part)) / 2
        case "step":
            drops = training.schedule_drops or DEFAULT_DROPS
            return math.pow(final, done * (drops + 1) // rounds / drops)
        case _:
            return 1.0
