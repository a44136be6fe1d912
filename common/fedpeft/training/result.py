"""Result of a client's training in one round."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from fedpeft.adapters.sections import Groups
from fedpeft.adapters.spec import AdapterSpec, TensorRole
from fedpeft.errors import TrainingFailed
from fedpeft.formatting import counted

Arrays = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class TrainingResult:
    """Result of a client's round.

    Attributes:
        delta: Trained minus start of every tensor sent in this round, float32.
        local: New values of every tensor that stays here in this round, float32.
        examples: Examples of the data set that could be read: the weight of the update.
        metrics: loss (mean over the last pass), loss_first, loss_last (of single steps), seconds, images_per_second,
            steps, skipped_images, micro_batch (examples that went through the model at once), threads.
        facts: torch's version, device and precision.
        state: State kept for the local algorithm if the update counts, by group and tensor, float32.
        sections: Changes of the run's other sections than the adapter, by section and member.
    """

    delta: Arrays
    local: Arrays
    examples: int
    metrics: dict[str, float]
    facts: dict[str, str]
    state: Groups = field(default_factory=dict)
    sections: Groups = field(default_factory=dict)


def result_of(
    spec: AdapterSpec,
    start: Arrays,
    trained: Arrays,
    number: int,
    examples: int,
    metrics: dict[str, float],
    facts: dict[str, str],
) -> TrainingResult:
    """Returns what training changed in round `number`.

    Args:
        spec: The tuned tensors.
        start: Their values before.
        trained: Their values after.
        number: The round (1, 2, ...): it chooses each tensor's role.
        examples: The weight of the update.
        metrics: `TrainingResult.metrics`, steps among them.
        facts: `TrainingResult.facts`.

    Raises:
        TrainingFailed: If a trained tensor is not finite.
    """
    delta, local = {}, {}
    for tensor in spec.tensors:
        role = tensor.role(number)
        if role.trains and not np.isfinite(trained[tensor.name]).all():
            raise TrainingFailed(
                f"tensor {tensor.name} is not finite after {counted(metrics['steps'], 'step')}; lower the learning rate"
            )
        if role is TensorRole.SENT:
            delta[tensor.name] = trained[tensor.name] - start[tensor.name]
        elif role is TensorRole.LOCAL:
            local[tensor.name] = trained[tensor.name]
    return TrainingResult(delta, local, examples, metrics, facts)


def facts_of(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Returns what a result depends on beside its inputs: torch's version, device and precision."""
    return {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "precision": str(dtype).removeprefix("torch."),
    }
