"""A run's model, put together again from what is kept of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from fedpeft.errors import BackboneMismatch

if TYPE_CHECKING:
    from fedpeft.config import RunConfig
    from fedpeft.peft import TunedModel

log = structlog.get_logger(__name__)


def restored(
    config: RunConfig, fingerprint: str, adapter: Path, weights: Path | None = None, sha256: str | None = None
) -> TunedModel:
    """Returns a run's model with an adapter version, its backbone proved equal; imports torch, and takes seconds.

    Tensors that stay at clients keep their initial values, which is logged.

    Args:
        config: The run's.
        fingerprint: Of the run's backbone, hexadecimal.
        adapter: The version's safetensors file.
        weights: A weights file, or a folder of them, that stands here for the one the run names.
        sha256: Digest that the adapter file must have, hexadecimal; None: any.

    Raises:
        BlobCorrupt: If the adapter file has another digest.
        BackboneMismatch: If the weights here are not those that the run was made with.
        ModelInvalid: If the model or its weights cannot be had, or the adapter file is not one.
    """
    from fedpeft.adapters.adapter_file import open_adapter
    from fedpeft.models import backbones
    from fedpeft.peft import tune

    backbone = backbones.build(config.model, config.rounds.seed, weights)
    tuned = tune(backbone, config.peft.method, config.peft.options, config.rounds.seed)
    found = backbones.fingerprint(backbone, tuned.spec)
    if found != fingerprint:
        raise BackboneMismatch(
            f"the backbone here has fingerprint {found[:16]}, the run was made with {fingerprint[:16]}; "
            "name the right weights file with --weights"
        )
    with open_adapter(adapter, sha256) as tensors:
        tuned.load(tensors.adapter())
    if kept := [tensor.name for tensor in tuned.spec.tensors if tensor not in tuned.spec.shared]:
        log.warning(
            "tensors that stay at clients are as they began: this is the model of none of them",
            tensors=len(kept),
            first=kept[0],
        )
    return tuned
