"""A client's worker without torch: it takes its time, and what it trains depends on all that it is given."""

from __future__ import annotations

import asyncio
import hashlib
import random
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from google.protobuf import json_format

from fedpeft.adapters import payload
from fedpeft.adapters.tensor_errors import as_os_errors
from fedpeft.adapters.updates import prepare
from fedpeft.config import TrainingConfig
from fedpeft.errors import StateInvalid
from fedpeft.rounds.groups import LOCAL, RESIDUAL
from fedpeft.rounds.local_job import LocalUpdate
from fedpeft.rpc import wire
from fedpeft.v1 import tensor_pb2
from fedpeft_client.state.outbox import PAYLOAD, state_files
from fedpeft_client.state.runs import KnownRun
from fedpeft_client.timing import Timing

ROWS = {"a": 10, "b": 20, "c": 30, "d": 40}


class SimulatedWorker:
    """Stands for `WorkerProcess`."""

    def __init__(self, client: str, drawn: random.Random, timing: Timing, longest_s: float) -> None:
        self.timing = timing
        self.hello: dict[str, Any] = {}
        self._client = client
        self._drawn = drawn
        self._longest_s = longest_s

    async def start(self) -> dict[str, Any]:
        """Loads."""
        await asyncio.sleep(self._drawn.uniform(0.5, 5.0))
        self.hello = {
            "torch": "2.13.0",
            "device": "cpu",
            "gpu": "",
            "threads": 1,
            "methods": ["bias"],
            "rows": ROWS[self._client],
            "rows_are": "images",
            "labels": ["a", "b", "c"],
            "inventory": {},
        }
        return self.hello

    async def ask(self, request: dict[str, Any], on_progress: Any = lambda _: None) -> dict[str, Any]:
        """Checks a run, or trains."""
        if request["op"] == "check":
            found = {"examples": ROWS[self._client], "classes": {}, "dropped": 0, "model_parameters": 1000}
            return {"reasons": [], "report": found}
        for step in range(4):
            on_progress({"step": step, "steps": 4, "loss": 1.0, "images_per_second": 1.0, "seconds_left": 1.0})
            await asyncio.sleep(self._drawn.uniform(0.0, self._longest_s / 4))
        try:
            return self._train(request)
        except OSError as error:  # as the worker's process says it
            raise StateInvalid(f"cannot read or write {error.filename or 'a file'}: {error.strerror}") from None

    async def close(self) -> None:
        """Ends."""

    def _train(self, request: dict[str, Any]) -> dict[str, Any]:
        run = KnownRun.from_json(request["run"])
        manifest = wire.manifest_from_proto(
            json_format.ParseDict(request["adapter"]["manifest"], tensor_pb2.Manifest())
        )
        version = payload.decode(manifest, memoryview(Path(request["adapter"]["payload"]).read_bytes()))
        seed = int(request["seed"])
        draw = np.random.Generator(np.random.PCG64(seed))
        specs = run.spec.sent(int(request["round"]))
        settings = TrainingConfig.model_validate(request["settings"])
        change = {
            s.name: (draw.standard_normal(s.shape, np.float32) * settings.learning_rate - 0.1 * version[s.name]).astype(
                np.float32
            )
            for s in specs
        }
        state = {group: safetensors.numpy.load_file(path) for group, path in request["state"].items()}
        update = prepare(change, state.get(RESIDUAL, {}), specs, run.config.codec, (), seed)
        local = LocalUpdate(
            self._client,
            update,
            {RESIDUAL: update.residual_if_counted, LOCAL: {}},
            {RESIDUAL: update.residual_if_not, LOCAL: {}},
            ROWS[self._client],
            {"train_loss": float(hashlib.sha256(update.payload).digest()[0])},
            {"torch": "2.13.0"},
        )
        out = Path(request["out"])
        (out / PAYLOAD).write_bytes(update.payload)
        for name, arrays in state_files(local).items():
            with as_os_errors(out / name):
                safetensors.numpy.save_file(dict(arrays), out / name)
        return {
            "manifest": json_format.MessageToDict(wire.manifest_to_proto(update.manifest)),
            "examples": local.examples,
            "metrics": local.metrics,
            "facts": local.facts,
        }
