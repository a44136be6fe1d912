"""The worker of a site: its features are kept from one round to the next."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from google.protobuf import json_format

from fedpeft.adapters import payload
from fedpeft.config import parse_config
from fedpeft.data.reading import USUAL
from fedpeft.models.halves import _VitFront
from fedpeft.models.tasks import task_of
from fedpeft.rpc import wire
from fedpeft.training.devices import device_of
from fedpeft.training.local_round import load_run
from fedpeft.training.run_spec import version_0
from fedpeft.v1 import run_pb2
from fedpeft_client.owner.policy import Policy
from fedpeft_client.state.outbox import PAYLOAD
from fedpeft_client.worker.tasks import Message, SiteWorker

from ...data.test_sources import NAMES, table, write

MODEL = {"name": "vit_tiny_patch16_224", "weights": "none", "image_size": 32, "depth": 1, "classes": list(NAMES)}


def site(data: Path) -> SiteWorker:
    absent = dict.fromkeys(("label_map", "weights", "threads", "rank"))
    reading = {"image_column": USUAL.image_column, "label_column": USUAL.label_column}
    policy = Policy().model_dump()
    flags = {"checkpointing": False, "evaluate": False, "device": "cpu"}
    return SiteWorker({**absent, **flags, "client": "a", "data": str(data), "reading": reading, "policy": policy})


def request_of(folder: Path, *, keep: bool) -> Message:
    """Returns what the agent asks for the first ticket of a run of head tuning."""
    settings = {"batch_size": 8, "augmentation": "none", "epochs": 2, "keep_features": keep}
    config = parse_config({"model": MODEL, "peft": {"method": "head"}, "training": settings})
    loaded = load_run(config, task_of(""), None, device_of("cpu"))
    manifest, packed = payload.encode(version_0(loaded.spec, loaded.model), loaded.spec.shared, "float32")
    (folder / "version").write_bytes(packed)
    run = run_pb2.Run(
        id="r",
        config=wire.config_to_proto(config),
        spec=wire.spec_to_proto(loaded.spec),
        backbone_fingerprint=loaded.fingerprint,
    )
    return {
        "run": json_format.MessageToDict(run),
        "round": 1,
        "seed": 5,
        "settings": wire.training_data(wire.training_to_proto(config.training)),
        "adapter": {
            "payload": str(folder / "version"),
            "manifest": json_format.MessageToDict(wire.manifest_to_proto(manifest)),
        },
        "state": {},
        "out": str(folder),
    }


def test_features_are_computed_once_and_the_update_is_that_of_a_run_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, real = list[int](), _VitFront.forward
    monkeypatch.setattr(_VitFront, "forward", lambda self, x: (seen.append(len(x)), real(self, x))[1])
    data, updates = write(tmp_path / "data.parquet", table(21)), []
    for keep in (False, True):
        worker, request = site(data), request_of(tmp_path, keep=keep)
        for number in (1, 2):
            worker.train({**request, "round": number}, lambda _: None, lambda: False)
            updates.append(np.frombuffer((tmp_path / PAYLOAD).read_bytes(), "<f4"))
        scored = list[dict[str, int]]()
        figures = worker.evaluate(request, scored.append)["metrics"]
        assert figures["examples"] == 21 and scored[-1] == {"examples": 21, "of": 21}
    assert seen == [8, 8, 5]
    assert np.abs(updates[0] - updates[2]).max() <= 1e-6 < np.abs(updates[0]).max()
