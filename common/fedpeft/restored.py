"""A run's model, put together again from what the server keeps of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fedpeft.errors import BackboneMismatch
from fedpeft.wire import config_from_proto

if TYPE_CHECKING:
    from fedpeft.peft import TunedModel
    from fedpeft.v1 import run_pb2


def restored(run: run_pb2.Run, adapter: Path, weights: Path | None = None) -> TunedModel:
    """Returns a run's model with an adapter version, its backbone proved equal; imports torch, and takes seconds.

    Args:
        run: The run.
        adapter: The version's safetensors file.
        weights: A weights file, or a folder of them, that stands here for the one the run names.

    Raises:
        BackboneMismatch: If the weights here are not those that the run was made with.
        ModelInvalid: If the model or its weights cannot be had.
    """
    from safetensors.numpy import load_file

    from fedpeft.models import build, fingerprint
    from fedpeft.peft import tune

    config = config_from_proto(run.config)
    backbone = build(config.model, config.rounds.seed, weights)
    tuned = tune(backbone, config.peft.method, config.peft.options, config.rounds.seed)
    found = fingerprint(backbone, tuned.spec)
    if found != run.backbone_fingerprint:
        raise BackboneMismatch(
            f"the backbone here has fingerprint {found[:16]}, the run was made with {run.backbone_fingerprint[:16]}; "
            "name the right weights file with --weights"
        )
    tuned.load(load_file(adapter))
    return tuned
