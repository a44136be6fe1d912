"""Squared distances that the tensors of a run travelled: what Theorem 1 of the FedPEFT paper (2210.01708) bounds by.

    P = (beta / 2) (||theta(T) - theta(0)||^2 + ||delta(T) - delta(0)||^2)

theta is the pre-trained part, delta what was added to it. A method that tunes a part of theta, as bias tuning does,
moves that part alone; full fine-tuning moves all of it.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fedpeft.adapters.payload import Tensors
from fedpeft.models.checkpoints import inside
from fedpeft.peft import TunedModel


def squared_distances(model: TunedModel, first: Tensors, last: Tensors) -> dict[str, float]:
    """Returns the squared Euclidean distances between two versions of a model's adapter, in float64.

    Args:
        model: The model; tensors that the versions lack, as those that stay at clients, are left out.
        first: Tensors of the earlier version by name.
        last: Of the later one.

    Returns:
        `backbone`: of tensors that the pre-trained model has; `head`: of the head; `added`: of what the method added.
    """
    own: Mapping[str, object] = model.backbone.module.state_dict(keep_vars=True)
    found = {"backbone": 0.0, "head": 0.0, "added": 0.0}
    for tensor in model.spec.shared:
        name = tensor.name
        part = "head" if inside(name, model.backbone.structure.head) else "backbone" if name in own else "added"
        found[part] += float(np.square(last[name].astype(np.float64) - first[name]).sum())
    return found
