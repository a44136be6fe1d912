"""The words in which options of commands name experiment trackers."""

from __future__ import annotations

NAMES = (
    "A tracker that gets every round: tensorboard[=DIR], mlflow[=URI], wandb[=PROJECT], trackio[=PROJECT], or an "
    "installed one."
)
